"""The transport seam: what Headrace needs of a broker.

`client.NatsBroker` is the real side, `memory.MemoryBroker` the fake; `tests/contract/test_broker.py`
runs over both. Handlers are plain functions: they run on the event loop, must not block, and what
they raise is logged, never lost silently. Every method raises `errors.Unavailable` when the broker
can't be reached in time.
"""

from __future__ import annotations

import abc
import asyncio
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from broker import errors, subjects
from broker.messages import ServiceClass


class Message(NamedTuple):
    """A core message. `reply` is "" where no answer is wanted."""

    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None
    reply: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A message as a stream stores it: `seq` counts from 1 in its stream, `stored_ms` is unix time."""

    seq: int
    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None
    stored_ms: float = 0.0


class Stored(NamedTuple):
    """A publish acknowledgement. `duplicate`: the dedup id was known, `seq` is the first one's."""

    seq: int
    duplicate: bool


class Value(NamedTuple):
    """A key of a bucket. `data` is None where it was removed; `revision` 0 = it never was."""

    data: bytes | None
    revision: int


class Delivery(Protocol):
    """One queued message in a worker's hands, until `ack`, `nak` or the ack wait ends that.

    Attributes:
        seq: its sequence in REQUESTS.
        attempt: deliveries so far, from 1: the epoch of the frames this run may publish.
        pending: messages behind it in the same queue when it was delivered.
        enqueued_ms: unix time in ms at which the stream stored it.
        receipt: what names this delivery to a third party, see `Broker.hand_on`.
    """

    @property
    def subject(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str] | None: ...
    @property
    def data(self) -> bytes: ...
    @property
    def seq(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def enqueued_ms(self) -> float: ...
    @property
    def receipt(self) -> str: ...

    async def ack(self) -> None: ...
    async def nak(self) -> None: ...
    async def in_progress(self) -> None: ...


class Parcel(NamedTuple):
    """A delivery as one process passes it on to another. `data` None: it is read from the queue there."""

    subject: str
    headers: Mapping[str, str]
    data: bytes | None
    receipt: str


class Puller(Protocol):
    """Standing pulls on one (base, class) queue.

    Attributes:
        outstanding: messages asked for that have neither come nor been given up by the server.
    """

    @property
    def outstanding(self) -> int: ...

    async def ask(self, n: int) -> None:
        """One more pull request, for `n` messages; each is delivered as it comes, no batch barrier."""
        ...

    async def close(self) -> None:
        """Stop taking; what is still delivered goes back by NAK. Idempotent."""
        ...


class Subscription(Protocol):
    async def close(self) -> None: ...


class Broker(abc.ABC):
    """An async context manager; `close` is idempotent."""

    def __init__(self) -> None:
        self._reconnect_handlers: list[Callable[[], None]] = []
        self.disturbed = -math.inf
        """Loop time at which messages were last lost on their way, as far as is known."""

    @property
    @abc.abstractmethod
    def connected(self) -> bool: ...

    @property
    @abc.abstractmethod
    def max_payload(self) -> int:
        """Largest message in bytes, headers included."""

    @property
    @abc.abstractmethod
    def ack_wait(self) -> float:
        """Seconds that a delivery may go without `in_progress` before another worker gets it."""

    @property
    @abc.abstractmethod
    def inbox(self) -> str:
        """Where what this client pulls is delivered; names its pulls to a third party, see `bounce`."""

    @abc.abstractmethod
    def now_ms(self) -> float:
        """Unix time in ms by the broker's clock, which messages are stamped with: all its clients tell
        deadlines and ages by that one. Until the broker has told it, by this machine's."""

    @abc.abstractmethod
    async def publish(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        """Core publish: no acknowledgement; subjects of a stream are captured by it."""

    @abc.abstractmethod
    def heard(self, subject: str, data: bytes) -> None:
        """Keep a reply frame that another process published, to publish it again when somebody asks on
        `again.<tenant>.<request>`: who wrote it may be gone, and the journal may lack it."""

    @abc.abstractmethod
    async def sync(self) -> None:
        """One round trip: what the broker sent here before it answered has been handled."""

    @abc.abstractmethod
    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> Subscription: ...

    @abc.abstractmethod
    async def ask(self, subject: str, data: bytes = b"", timeout: float = 2.0) -> bytes:
        """A core message and the first answer to it: who hears it publishes to `Message.reply`.

        Raises errors.Unavailable where nobody listens (at once) or nobody answers within `timeout` seconds.
        """

    @abc.abstractmethod
    async def listens(self, subject: str) -> bool:
        """Whether any client listens to `subject`, one that hangs included; it may be sent an empty message.
        No is known at once, yes after some 50 ms."""

    @abc.abstractmethod
    async def enqueue(
        self, subject: str, data: bytes, headers: dict[str, str] | None = None
    ) -> asyncio.Future[Stored]:
        """Publish into a durable stream now; the future is the stream's acknowledgement.

        The future raises errors.Overloaded when the stream is full, errors.Unavailable when no
        stream answers, errors.Unconfirmed when the answer is lost or late. Nothing is retried: a
        repeat is safe under the same `Nats-Msg-Id`.
        """

    @abc.abstractmethod
    async def pull(
        self,
        base: str,
        service_class: ServiceClass,
        handler: Callable[[Delivery], None],
        lapsed: Callable[[], None],
    ) -> Puller:
        """Open one queue, making its consumer where there is none. Nothing is asked for yet.

        `lapsed` is called when `outstanding` fell without a delivery: the server gave a pull up.
        """

    @abc.abstractmethod
    async def hand_on(self, receipt: str) -> None:
        """NAK a delivery in its holder's stead: the next pull gets the message at once.

        Only who knows that nobody runs the message may do it. A receipt names the message, whoever has
        it now: nats-server 2.15.1 takes an earlier delivery's for the newest one's, and a NAK by it
        redelivers a message that runs. One whose message was acked changes nothing.

        Raises errors.MalformedMessage when `receipt` is none.
        """

    @abc.abstractmethod
    async def prolong(self, receipt: str) -> None:
        """`in_progress` in the stead of who has the delivery. Raises as `hand_on`."""

    async def relay(self, to: str, parcel: Parcel, note: str) -> None:
        """Pass a delivery on to whoever listens to subject `to`, with a `note` for it. Nobody tells whether
        it got there. A body that is not in the parcel, or finds no room beside its headers, is read from the
        queue over there."""
        # Not as the reply subject: a server lets nobody but itself publish with an ack subject there.
        head = {**parcel.headers, subjects.SUBJECT: parcel.subject, subjects.RECEIPT: parcel.receipt}
        head[subjects.SENT] = note
        if parcel.data is not None:
            try:
                await self.publish(to, parcel.data, head)
            except errors.TooLarge:
                pass
            else:
                return
        await self.publish(to, b"", head | {subjects.STORED: "1"})

    async def relayed(self, message: Message) -> Delivery | None:
        """The delivery that a `relay` passed on; None when the queue has it no more.

        Raises errors.MalformedMessage for what is none.
        """
        head = message.headers or {}
        subject, receipt = head.get(subjects.SUBJECT, ""), head.get(subjects.RECEIPT, "")
        own = {name: value for name, value in head.items() if name not in subjects.RELAYED}
        delivery = self.delivery(Message(subject, message.data, own, receipt))
        if subjects.STORED in head:
            record = await self.record(subjects.REQUESTS, delivery.seq)
            if record is None:
                return None
            delivery = self.delivery(Message(subject, record.data, own, receipt))
        return delivery

    @abc.abstractmethod
    def delivery(self, message: Message) -> Delivery:
        """One of our own, of a message of REQUESTS whose `reply` is its receipt.

        Raises errors.MalformedMessage when that is none.
        """

    @abc.abstractmethod
    async def hand_back(self, delivery: Delivery, delay: float) -> None:
        """NAK a delivery of our own: the message comes again after `delay` seconds, others before it."""

    @abc.abstractmethod
    async def delivered(self, base: str, service_class: ServiceClass) -> dict[int, str]:
        """Receipts, by sequence, of what was delivered from one queue and not acked, whoever has it."""

    @abc.abstractmethod
    async def bounce(self, inbox: str) -> Subscription:
        """Hand on whatever is still delivered to another client's pulls, of which the broker knows no end
        while that client hangs: it would lie there until its ack wait is over.

        Not for a client that is gone: to listen in its place would keep its pulls standing.
        """

    @abc.abstractmethod
    async def delete(self, stream: str, seq: int) -> bool:
        """Remove one stored message; False when it is no longer there."""

    @abc.abstractmethod
    async def purge(self, stream: str, subject: str) -> None:
        """Remove all stored messages under one subject; none is fine."""

    @abc.abstractmethod
    async def read(self, stream: str, subject: str, start: int = 1, limit: int = 1000) -> list[Record]:
        """Up to `limit` stored messages whose subject matches `subject` (wildcards allowed), from
        sequence `start` on, in order."""

    @abc.abstractmethod
    async def last(self, stream: str, subject: str, *, leader: bool = False) -> Record | None:
        """The newest stored message whose subject matches `subject` (wildcards allowed).

        In a cluster any replica answers, one that lags behind too, unless it shall be the `leader`.
        """

    @abc.abstractmethod
    async def record(self, stream: str, seq: int) -> Record | None:
        """One stored message, as the stream's leader has it; None when it is not, or no longer, there."""

    @abc.abstractmethod
    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        """Messages stored under each subject that matches `subject`."""

    def on_reconnect(self, handler: Callable[[], None]) -> Callable[[], None]:
        """Call `handler` whenever a broken connection is there again, until what this returns is called."""
        self._reconnect_handlers.append(handler)
        return functools.partial(self._reconnect_handlers.remove, handler)

    def reconnected(self) -> None:
        """For who implements a broker: tell those that want to know."""
        self.disturbed = asyncio.get_running_loop().time()
        for handler in list(self._reconnect_handlers):
            handler()

    @abc.abstractmethod
    async def put(self, bucket: str, key: str, value: bytes) -> None:
        """Set `key` (a legal subject token) of a key-value bucket."""

    @abc.abstractmethod
    async def get(self, bucket: str, key: str) -> Value:
        """The newest value, never that of a replica which lags behind."""

    @abc.abstractmethod
    async def swap(self, bucket: str, key: str, value: bytes, expected: int) -> int | None:
        """Set `key` if its revision, as `get` tells it, is still `expected`; the new one, else None.

        After errors.Unavailable it may have been set or not.
        """

    @abc.abstractmethod
    async def remove(self, bucket: str, key: str) -> None: ...

    @abc.abstractmethod
    async def watch(self, bucket: str, handler: Callable[[str, bytes | None], None]) -> Subscription:
        """Call `handler(key, value)` for all there is, before this returns, then for each change;
        None = removed."""

    @abc.abstractmethod
    async def close(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
