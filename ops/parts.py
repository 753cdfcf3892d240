"""The services, put together. Each function serves one part of a fleet until `stop`.

Imports are local: a process loads only the part that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ops.service import Ready
from ops.settings import Settings

if TYPE_CHECKING:
    from workers.engines.base import Engine


async def ingress(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    from broker import client
    from ingress import app

    async with await client.connect(settings.broker, _name("ingress", settings.ingress.name)) as broker:
        await app.serve(settings.ingress, broker, stop, lambda url: ready({"url": url}))


async def worker(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    from broker import client
    from workers.runner import Worker

    # The engine first: while it starts it may hold the event loop longer than the broker waits for a pong.
    engine = await _start_engine(settings)
    try:
        async with await client.connect(settings.broker, _name("worker", settings.worker.name)) as broker:
            ready({"engine": engine.name, "base": engine.base, "models": [card.id for card in engine.models]})
            await Worker(settings.worker, broker, engine).run(stop)
    finally:
        await engine.close()


async def scheduler(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    from broker import client
    from scheduler.service import Scheduler

    async with await client.connect(settings.broker, _name("scheduler", settings.scheduler.name)) as broker:
        ready({})
        await Scheduler(settings.scheduler, broker).run(stop)


async def sim_engine(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    """The sim engine's app alone, over plain HTTP, at the ingress's host and port."""
    import uvicorn

    from workers.engines import sim

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # ours to handle

    engine = await sim.start(settings.sim)
    listener = socket.create_server((settings.ingress.host, settings.ingress.port), backlog=2048)
    config = uvicorn.Config(
        engine.app,
        loop="none",
        http="httptools",
        interface="asgi3",
        proxy_headers=False,
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        host, port = listener.getsockname()[:2]
        ready({"url": f"http://{host}:{port}", "base": engine.base})
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        await engine.close()


async def _start_engine(settings: Settings) -> Engine:
    match settings.worker.engine:
        case "sim":
            from workers.engines import sim

            return await sim.start(settings.sim)
        case "http":
            from workers.engines import http

            return await http.start(settings.http)
        case "vllm":
            from workers.engines import vllm

            return await vllm.start(with_model(settings).vllm)


def with_model(settings: Settings, progress: bool = False) -> Settings:
    """The settings with the demo model, fetched and converted if need be, where they name no model."""
    if settings.worker.engine != "vllm" or settings.vllm.model:
        return settings
    from ops import demo_model

    model = demo_model.ensure(settings.data, progress)
    return settings.model_copy(update={"vllm": settings.vllm.model_copy(update={"model": str(model)})})


def _name(part: str, configured: str) -> str:
    """What the broker's monitoring calls the connection."""
    return f"headrace {part} {configured}".strip()
