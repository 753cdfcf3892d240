"""Who takes part: workers on the simulated engine, and callers who check each frame as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker import errors, replies, subjects
from broker.base import Stored
from broker.messages import TERMINAL, Frame, FrameKind, Request
from ingress import resume
from ingress.config import IngressConfig
from ingress.exchange import Exchange
from ingress.relay import Relay
from tests.model.network import Client, Server
from tests.workbench import soon
from workers.config import SimConfig, WorkerConfig
from workers.engines import sim
from workers.runner import Worker

PATH = "/v1/completions"
TENANT = "acme"
ENDLESS = 7000
"""Tokens of an answer that outlasts every run, at 20 ms each."""

MAX_DEATHS = 3

_ENGINE = SimConfig(ttft_ms=20, itl_ms=20, max_num_seqs=2)


class Process:
    """One worker with its engine and its connection."""

    def __init__(self, name: str, client: Client, engine: sim.SimEngine) -> None:
        config = WorkerConfig(name=name, drain_timeout=0.3, max_deaths=MAX_DEATHS)
        self.name, self.client, self.engine = name, client, engine
        self.stop = asyncio.Event()
        self.gone = False
        self.task = asyncio.create_task(self._run(Worker(config, client, engine)))

    async def _run(self, worker: Worker) -> None:
        with contextlib.suppress(errors.EngineFailed):
            await worker.run(self.stop)
        with contextlib.suppress(errors.Unavailable):
            await self.client.sync()
        await self.client.close()

    @staticmethod
    async def start(name: str, server: Server) -> Process:
        client = Client(server)
        await client.start()
        return Process(name, client, await sim.start(_ENGINE))

    async def die(self, unsent: bool) -> None:
        self.gone = True
        await self.client.die(unsent)
        await self.engine.close()
        self.task.cancel()

    async def lose_engine(self) -> None:
        """The engine dies; the worker hands back what it ran, and ends."""
        self.gone = True
        await self.engine.close()
        self.engine.died.set_exception(errors.EngineFailed("the engine died"))

    async def drain(self) -> None:
        self.gone = True
        self.stop.set()

    @property
    def idle(self) -> bool:
        stats = self.engine.stats()
        return not stats.running and not stats.waiting


@dataclass(eq=False)
class Asked:
    """One request and what is known of its life."""

    request: Request
    streams: bool
    choices: int
    tokens: int
    prompt: str
    ack: Stored | None = None
    cancelled: bool = False
    readers: list[Reader] = field(default_factory=list)

    @property
    def endless(self) -> bool:
        return self.tokens == ENDLESS

    def expected(self, choice: int, count: int) -> list[int]:
        return sim.expected_tokens(sim.tokenize(self.prompt), count, choice)


def ask(number: int, mailbox: str, streams: bool, choices: int, tokens: int, deadline: float) -> Asked:
    name, prompt = f"r{number}", f"the prompt of request {number}"
    body = {"model": "sim", "prompt": prompt, "max_tokens": tokens, "n": choices, "stream": streams}
    request = Request(
        subject=subjects.RequestSubject("sim", "standard", TENANT, "sim"),
        request_id=name,
        reply_to=subjects.reply(TENANT, mailbox, name),
        path=PATH,
        body=orjson.dumps(body),
        deadline_ms=soon(deadline),
    )
    return Asked(request, streams, choices, tokens, prompt)


class Reader:
    """What one reader was handed, each frame checked as it comes."""

    def __init__(self, asked: Asked, late: bool = False) -> None:
        self.asked = asked
        self.late = late
        self.said: dict[int, list[int]] = {}
        self.headed = False
        self.end: Frame | None = None
        self.fault: errors.HeadraceError | None = None
        asked.readers.append(self)

    @property
    def finished(self) -> bool:
        return self.end is not None or self.fault is not None

    @property
    def code(self) -> str:
        """Why the answer is not whole; "" where it is."""
        if self.fault is not None:
            return self.fault.code
        assert self.end is not None
        return str(self.end.extra["code"]) if self.end.kind is FrameKind.ERROR else ""

    def take(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert self.end is None, f"{frame} after the end"
            if frame.kind is FrameKind.HEAD:
                assert not self.headed, f"a second head: {frame}"
                self.headed = True
            if frame.kind in TERMINAL:
                self.end = frame
            elif frame.kind is not FrameKind.BEAT:
                assert self.headed, f"{frame} before the head"
                self._take_tokens(frame)

    def _take_tokens(self, frame: Frame) -> None:
        for choice, off, ids in [[0, frame.off, frame.ids], *frame.choices]:
            said = self.said.setdefault(choice, [])
            assert off == len(said), f"{len(said)} tokens of choice {choice} were said before {frame}"
            assert ids == self.asked.expected(choice, off + len(ids))[off:], f"wrong tokens in {frame}"
            said += ids

    async def read(self, stream: replies.Stream) -> None:
        """To the end."""
        try:
            while not self.finished:
                self.take(await stream.next(1.0))
        except errors.FramesLost as exc:
            self.fault = exc

    async def read_on(self, client: Client) -> None:
        """As one who comes late: what `ingress.app` does for a reply that is read again."""
        name = self.asked.request.request_id
        relay = _Relay(_nowhere, resume.PATH, name, streaming=False)
        relay.reader = self
        try:
            subject = await resume.find(client, TENANT, name)
            async with replies.following(client, subject) as stream:
                await resume.follow(client, stream, relay, _never, keepalive=1.0)
        except errors.HeadraceError as exc:
            self.fault = exc


async def _nowhere(message: Any) -> None:
    return


async def _never() -> Any:
    await asyncio.get_running_loop().create_future()


class _Relay(Relay):
    """Shows its reader what it passes on."""

    reader: Reader

    async def frames(self, frames: list[Frame]) -> bool:
        self.reader.take(frames)
        return await super().frames(frames)


class HttpCaller:
    """A request that comes by HTTP: what `ingress.app` does with one."""

    def __init__(self, asked: Asked, client: Client, mailbox: replies.Mailbox) -> None:
        self.asked = asked
        self.reader = Reader(asked)
        self._left = asyncio.Event()
        self._stream = mailbox.open(TENANT, asked.request.request_id)
        relay = _Relay(_nowhere, PATH, asked.request.request_id, asked.streams)
        relay.reader = self.reader
        self._exchange = Exchange(
            IngressConfig(), client, asked.request, self._stream, relay, lambda model: True
        )

    async def run(self) -> None:
        fault = await self._follow()
        if fault is not None and self._exchange.cancellable:
            self.asked.cancelled = True
            await self._exchange.cancel(fault)
        if not self.reader.finished:
            self.reader.fault = fault
        self._stream.close()

    async def _follow(self) -> errors.HeadraceError | None:
        try:
            await self._exchange.publish()
            return await self._exchange.follow(self._receive)
        except errors.HeadraceError as exc:
            return exc

    async def cancel(self) -> None:
        self._left.set()

    async def _receive(self) -> Any:
        await self._left.wait()
        return {"type": "http.disconnect"}


class DirectCaller:
    """One who publishes to NATS, as docs/nats.md tells."""

    def __init__(self, asked: Asked, client: Client, mailbox: replies.Mailbox) -> None:
        self.asked = asked
        self.reader = Reader(asked)
        self._client = client
        self._stream = mailbox.open(TENANT, asked.request.request_id)

    async def run(self) -> None:
        request = self.asked.request
        ack = await self._client.enqueue(str(request.subject), request.body, request.headers())
        self.asked.ack = await ack
        await self.reader.read(self._stream)
        self._stream.close()

    async def cancel(self) -> None:
        self.asked.cancelled = True
        body = orjson.dumps({"seq": self.asked.ack.seq} if self.asked.ack else {})
        await self._client.publish(f"cancel.{self.asked.request.key}", body)


Caller = HttpCaller | DirectCaller
