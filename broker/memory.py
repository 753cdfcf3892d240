"""The fake broker: what `client.NatsBroker` promises, inside one process and one event loop.

Time is the given clock's alone, so nothing here waits: a test that wants the ack wait over moves the
clock and calls `expire`. Handlers run from the event loop, never from inside the call that caused them,
as with a real connection.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from broker import base, errors, subjects
from broker.base import Message, Record, Stored
from broker.config import BrokerConfig
from broker.memory_hub import Hub, Lease, Pull, Queue, matches, size_of
from broker.messages import ServiceClass

_log = logging.getLogger(__name__)

T = TypeVar("T")


def _run(handler: Callable[..., None], *args: object) -> None:
    try:
        handler(*args)
    except Exception:
        _log.exception("a handler failed")


class _Subscription:
    """A client's interest in a subject."""

    def __init__(self, client: MemoryBroker, subject: str, handler: Callable[[Message], None]) -> None:
        self.subject = subject
        self._client = client
        self._handler = handler
        self._closed = False
        client.subscriptions.append(self)
        client.hub.listeners.append(self)

    def hand(self, message: Message) -> None:
        self._client.hand(self._deliver, message)

    def _deliver(self, message: Message) -> None:
        if self._client.connected and not self._closed:
            _run(self._handler, message)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.subscriptions.remove(self)
            self._client.hub.listeners.remove(self)


class _Watch:
    """A bucket's state, then its changes."""

    def __init__(
        self, client: MemoryBroker, bucket: str, handler: Callable[[str, bytes | None], None]
    ) -> None:
        self._client, self._bucket, self._handler = client, bucket, handler
        self._subscription = _Subscription(client, f"$KV.{bucket}.*", self._change)
        client.watches.append(self)

    def _change(self, message: Message) -> None:
        key = message.subject.rpartition(".")[2]
        self._handler(key, None if message.headers else message.data)

    def replay(self) -> None:
        for key, value in self._client.hub.bucket(self._bucket).items():
            _run(self._handler, key, value)

    async def close(self) -> None:
        if self in self._client.watches:
            self._client.watches.remove(self)
        await self._subscription.close()


class _Puller:
    def __init__(
        self,
        client: MemoryBroker,
        queue: Queue,
        handler: Callable[[base.Delivery], None],
        lapsed: Callable[[], None],
    ) -> None:
        self.client, self.queue = client, queue
        self._handler, self._lapsed = handler, lapsed
        self._closed = False
        self.outstanding = 0

    async def ask(self, n: int) -> None:
        self.client.check()
        if self._closed or n <= 0:
            return
        self.outstanding += n
        self.client.send(self.client.hub.stand, self.queue, Pull(self.client, n, self._hand))

    def _hand(self, lease: Lease) -> None:
        receipt = _Delivery(lease, self.client, self.queue).receipt
        self.client.hub.route(Message(self.client.inbox, b"", None, receipt))
        self.client.hand(self._deliver, lease)

    def _deliver(self, lease: Lease) -> None:
        if not self.client.connected:
            return  # lost on the way: its ack wait runs
        self.outstanding = max(0, self.outstanding - 1)
        if self._closed:
            self.client.hub.nak(self.queue, lease.record.seq)
        else:
            _run(self._handler, _Delivery(lease, self.client, self.queue))

    def lapse(self) -> None:
        """The server knows our pulls no more."""
        self.outstanding = 0
        _run(self._lapsed)

    async def close(self) -> None:
        """Pulls that stand go on to stand, as they do in a real server, and hand back what comes."""
        self._closed = True
        if self in self.client.pullers:
            self.client.pullers.remove(self)


class _Delivery:
    def __init__(self, lease: Lease, client: MemoryBroker, queue: Queue) -> None:
        self.subject, self.data, self.headers = lease.record.subject, lease.record.data, lease.record.headers
        self.seq, self.attempt, self.pending = lease.record.seq, lease.attempt, lease.pending
        self.enqueued_ms = lease.at * 1000
        self.receipt = f"{queue.name}.{lease.record.seq}/{lease.attempt}"
        self._client, self._queue = client, queue

    async def ack(self) -> None:
        self._send(self._client.hub.ack)

    async def nak(self) -> None:
        self._send(self._client.hub.nak)

    async def in_progress(self) -> None:
        self._send(self._client.hub.in_progress)

    def _send(self, verdict: Callable[[Queue, int], None]) -> None:
        self._client.send(verdict, self._queue, self.seq)


class MemoryBroker(base.Broker):
    """One client. `client()` makes further ones of the same fleet.

    `clock` gives unix time in seconds: dedup window, ack wait and ages are measured by it.
    """

    def __init__(
        self,
        config: BrokerConfig | None = None,
        clock: Callable[[], float] = time.time,
        max_payload: int = 2**20,
        hub: Hub | None = None,
    ) -> None:
        super().__init__()
        self.hub = hub or Hub(config or BrokerConfig(), clock, max_payload)
        self.subscriptions: list[_Subscription] = []
        self.pullers: list[_Puller] = []
        self.watches: list[_Watch] = []
        self._held: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._ack_numbers = itertools.count()
        self._connected = True
        self._closed = False

    # For tests

    def client(self) -> MemoryBroker:
        """Another connection to the same broker."""
        return MemoryBroker(hub=self.hub)

    def expire(self) -> None:
        """Redeliver what was delivered to anyone and whose ack wait is over by the clock."""
        self.hub.expire()

    def disconnect(self) -> None:
        """Lose the connection: what others publish is missed, standing pulls are forgotten."""
        self._connected = False
        self.hub.hang_up(self)

    def reconnect(self) -> None:
        """Find it again: what was published meanwhile goes out, watches catch up, pulls lapse."""
        self._connected = True
        self.reconnected()
        while self._held:
            action, arguments = self._held.popleft()
            action(*arguments)
        for watch in list(self.watches):
            watch.replay()
        for puller in list(self.pullers):
            puller.lapse()

    # The contract

    @property
    def ack_wait(self) -> float:
        return self.hub.config.ack_wait

    @property
    def connected(self) -> bool:
        return self._connected and not self._closed

    def now_ms(self) -> float:
        return self.hub.clock() * 1000

    @property
    def max_payload(self) -> int:
        return self.hub.max_payload

    def check(self) -> None:
        if not self.connected:
            raise errors.Unavailable("the broker can't be reached")

    def send(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do what needs no answer; while the connection is down it waits, as in a client's buffer."""
        if self._closed:
            self.check()
        elif self._connected:
            action(*arguments)
        else:
            self._held.append((action, arguments))

    def hand(self, take: Callable[..., object], *arguments: Any) -> None:
        """Let a handler have what comes in: as `send` is for what goes out."""
        asyncio.get_running_loop().call_soon(take, *arguments)

    def _fits(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> None:
        if size_of(subject, data, headers) - len(subject) > self.hub.max_payload:
            raise errors.TooLarge("the message is larger than the broker takes")

    async def publish(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        self._fits(subject, data, headers)
        self.send(self.hub.publish, Message(subject, data, headers, reply))

    def heard(self, subject: str, data: bytes) -> None:
        return  # this journal lacks nothing

    async def sync(self) -> None:
        self.check()

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> base.Subscription:
        if self._closed:
            self.check()
        return _Subscription(self, subject, handler)

    async def ask(self, subject: str, data: bytes = b"", timeout: float = 2.0) -> bytes:
        if not await self.listens(subject):
            raise errors.Unavailable(f"nobody listens to {subject}")
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def on_answer(message: Message) -> None:
            if not answered.done():
                answered.set_result(message.data)

        inbox = f"{self.inbox}.{uuid.uuid4().hex}"
        subscription = await self.subscribe(inbox, on_answer)
        try:
            await self.publish(subject, data, reply=inbox)
            return await asyncio.wait_for(answered, timeout)
        except TimeoutError:
            raise errors.Unavailable(f"nobody answered on {subject}") from None
        finally:
            await subscription.close()

    async def listens(self, subject: str) -> bool:
        self.check()
        return any(matches(listener.subject, subject) for listener in self.hub.listeners)

    @property
    def inbox(self) -> str:
        return f"_INBOX.{id(self)}"

    async def enqueue(
        self, subject: str, data: bytes, headers: dict[str, str] | None = None
    ) -> asyncio.Future[Stored]:
        self.check()
        self._fits(subject, data, headers)
        loop = asyncio.get_running_loop()
        ack: asyncio.Future[Stored] = loop.create_future()
        name = f"{self.inbox}.{next(self._ack_numbers)}"
        late = errors.Unconfirmed("the broker did not say whether it accepted")
        timer = loop.call_later(2 * self.hub.config.timeout, _settle, ack, late)
        ack.add_done_callback(functools.partial(_answered, timer))
        self.hub.acks[name] = functools.partial(self.hand, _settle, ack)
        await self.publish(subject, data, headers, name)
        return ack

    async def pull(
        self,
        base_model: str,
        service_class: ServiceClass,
        handler: Callable[[base.Delivery], None],
        lapsed: Callable[[], None],
    ) -> base.Puller:
        self.check()
        puller = _Puller(self, self.hub.queue(base_model, service_class), handler, lapsed)
        self.pullers.append(puller)
        return puller

    async def hand_on(self, receipt: str) -> None:
        self.check()
        self._give_back(receipt)

    async def prolong(self, receipt: str) -> None:
        self.check()
        queue, seq, _ = self._named(receipt)
        self.hub.in_progress(queue, seq)

    async def hand_back(self, delivery: base.Delivery, delay: float) -> None:
        self.check()
        asyncio.get_running_loop().call_later(delay, self._give_back, delivery.receipt)

    def _give_back(self, receipt: str) -> None:
        queue, seq, _ = self._named(receipt)
        self.hub.nak(queue, seq)

    def _named(self, receipt: str) -> tuple[Queue, int, int]:
        """Queue, sequence and attempt of a delivery."""
        consumer, _, place = receipt.rpartition(".")
        seq, _, attempt = place.partition("/")
        if consumer not in self.hub.queues or not (seq.isdecimal() and attempt.isdecimal()):
            raise errors.MalformedMessage(f"{receipt!r:.200} names no delivery")
        return self.hub.queues[consumer], int(seq), int(attempt)

    def delivery(self, message: Message) -> _Delivery:
        queue, seq, attempt = self._named(message.reply)
        entry = self.hub.streams[subjects.REQUESTS].entries.get(seq)
        record = Record(seq, message.subject, message.data, message.headers)
        return _Delivery(Lease(record, attempt, 0, entry.at if entry else 0.0), self, queue)

    async def delivered(self, base_model: str, service_class: ServiceClass) -> dict[int, str]:
        self.check()
        queue = self.hub.queue(base_model, service_class)
        return {seq: f"{queue.name}.{seq}/0" for seq in sorted([*queue.unacked, *queue.again])}

    async def bounce(self, inbox: str) -> base.Subscription:
        if not inbox.startswith("_INBOX.") or set(inbox) & set("*> "):
            raise errors.MalformedMessage(f"{inbox!r:.200} is no inbox")
        return await self.subscribe(inbox, self._hand_back)

    def _hand_back(self, message: Message) -> None:
        self._give_back(message.reply)

    async def delete(self, stream: str, seq: int) -> bool:
        self.check()
        return self.hub.remove(stream, seq)

    async def purge(self, stream: str, subject: str) -> None:
        self.check()
        for record in self.hub.stream(stream).select(subject):
            self.hub.remove(stream, record.seq)

    async def read(self, stream: str, subject: str, start: int = 1, limit: int = 1000) -> list[Record]:
        self.check()
        found = self.hub.stream(stream).select(subject)
        return [record for record in found if record.seq >= start][:limit]

    async def last(self, stream: str, subject: str, *, leader: bool = False) -> Record | None:
        self.check()
        return next(reversed(self.hub.stream(stream).select(subject)), None)

    async def record(self, stream: str, seq: int) -> Record | None:
        self.check()
        entry = self.hub.stream(stream).entries.get(seq)
        return None if entry is None else entry.record

    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        self.check()
        return dict(Counter(record.subject for record in self.hub.stream(stream).select(subject)))

    async def put(self, bucket: str, key: str, value: bytes) -> None:
        self.check()
        self.hub.put(bucket, key, value)

    async def get(self, bucket: str, key: str) -> base.Value:
        self.check()
        return base.Value(self.hub.bucket(bucket).get(key), self.hub.revisions.get((bucket, key), 0))

    async def swap(self, bucket: str, key: str, value: bytes, expected: int) -> int | None:
        if (await self.get(bucket, key)).revision != expected:
            return None
        return self.hub.put(bucket, key, value)

    async def remove(self, bucket: str, key: str) -> None:
        self.check()
        self.hub.put(bucket, key, None)

    async def watch(self, bucket: str, handler: Callable[[str, bytes | None], None]) -> base.Subscription:
        self.check()
        self.hub.bucket(bucket)
        watch = _Watch(self, bucket, handler)
        watch.replay()
        return watch

    async def close(self) -> None:
        self._closed = True
        self._held.clear()
        for subscription in list(self.subscriptions):
            await subscription.close()
        self.hub.hang_up(self)


def _answered(timer: asyncio.TimerHandle, ack: asyncio.Future[Stored]) -> None:
    timer.cancel()
    _ = ack.cancelled() or ack.exception()  # else asyncio logs it where nobody waits any more


def _settle(future: asyncio.Future[T], outcome: T | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
