"""Many adapters on one engine: the time until a request of one is scheduled, and who waits where they are
more than slots.

- Real vLLM, one request at a time, so that nothing else is waited for. `swap`: the adapter is in memory, and
  another has its slot. `cold`: it lies in the object store only. `wanted`: likewise, but it was asked for
  beforehand, as an ingress does while the request is queued. Measured from the worker's taking the request to
  vLLM's first step with it, as the usage event tells it.
- The sim engine under Poisson arrivals, adapters drawn by Zipf's law: turns as workers give them, against an
  engine that is handed everything and passes over what has no slot.
- Resident memory of one engine with all adapters loaded, against an engine for each.

Everything but EngineCore and nats-server runs in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
from prometheus_client import REGISTRY

from benchmarks import fleet, results
from broker import base, client, replies, subjects
from broker.config import BrokerConfig
from broker.messages import FrameKind, Heartbeat, Request, UsageEvent
from broker.server import NatsServer
from ops import demo_model
from tests.pushing import files, push
from tests.waiting import until
from workers.config import SimConfig, VllmConfig, WorkerConfig
from workers.engines import sim, vllm
from workers.engines.base import Engine
from workers.runner import Worker

ADAPTERS, SLOTS = 20, 8
TOKENS = 32
RATES = (20.0, 40.0, 80.0)
"""Requests a second to the sim engine; at about 30 more adapters are asked for at once than it has slots."""
LOAD_MS = 20.0
"""Time that the sim engine takes to load an adapter: what vLLM took here."""
PATH = "/v1/completions"


@dataclass
class Stage:
    """A worker, and what it tells. `skipped` adds up over the engine's steps."""

    broker: base.Broker
    engine: Engine
    mailbox: replies.Mailbox
    events: dict[str, UsageEvent] = field(default_factory=dict)
    beat: Heartbeat | None = None

    def on_usage(self, message: base.Message) -> None:
        event = UsageEvent.model_validate_json(message.data)
        self.events[event.request_id] = event

    def on_beat(self, message: base.Message) -> None:
        self.beat = Heartbeat.model_validate_json(message.data)

    async def ask(self, model: str, tokens: int) -> UsageEvent:
        """One request to its end. Raises RuntimeError when it fails."""
        name = uuid.uuid4().hex
        body = {"model": model, "prompt": f"Story {name}:", "max_tokens": tokens, "temperature": 0}
        request = Request(
            subject=subjects.RequestSubject(self.engine.base, "standard", "bench", model),
            request_id=name,
            reply_to=subjects.reply("bench", self.mailbox.name, name),
            path=PATH,
            body=orjson.dumps(body | {"stream": True, "ignore_eos": True}),
        )
        stream = self.mailbox.open("bench", name)
        await (await self.broker.enqueue(str(request.subject), request.body, request.headers()))
        frames = []
        while not stream.finished:
            frames += await stream.next(1.0)
        if frames[-1].kind is not FrameKind.END:
            raise RuntimeError(f"{model}: {frames[-1].payload!r}")
        return await until(lambda: self.events.get(name))

    async def push(self, count: int, shapes: Path | None = None) -> list[str]:
        """`count` new adapters, by the names under which they are served."""
        content = [files(8, seed, shapes) for seed in range(min(count, 3))]
        unique = uuid.uuid4().hex[:8]
        names = [f"{unique}-{number}" for number in range(count)]
        for name, each in zip(names, itertools.cycle(content), strict=False):
            await push(self.broker, name, each, base_model=self.engine.base)
        return [f"{name}@1" for name in names]

    async def state(self, model: str, state: str) -> None:
        """Until a heartbeat tells it."""

        def told() -> bool:
            adapters = self.beat.adapters if self.beat else ()
            return any((each.model, each.state) == (model, state) for each in adapters)

        await until(told)


@contextlib.asynccontextmanager
async def staged(engine: Engine) -> AsyncIterator[Stage]:
    stop = asyncio.Event()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        async with (
            NatsServer(Path(scratch) / "nats") as server,
            await client.connect(BrokerConfig(url=server.url), "bench") as broker,
            await client.connect(BrokerConfig(url=server.url), "worker") as other,
            replies.Mailbox(broker, "bench") as mailbox,
        ):
            stage = Stage(broker, engine, mailbox)
            await broker.subscribe(subjects.ALL_USAGE, stage.on_usage)
            await broker.subscribe(subjects.ALL_HEARTBEATS, stage.on_beat)
            config = WorkerConfig(name="bench", adapter_cache=str(Path(scratch) / "adapters"))
            running = asyncio.create_task(Worker(config, other, engine).run(stop))
            try:
                await until(lambda: stage.beat)
                yield stage
            finally:
                stop.set()
                await running


# Real vLLM


async def first_steps(quick: bool) -> dict[str, Any]:
    """Seconds until the first scheduled step, and the memory that adapters take."""
    count, rounds = (5, 4) if quick else (ADAPTERS, 8)
    model = demo_model.ensure(Path(".data"), progress=True)
    config = VllmConfig(model=str(model), adapter_slots=2, adapters_in_memory=2 * ADAPTERS)
    engine = await vllm.start(config)
    try:
        async with staged(engine) as stage:
            await stage.ask(engine.base, 4)
            before = _memory()
            cold_models = await stage.push(count, model)
            cold = [_wait(await stage.ask(adapter, 4)) for adapter in cold_models]
            after = _memory()
            swap = [_wait(await stage.ask(adapter, 4)) for _ in range(rounds) for adapter in cold_models]
            wanted = []
            for adapter in await stage.push(count, model):
                await stage.broker.publish(subjects.want(engine.base, adapter))
                await stage.state(adapter, "ready")
                wanted.append(_wait(await stage.ask(adapter, 4)))
            plain = [_wait(await stage.ask(engine.base, 4)) for _ in range(len(swap))]
    finally:
        await engine.close()
    for name, waits in (("base", plain), ("swap", swap), ("wanted", wanted), ("cold", cold)):
        results.say(f"  {name}: p50 {_ms(waits, 50):.1f} ms, p99 {_ms(waits, 99):.1f} ms of {len(waits)}")
    results.say(f"  memory: {before:.0f} MiB, with {count} adapters {after:.0f} MiB")
    return {
        "model": model.name,
        "adapters": count,
        "wait_ms": {
            name: {"count": len(waits), "p50": _ms(waits, 50), "p99": _ms(waits, 99)}
            for name, waits in (("base", plain), ("swap", swap), ("wanted", wanted), ("cold", cold))
        },
        "memory_mib": {"base": before, "with_adapters": after, "an_engine_each": count * before},
    }


def _memory() -> float:
    """MiB of this process and of EngineCore."""
    own = psutil.Process()
    return sum(fleet.rss_mib(process) for process in (own, *own.children()) if "nats" not in process.name())


def _wait(event: UsageEvent) -> float:
    assert event.latency.engine_wait is not None
    return event.latency.engine_wait


def _ms(seconds: Sequence[float], p: float) -> float:
    return results.percentile(seconds, p) * 1000


# The sim engine


async def zipf(adapters: int, rate: float, seconds: float, *, turns: bool) -> dict[str, Any]:
    """Requests of `adapters` adapters at `rate` a second; without `turns` the engine is handed them all."""
    engine = await sim.start(SimConfig(adapter_slots=SLOTS, load_ms=LOAD_MS))
    if not turns:
        engine.adapter_slots = adapters
    skipped = 0
    async with staged(engine) as stage:
        models = await stage.push(adapters)
        for model in models:
            await stage.ask(model, 1)  # all are in memory
        inner = engine.on_change

        def on_change() -> None:
            nonlocal skipped
            skipped += engine.stats().skipped
            if inner is not None:
                inner()

        engine.on_change = on_change
        swaps = _swaps()
        dice = random.Random(7)
        weights = [1 / rank for rank in range(1, adapters + 1)]
        started = time.monotonic()
        calls: list[asyncio.Task[UsageEvent]] = []
        at = 0.0
        while at < seconds:
            at += dice.expovariate(rate)
            await asyncio.sleep(started + at - time.monotonic())
            model = dice.choices(models, weights)[0]
            calls.append(asyncio.create_task(stage.ask(model, TOKENS)))
        waits = [_wait(event) for event in await asyncio.gather(*calls)]
        took = time.monotonic() - started
        swaps = _swaps() - swaps
        engine.on_change = inner
    await engine.close()
    found = {
        "adapters": adapters,
        "rate": rate,
        "turns": turns,
        "requests": len(waits),
        "swaps_per_minute": swaps / took * 60,
        "skipped": skipped,
        "wait_p50_ms": _ms(waits, 50),
        "wait_p99_ms": _ms(waits, 99),
        "wait_max_ms": max(waits) * 1000,
    }
    results.say(f"  {found}")
    return found


def _swaps() -> float:
    """Of all workers that this process ever had."""
    return REGISTRY.get_sample_value("headrace_adapter_swaps_total") or 0.0


async def measure(quick: bool) -> dict[str, Any]:
    seconds = 5.0 if quick else 20.0
    rates = RATES[-1:] if quick else RATES
    runs = [await zipf(ADAPTERS, rate, seconds, turns=turns) for rate in rates for turns in (True, False)]
    fitting = await zipf(SLOTS, rates[-1], seconds, turns=True)
    return {
        "slots": SLOTS,
        "tokens": TOKENS,
        "load_ms": LOAD_MS,
        "seconds": seconds,
        "zipf": runs,
        "all_fit": fitting,
        "vllm": await first_steps(quick),
    }


def run(quick: bool) -> dict[str, Any]:
    return asyncio.run(measure(quick))


if __name__ == "__main__":
    results.main("adapters", run)
