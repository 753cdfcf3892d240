"""A worker with its engine in this process, the queue before it, and who asks: what of many adapters on one
engine is measured with.

Everything but the engine's own processes and nats-server runs in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
from prometheus_client import REGISTRY

from benchmarks import fleet, results
from broker import base, client, replies, subjects
from broker.config import BrokerConfig
from broker.messages import Dispatch, Frame, FrameKind, Heartbeat, Request, UsageEvent
from broker.server import NatsServer
from tests.pushing import files, push
from tests.waiting import until
from workers.config import WorkerConfig
from workers.engines.base import Engine, EngineStats
from workers.runner import Worker

PATH = "/v1/completions"
WORKER = "bench"


@dataclass
class Stage:
    """A queue for requests of `base_model`, and what its worker tells: `ended` are the monotonic times at
    which its events came. `alive` says whether there is one still, or may yet be."""

    scratch: Path
    url: str
    base_model: str
    broker: base.Broker
    mailbox: replies.Mailbox
    events: dict[str, UsageEvent] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    beat: Heartbeat | None = None
    alive: Callable[[], bool] = lambda: True

    def on_usage(self, message: base.Message) -> None:
        event = UsageEvent.model_validate_json(message.data)
        self.events[event.request_id] = event
        self.ended[event.request_id] = time.monotonic()

    def on_beat(self, message: base.Message) -> None:
        self.beat = Heartbeat.model_validate_json(message.data)

    async def ask(self, model: str, tokens: int, prompt: str = "") -> UsageEvent:
        """One request to its end. Raises RuntimeError when it fails, or its worker ends."""
        name = uuid.uuid4().hex
        async for _ in self._frames(name, model, tokens, prompt):
            pass
        return await until(lambda: self.events.get(name))

    async def each(self, models: Sequence[str]) -> list[UsageEvent]:
        """A request of each, one after the other."""
        return [await self.ask(model, 4) for model in models]

    async def first_token(self, model: str) -> float:
        """One request to its end; the time.monotonic() at which its first token was here."""
        at = [time.monotonic() async for frame in self._frames(uuid.uuid4().hex, model, 4) if frame.ids]
        return at[0]

    async def _frames(self, name: str, model: str, tokens: int, prompt: str = "") -> AsyncIterator[Frame]:
        body = {"model": model, "prompt": f"Story {name}: {prompt}", "max_tokens": tokens, "temperature": 0}
        request = Request(
            subject=subjects.RequestSubject(self.base_model, "standard", "bench", model),
            request_id=name,
            reply_to=subjects.reply("bench", self.mailbox.name, name),
            path=PATH,
            body=orjson.dumps(body | {"stream": True, "ignore_eos": True}),
        )
        stream = self.mailbox.open("bench", name)
        await (await self.broker.enqueue(str(request.subject), request.body, request.headers()))
        while not stream.finished:
            for frame in await stream.next(1.0):
                if frame.kind is FrameKind.ERROR:
                    raise RuntimeError(f"{model}: {frame.payload!r}")
                yield frame
            if not self.alive():
                raise RuntimeError("the worker ended")

    async def push(self, count: int, shapes: Path | None = None) -> list[str]:
        """`count` new adapters, by the names under which they are served."""
        content = [files(8, seed, shapes) for seed in range(min(count, 3))]
        unique = uuid.uuid4().hex[:8]
        names = [f"{unique}-{number}" for number in range(count)]
        for name, each in zip(names, itertools.cycle(content), strict=False):
            await push(self.broker, name, each, base_model=self.base_model)
        return [f"{name}@1" for name in names]

    async def state(self, model: str, state: str) -> None:
        """Until a heartbeat tells it."""

        def told() -> bool:
            adapters = self.beat.adapters if self.beat else ()
            return any((each.model, each.state) == (model, state) for each in adapters)

        await until(told)


@contextlib.asynccontextmanager
async def queued(model: str) -> AsyncIterator[Stage]:
    """A queue for requests of base `model`, which nobody serves yet."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        async with (
            NatsServer(Path(scratch) / "nats") as server,
            await client.connect(BrokerConfig(url=server.url), "bench") as broker,
            replies.Mailbox(broker, "bench") as mailbox,
        ):
            stage = Stage(Path(scratch), server.url, model, broker, mailbox)
            await broker.subscribe(subjects.ALL_USAGE, stage.on_usage)
            await broker.subscribe(subjects.ALL_HEARTBEATS, stage.on_beat)
            yield stage


@contextlib.asynccontextmanager
async def staged(engine: Engine) -> AsyncIterator[Stage]:
    """`engine` behind a queue, with a worker in this process."""
    stop = asyncio.Event()
    async with queued(engine.base) as stage, await client.connect(BrokerConfig(url=stage.url), WORKER) as own:
        config = WorkerConfig(name=WORKER, adapter_cache=str(stage.scratch / "adapters"))
        running = asyncio.create_task(Worker(config, own, engine).run(stop))
        stage.alive = lambda: not running.done()
        try:
            await until(lambda: stage.beat)
            yield stage
        finally:
            stop.set()
            await running


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """vLLM's CPU engines that are started meanwhile compute in one thread each: threads wait for each other
    after each layer, and for long where something else has their cores."""
    with mock.patch.dict(os.environ, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}):
        yield


@contextlib.asynccontextmanager
async def scheduler(nats: str, *, dispatches: bool) -> AsyncIterator[None]:
    """One that has begun. Workers on a machine that is all used up may be late to say that they live."""
    with fleet.joined("scheduler", nats, dispatch__enabled=dispatches, scheduler__lost_after=1.0):
        async with await client.connect(BrokerConfig(url=nats), "bench") as broker:
            heard: list[base.Message] = []
            await broker.subscribe(subjects.DISPATCH, heard.append)
            if dispatches:
                await until(lambda: heard and Dispatch.model_validate_json(heard[-1].data).bases)
            else:
                await asyncio.sleep(1.0)  # workers begin to pull 0.35 s after they last heard one
        yield


@dataclass
class Watch:
    """What an engine with its worker did meanwhile. `skipped` adds up over the engine's steps."""

    skipped: int = 0
    swaps: float = 0.0
    seconds: float = 0.0

    def figures(self, events: Sequence[UsageEvent]) -> dict[str, Any]:
        waits = [wait(event) for event in events]
        return {
            "requests": len(waits),
            "swaps_per_minute": self.swaps / self.seconds * 60,
            "skipped": self.skipped,
            "wait_p50_ms": ms(waits, 50),
            "wait_p99_ms": ms(waits, 99),
            "wait_max_ms": max(waits) * 1000,
        }


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[Watch]:
    """For an engine whose worker runs."""
    watch = Watch()

    def add(stats: EngineStats) -> None:
        watch.skipped += stats.skipped

    started, before = time.monotonic(), swaps()
    with each_step(engine, add):
        yield watch
    watch.seconds, watch.swaps = time.monotonic() - started, swaps() - before


@contextlib.contextmanager
def each_step(engine: Engine, tell: Callable[[EngineStats], None]) -> Iterator[None]:
    """`tell` hears what the engine, whose worker runs, is like after each step."""
    inner = engine.on_change

    def on_change() -> None:
        tell(engine.stats())
        if inner is not None:
            inner()

    engine.on_change = on_change
    try:
        yield
    finally:
        engine.on_change = inner


def swaps() -> float:
    """Of all workers that this process ever had."""
    return REGISTRY.get_sample_value("headrace_adapter_swaps_total") or 0.0


def wait(event: UsageEvent) -> float:
    assert event.latency.engine_wait is not None
    return event.latency.engine_wait


def ms(seconds: Sequence[float], p: float) -> float:
    return results.percentile(seconds, p) * 1000
