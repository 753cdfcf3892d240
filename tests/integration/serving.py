"""An ingress and sim workers on a real nats-server, in the test's own process and event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from broker import base, client, subjects
from broker.config import BrokerConfig
from broker.messages import ModelCard
from ingress import app
from ingress.config import IngressConfig
from tests.waiting import LIMIT
from workers.config import SimConfig, WorkerConfig
from workers.engines import sim
from workers.runner import Worker


@asynccontextmanager
async def ingress(broker_config: BrokerConfig, **settings: Any) -> AsyncIterator[str]:
    """The URL of an ingress on a free port."""
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    config = IngressConfig(**{"port": 0, "drain_timeout": 1.0, **settings})
    async with await client.connect(broker_config, "ingress under test") as broker:
        serving = asyncio.create_task(app.serve(config, broker, stop, ready.set_result))
        await asyncio.wait((ready, serving), return_when=asyncio.FIRST_COMPLETED, timeout=LIMIT)
        try:
            yield ready.result()
        finally:
            stop.set()
            await serving


@asynccontextmanager
async def worker(broker_config: BrokerConfig, **settings: Any) -> AsyncIterator[sim.SimEngine]:
    """A worker's sim engine; `name` names the worker, everything else is the engine's."""
    stop = asyncio.Event()
    config = WorkerConfig(engine="sim", name=settings.pop("name", ""), drain_timeout=1.0)
    engine = await sim.start(SimConfig(**{"ttft_ms": 2, "itl_ms": 1, **settings}))
    try:
        async with await client.connect(broker_config, "worker under test") as broker:
            serving = asyncio.create_task(Worker(config, broker, engine).run(stop))
            try:
                yield engine
            finally:
                stop.set()
                await serving
    finally:
        await engine.close()


@asynccontextmanager
async def streaming(
    http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str] | None = None
) -> AsyncIterator[tuple[bytes, AsyncIterator[bytes]]]:
    """The first part of a stream once it is here, and the rest; leaving early disconnects."""
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        parts = response.aiter_raw()
        yield await anext(parts), parts


async def register(broker: base.Broker, model: str) -> None:
    """Have the fleet know `model` though no worker serves it now, as after a restart."""
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
    card = ModelCard(id=model, base=model, paths=paths)
    await broker.put(subjects.KV_MODELS, subjects.token(model), card.model_dump_json().encode())


def answer(prompt: str, n: int) -> str:
    """What the sim answers to a user's chat message."""
    return sim.text_of(sim.expected_tokens(sim.tokenize(sim.chat_prompt([("user", prompt)])), n))


async def status(http: httpx.AsyncClient, path: str) -> int:
    return (await http.get(path)).status_code


async def ready(http: httpx.AsyncClient) -> bool:
    return await status(http, "/health/ready") == 200
