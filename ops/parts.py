"""The services, put together. Each function serves one part of a fleet until `stop`.

Imports are local: a process loads only the part that it runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ops import ports
from ops.service import Ready
from ops.settings import Settings

if TYPE_CHECKING:
    from workers.engines.base import Engine


async def ingress(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    from broker import client
    from ingress import app

    config = settings.ingress
    ports.free(config.host, config.port, "--port")
    async with await client.connect(settings.broker, _name("ingress", config.name)) as broker:
        await app.serve(config, broker, stop, lambda url: ready({"url": url, "metrics": f"{url}/metrics"}))


async def worker(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    from broker import client
    from workers.runner import Worker

    config = settings.worker
    if not config.adapter_cache:
        config = config.model_copy(update={"adapter_cache": str(settings.data / "adapters")})
    ports.free(config.metrics_host, config.metrics_port, "worker.metrics_port")
    # The engine first: while it starts it may hold the event loop longer than the broker waits for a pong.
    engine = await _start_engine(settings)
    try:
        facts: dict[str, object] = {
            "engine": engine.name,
            "base": engine.base,
            "models": [card.id for card in engine.models],
        }
        async with await client.connect(settings.broker, _name("worker", config.name)) as broker:
            await Worker(config, broker, engine).run(stop, lambda url: ready(facts | {"metrics": url}))
    finally:
        await engine.close()


async def scheduler(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    from broker import client
    from scheduler.service import Scheduler

    config = settings.scheduler
    ports.free(config.metrics_host, config.metrics_port, "scheduler.metrics_port")
    async with await client.connect(settings.broker, _name("scheduler", config.name)) as broker:
        await Scheduler(config, broker, settings.dispatch).run(stop, lambda url: ready({"metrics": url}))


async def sim_engine(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    """The sim engine's app alone, over plain HTTP, at the ingress's host and port."""
    from workers.engines import sim

    host, port, base = settings.ingress.host, settings.ingress.port, settings.sim.model
    ports.free(host, port, "--port")
    await sim.serve(settings.sim, host, port, stop, lambda url: ready({"url": url, "base": base}))


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
