"""What tests of workers share: a caller who publishes and reads, a worker that runs, an engine of wax."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client import REGISTRY

from broker import base, bodies, replies, subjects
from broker.messages import TERMINAL, Frame, FrameKind, ModelCard, Request, ServiceClass, UsageEvent
from kvstate import prefix
from tests.waiting import LIMIT, until
from workers.config import SimConfig, WorkerConfig
from workers.engines.base import (
    ASGIApp,
    Engine,
    EngineStats,
    NoAdapters,
    NoSleep,
    Receive,
    Scope,
    Send,
    Untold,
)
from workers.engines.sim import expected_tokens, tokenize
from workers.runner import Worker

PATH = "/v1/completions"

FAST = SimConfig(beta0=1, beta1=0, beta2=0, max_num_seqs=8, context_tokens=2048, kv_blocks=256)
"""A token a millisecond, whatever the prompt."""

STUCK = FAST.model_copy(update={"beta1": 60_000.0})
"""Prefill takes a minute a token: a request stays in it."""


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@dataclass
class Call:
    """One request as its caller sees it. `frames` are those the reader was handed, in order."""

    broker: base.Broker
    request: Request
    stream: replies.Stream
    stored: base.Stored
    prompt: str
    tokens: int
    frames: list[Frame] = field(default_factory=list)

    async def reach(self, kind: FrameKind) -> Frame:
        """The first frame of a kind."""
        async with asyncio.timeout(LIMIT):
            while True:
                for frame in self.frames:
                    if frame.kind is kind:
                        return frame
                assert not self.stream.finished, f"no {kind} before {self.frames[-1]}"
                self.frames += await self.stream.next(1.0)

    async def end(self) -> Frame:
        async with asyncio.timeout(LIMIT):
            while not self.stream.finished:
                self.frames += await self.stream.next(1.0)
        assert self.frames[-1].kind in TERMINAL
        return self.frames[-1]

    async def fails(self, code: str) -> Frame:
        frame = await self.end()
        assert frame.kind is FrameKind.ERROR
        assert frame.extra["code"] == orjson.loads(frame.payload)["error"]["code"] == code
        return frame

    async def finishes(self) -> Frame:
        """The end frame, with every token of the answer seen once and in order before it."""
        frame = await self.end()
        assert frame.kind is FrameKind.END, frame
        model = self.request.subject.model
        adapter = "" if model == self.request.subject.base else model
        assert self.ids == expected_tokens(tokenize(self.prompt), self.tokens, adapter=adapter)
        return frame

    @property
    def ids(self) -> list[int]:
        """All tokens that came; each frame says how many there were before it."""
        found: list[int] = []
        for frame in self.frames:
            if frame.kind in (FrameKind.HEAD, FrameKind.DATA):
                assert frame.off == len(found)
                found += frame.ids
        return found

    @property
    def payload(self) -> bytes:
        return b"".join(f.payload for f in self.frames if f.kind in (FrameKind.HEAD, FrameKind.DATA))

    async def cancel(self) -> None:
        body = orjson.dumps({"seq": self.stored.seq, "at": self.broker.now_ms()})
        await self.broker.publish(f"cancel.{self.request.key}", body)


class Caller:
    """Publishes requests and reads their replies. Made with `calling`."""

    def __init__(self, broker: base.Broker, mailbox: replies.Mailbox) -> None:
        self.broker = broker
        self.mailbox = mailbox
        self._numbers = itertools.count(1)

    async def submit(
        self,
        tokens: int = 5,
        *,
        prompt: str = "",
        model: str = "sim",
        path: str = PATH,
        service_class: str = "standard",
        request_id: str = "",
        deadline_ms: int = 0,
        body: bytes | None = None,
        shared: str = "",
        **more: Any,
    ) -> Call:
        """Ask for a completion of `tokens` tokens; `more` goes into the body. `shared`: the beginning of the
        prompt by which the dispatcher shall know others that share it."""
        request_id = request_id or f"r{next(self._numbers)}"
        prompt = prompt or f"the prompt of {request_id}"
        asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True} | more
        request = Request(
            subject=subjects.RequestSubject("sim", service_class, "acme", model),
            request_id=request_id,
            reply_to=subjects.reply("acme", self.mailbox.name, request_id),
            path=path,
            body=orjson.dumps(asked) if body is None else body,
            deadline_ms=deadline_ms,
            prefix=prefix.encode(prefix.chain(shared.encode(), b"")) if shared else "",
        )
        request = await bodies.stow(self.broker, request)
        stream = self.mailbox.open("acme", request_id)
        stored = await (await self.broker.enqueue(str(request.subject), request.body, request.headers()))
        return Call(self.broker, request, stream, stored, prompt, tokens)

    async def publish(
        self, headers: dict[str, str], body: bytes = b"{}", subject: str = "req.sim.standard.acme.sim"
    ) -> replies.Stream:
        """A message as it stands; the stream is that of `out.acme.<mailbox>.raw`."""
        stream = self.mailbox.open("acme", "raw")
        await (await self.broker.enqueue(subject, body, headers))
        return stream

    async def queued(self) -> int:
        return sum((await self.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).values())

    async def kept(self) -> int:
        """Messages of the object store of large bodies: one for each chunk, and one that describes it."""
        stream, everything = subjects.objects(subjects.PAYLOADS), subjects.all_objects(subjects.PAYLOADS)
        return sum((await self.broker.counts(stream, everything)).values())

    async def cleared(self) -> None:
        """Until the queue and the object store are empty."""

        async def empty() -> bool:
            return not await self.queued() and not await self.kept()

        await until(empty)

    async def drained(self) -> None:
        async def empty() -> bool:
            return not await self.queued()

        await until(empty)

    async def usage(self, count: int) -> list[UsageEvent]:
        """All usage events there are, once `count` of them are."""
        found: list[base.Record] = []

        async def enough() -> bool:
            found[:] = await self.broker.read(subjects.USAGE, subjects.ALL_USAGE)
            return len(found) >= count

        await until(enough)
        return [UsageEvent.model_validate_json(record.data) for record in found]


@asynccontextmanager
async def calling(broker: base.Broker) -> AsyncIterator[Caller]:
    """A caller whose queues exist: what it publishes finds its worker later too."""
    for service_class in ServiceClass:
        await (await broker.pull("sim", service_class, lambda delivery: None, lambda: None)).close()
    async with replies.Mailbox(broker, "box") as mailbox:
        yield Caller(broker, mailbox)


@dataclass
class Serving:
    """A worker that takes requests. Leaving `serving` stops it and raises what ended it, if anything did."""

    worker: Worker
    stop: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def serving(
    broker: base.Broker, engine: Engine, name: str = "w1", **settings: Any
) -> AsyncIterator[Serving]:
    config = WorkerConfig(name=name, **{"heartbeat": 0.02, "drain_timeout": 1.0, **settings})
    worker, stop, ready = Worker(config, broker, engine), asyncio.Event(), asyncio.Event()
    heartbeats = await broker.subscribe(subjects.heartbeat(worker.name), lambda _: ready.set())
    task = asyncio.create_task(worker.run(stop))
    task.add_done_callback(lambda _: ready.set())
    try:
        await asyncio.wait_for(ready.wait(), LIMIT)
        yield Serving(worker, stop, task)
    finally:
        stop.set()
        await asyncio.wait({task}, timeout=LIMIT)
        await heartbeats.close()
    assert task.done(), "the worker does not stop"
    if not task.cancelled():
        await task


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return not stats.running and not stats.waiting and stats.kv_tokens_free == stats.kv_tokens_total


class WaxEngine(NoAdapters, NoSleep, Untold):
    """An engine whose app, figures and death a test shapes. `seen` holds the bodies it was called with."""

    name = "wax"
    continues = False
    base = "sim"

    def __init__(self, app: ASGIApp, slots: int = 8) -> None:
        self._run = app
        self.app: ASGIApp = self._app
        self.models: tuple[ModelCard, ...] = (ModelCard(id="sim", base="sim", paths=(PATH,)),)
        self.on_change: Callable[[], None] | None = None
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.slots = slots
        self.running = 0
        self.most = 0
        self.seen: list[bytes] = []

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append((await receive())["body"])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._run(scope, receive, send)
        finally:
            self.running -= 1

    def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, self.slots, 4096, 0, 0)

    async def close(self) -> None:
        return


async def start_response(send: Send, body: bytes = b"data: 1\n\n", status: int = 200) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def gone(receive: Receive) -> None:
    """Until the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Clock:
    """A broker's, which stands still but where a test sets it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def soon(seconds: float) -> int:
    """A deadline."""
    return int((time.time() + seconds) * 1000)
