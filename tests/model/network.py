"""The in-memory broker at the end of lines that are slow, stall, break, and lose frames."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from broker import codec, errors, subjects, tail
from broker.assembler import Assembler
from broker.base import Message
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.memory_hub import Hub, Queue

LATENCY = 0.0002
"""Seconds for one message in either direction; those of one client keep their order."""

_TIMEOUT = 2.0
"""Seconds for an answer, as `broker.client` waits for one."""

_TAIL_SECONDS, _TAIL_BYTES = 12.0, 2**20


_ELECTED = "elected"
"""Subject of the server's word that the journal has a leader again."""


class Server(Hub):
    """Loses reply frames when told to.

    Attributes:
        unheard: so many of the next frames reach no reader.
        leaderless: the journal keeps nothing now.
        hurt: subjects of replies of which the journal did not get a frame, or not in its order.
        lost: (subject, frame) of those that it has not got since.
        untold: subjects of replies without an end in the journal when their request was acknowledged.
    """

    def __init__(self, config: BrokerConfig, clock: Callable[[], float]) -> None:
        super().__init__(config, clock, 2**20)
        self.unheard = 0
        self.leaderless = False
        self.hurt: set[str] = set()
        self.lost: set[tuple[str, bytes]] = set()
        self.untold: set[str] = set()

    def ack(self, queue: Queue, seq: int) -> None:
        entry = self.stream(subjects.REQUESTS).entries.get(seq)
        if entry is not None:
            record = entry.record
            reply_to = (record.headers or {})[subjects.REPLY_TO]
            frames = [
                codec.decode(said.data)
                for said in self.stream(subjects.REPLIES).select(reply_to)
                if said.stored_ms >= record.stored_ms
            ]
            assembler = Assembler()
            with contextlib.suppress(errors.FramesLost):
                assembler.feed_all(frames)
                if not assembler.finished:
                    self.untold.add(reply_to)
        super().ack(queue, seq)

    def keep(self, message: Message) -> None:
        if subjects.is_reply(message.subject):
            if self.leaderless:
                self.lose(message)
                return
            self.lost.discard((message.subject, message.data))
        super().keep(message)

    def route(self, message: Message) -> None:
        if self.unheard and subjects.is_reply(message.subject):
            self.unheard -= 1
        else:
            super().route(message)

    def lose(self, message: Message) -> None:
        self.hurt.add(message.subject)
        self.lost.add((message.subject, message.data))

    def elect(self) -> None:
        self.leaderless = False
        self.route(Message(_ELECTED, b""))


class Client(MemoryBroker):
    """One process's connection. What it sends takes a moment, so that a process may die before it is sent;
    what it said lately it repeats, as `broker.client` does."""

    def __init__(self, server: Server) -> None:
        super().__init__(hub=server)
        self.server = server
        self.stalled = False
        self._out: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._in: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._sending = False
        self._arrives = 0.0
        self._tail = tail.Tail(_TAIL_SECONDS, _TAIL_BYTES)
        self._heard = tail.Tail(_TAIL_SECONDS, _TAIL_BYTES)

    async def start(self) -> None:
        await self.subscribe(subjects.ALL_AGAIN, self._on_again)
        await self.subscribe(_ELECTED, self._on_elected)

    def _on_elected(self, _: Message) -> None:
        self.disturbed = asyncio.get_running_loop().time()
        self._repeat_all(heard=True)

    # The line

    def send(self, action: Callable[..., object], *arguments: Any) -> None:
        if self._closed:
            self.check()
        self._out.append((action, arguments))
        self._flow()

    def _flow(self) -> None:
        if not self._sending and self._out:
            self._sending = True
            asyncio.get_running_loop().call_later(LATENCY, self._pass_one)

    def _pass_one(self) -> None:
        self._sending = False
        if self.connected and not self.stalled and self._out:
            action, arguments = self._out.popleft()
            action(*arguments)
            self._flow()

    def hand(self, take: Callable[..., object], *arguments: Any) -> None:
        if self.stalled:
            self._in.append((take, arguments))
        else:
            loop = asyncio.get_running_loop()
            # Never at one time: the loop's timers of one time have no order.
            self._arrives = max(loop.time() + LATENCY, self._arrives + LATENCY / 1000)
            loop.call_at(self._arrives, self._arrive, take, arguments)

    def _arrive(self, take: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if self.connected:
            take(*arguments)

    async def trip(self, one_way: Callable[..., None]) -> None:
        """Raises errors.Unavailable when the message does not arrive."""
        self.check()
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        one_way(_arrived, arrived)
        try:
            await asyncio.wait_for(arrived, _TIMEOUT)
        except TimeoutError:
            raise errors.Unavailable("no answer in time") from None

    async def publish(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        await super().publish(subject, data, headers, reply)
        if subjects.is_reply(subject):
            self._tail.add(subject, data, asyncio.get_running_loop().time())

    def heard(self, subject: str, data: bytes) -> None:
        self._heard.add(subject, data, asyncio.get_running_loop().time())

    def _on_again(self, message: Message) -> None:
        key = message.subject[6:]
        frames = self._tail.of(key) + self._heard.of(key)
        self._repeat(frames)
        if frames and message.reply:
            self.send(self.server.publish, Message(message.reply, b""))

    def _repeat(self, frames: list[tuple[str, bytes]]) -> None:
        for subject, data in frames:
            self.send(self.server.publish, Message(subject, data))

    def _repeat_all(self, heard: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        for key in self._tail.keys(now):
            self._repeat(self._tail.of(key))
        for key in self._heard.keys(now) if heard else ():
            self._repeat(self._heard.of(key))

    # What befalls it

    def stall(self) -> None:
        """Nothing goes through, and nobody knows."""
        self.stalled = True

    def wake(self) -> None:
        """What was held up goes on its way, late."""
        self.stalled = False
        while self._in:
            take, arguments = self._in.popleft()
            self.hand(take, *arguments)
        self._flow()

    def cut(self) -> None:
        """The connection breaks; what was on its way is lost."""
        self.wake()
        while self._out:
            for said in self._out.popleft()[1]:
                if isinstance(said, Message) and subjects.is_reply(said.subject):
                    self.server.lose(said)
        self.disconnect()

    def heal(self) -> None:
        self.reconnect()
        self._repeat_all()
        self._flow()

    def mend(self) -> None:
        """Whatever befell it, but for its death, is over."""
        if not self._closed:
            if not self.connected:
                self.heal()
            self.wake()

    async def die(self, unsent: bool) -> None:
        """With its process, and if `unsent` with what had not gone out yet."""
        self.stalled = False
        while self._out and not unsent and self.connected:
            self._pass_one()
        self._out.clear()
        await self.close()


def _arrived(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _there_and_back(name: str) -> Callable[..., Awaitable[Any]]:
    async def ask(self: Client, *args: Any, **kwargs: Any) -> Any:
        await self.trip(self.send)
        if kwargs.get("leader") and args[0] == subjects.REPLIES and self.server.leaderless:
            await asyncio.sleep(_TIMEOUT)
            raise errors.Unavailable("the journal has no leader")
        answer = await getattr(MemoryBroker, name)(self, *args, **kwargs)
        await self.trip(self.hand)
        return answer

    return ask


_ASKED = "sync read last record delete counts get swap hand_on delivered"
for _name in _ASKED.split():
    setattr(Client, _name, _there_and_back(_name))
