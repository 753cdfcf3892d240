"""The server behind `memory.MemoryBroker`: streams, queues and buckets, without I/O or time of its own."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from broker import errors, subjects
from broker.base import Message, Record, Stored
from broker.config import BrokerConfig


def matches(pattern: str, subject: str) -> bool:
    """NATS subject matching: `*` stands for one token, a last `>` for one or more."""
    want, have = pattern.split("."), subject.split(".")
    for place, tok in enumerate(want):
        if tok == ">":
            return len(have) > place
        if place >= len(have) or tok not in ("*", have[place]):
            return False
    return len(want) == len(have)


def size_of(subject: str, data: bytes, headers: Mapping[str, str] | None) -> int:
    head = sum(len(key) + len(value) + 4 for key, value in headers.items()) + 12 if headers else 0
    return len(subject) + len(data) + head


@dataclass(frozen=True, slots=True)
class _Entry:
    record: Record
    at: float
    size: int


class _Stream:
    """Messages in order of arrival. One too many is refused, or pushes out the oldest."""

    def __init__(
        self, subject: str, *, count: float, size: int, age: float, window: float, refuses: bool
    ) -> None:
        self.subject = subject
        self.entries: dict[int, _Entry] = {}
        self._seqs: dict[str, dict[int, None]] = {}  # by subject, in order
        self._count, self._size, self._age, self._window = count, size, age, window
        self._refuses = refuses
        self._bytes = 0
        self._last = 0
        self._ids: dict[str, tuple[int, float]] = {}

    def add(self, now: float, subject: str, data: bytes, headers: Mapping[str, str] | None) -> Stored:
        """Raises errors.Overloaded when full and not allowed to forget."""
        self.age(now)
        msg_id = (headers or {}).get(subjects.MSG_ID)
        if msg_id in self._ids:
            return Stored(self._ids[msg_id][0], True)
        size = size_of(subject, data, headers)
        while self.entries and (len(self.entries) >= self._count or self._bytes + size > self._size):
            if self._refuses:
                raise errors.Overloaded("the stream is full")
            self.remove(next(iter(self.entries)))
        self._last += 1
        self._bytes += size
        self.entries[self._last] = _Entry(Record(self._last, subject, data, headers, now * 1000), now, size)
        self._seqs.setdefault(subject, {})[self._last] = None
        if msg_id:
            self._ids[msg_id] = (self._last, now)
        return Stored(self._last, False)

    def remove(self, seq: int) -> bool:
        entry = self.entries.pop(seq, None)
        if entry:
            self._bytes -= entry.size
            of_subject = self._seqs[entry.record.subject]
            del of_subject[seq]
            if not of_subject:
                del self._seqs[entry.record.subject]
        return entry is not None

    def age(self, now: float) -> None:
        """Forget messages and dedup ids that are too old."""
        while self.entries and now - (first := next(iter(self.entries.values()))).at > self._age:
            self.remove(first.record.seq)
        while self._ids and now - self._ids[first_id := next(iter(self._ids))][1] > self._window:
            del self._ids[first_id]

    def select(self, pattern: str) -> list[Record]:
        if "*" in pattern or ">" in pattern:
            found = sorted(
                seq for subject, of in self._seqs.items() if matches(pattern, subject) for seq in of
            )
        else:
            found = list(self._seqs.get(pattern, ()))
        return [self.entries[seq].record for seq in found]


class Lease(NamedTuple):
    """One message handed out; `at` is when the stream stored it, unix time in seconds."""

    record: Record
    attempt: int
    pending: int
    at: float


class Listener(Protocol):
    subject: str

    def hand(self, message: Message) -> None: ...


@dataclass(slots=True)
class Pull:
    """One standing pull request, for `left` more messages. `client` tells whose it is."""

    client: object
    left: int
    hand: Callable[[Lease], None]


@dataclass(slots=True)
class Queue:
    """A consumer of REQUESTS. `fresh` and `again` are ordered sets of sequences."""

    name: str
    subject: str
    fresh: dict[int, None]
    again: dict[int, None] = field(default_factory=dict)
    unacked: dict[int, float] = field(default_factory=dict)  # seq -> when its ack wait ends
    attempts: dict[int, int] = field(default_factory=dict)
    pulls: deque[Pull] = field(default_factory=deque)

    def forget(self, seq: int) -> None:
        for place in (self.fresh, self.again, self.unacked, self.attempts):
            place.pop(seq, None)

    def give_back(self, seq: int) -> None:
        if self.unacked.pop(seq, None) is not None:
            self.again[seq] = None


class Hub:
    """What the clients of one fleet share: the server."""

    def __init__(self, config: BrokerConfig, clock: Callable[[], float], max_payload: int) -> None:
        self.config, self.clock, self.max_payload = config, clock, max_payload
        self.listeners: list[Listener] = []
        buckets = (
            subjects.KV_MODELS,
            subjects.KV_LEASES,
            subjects.KV_CATALOGUE,
            subjects.KV_PLACEMENT,
            subjects.KV_ROUTES,
        )
        self.buckets: dict[str, dict[str, bytes]] = {bucket: {} for bucket in buckets}
        self.revisions: dict[tuple[str, str], int] = {}  # of the keys that were removed, too
        self._changes = itertools.count(1)
        self.queues: dict[str, Queue] = {}
        self.acks: dict[str, Callable[[Stored | Exception], None]] = {}  # by the reply subject they go to
        window, forever = config.dedup_window, math.inf
        self.streams: dict[str, _Stream] = {}
        payloads, artifacts = subjects.PAYLOADS, subjects.ARTIFACTS
        for name, subject, count, size, age in (
            (subjects.REQUESTS, subjects.ALL_REQUESTS, config.max_queued, config.max_queued_bytes, forever),
            (
                subjects.objects(payloads),
                subjects.all_objects(payloads),
                forever,
                config.payload_bytes,
                config.payload_age,
            ),
            (
                subjects.objects(artifacts),
                subjects.all_objects(artifacts),
                forever,
                config.artifact_bytes,
                forever,
            ),
        ):
            self.streams[name] = _Stream(
                subject, count=count, size=size, age=age, window=window, refuses=True
            )
        for name, subject, size, age in (
            (subjects.REPLIES, subjects.ALL_REPLIES, config.journal_bytes, config.journal_age),
            (subjects.USAGE, subjects.ALL_USAGE, config.usage_bytes, config.usage_age),
            (subjects.DEAD, subjects.ALL_DEAD, config.dead_bytes, config.dead_age),
        ):
            self.streams[name] = _Stream(
                subject, count=forever, size=size, age=age, window=window, refuses=False
            )

    def stream(self, name: str) -> _Stream:
        if name not in self.streams:
            raise errors.Unavailable(f"there is no stream {name}")
        stream = self.streams[name]
        stream.age(self.clock())
        return stream

    def route(self, message: Message) -> None:
        """Hand a message to its subscribers."""
        for taker in [sub for sub in self.listeners if matches(sub.subject, message.subject)]:
            taker.hand(message)

    def store(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> Stored | None:
        """None where no stream listens to `subject`."""
        for name, stream in self.streams.items():
            if matches(stream.subject, subject):
                stored = stream.add(self.clock(), subject, data, headers)
                if name == subjects.REQUESTS and not stored.duplicate:
                    self._line_up(stored.seq, subject)
                return stored
        return None

    def publish(self, message: Message) -> None:
        """A full stream loses it, and nobody is told but who waits for its acknowledgement."""
        self.keep(message)
        self.route(message)

    def keep(self, message: Message) -> None:
        """Store it where a stream listens, and tell who wants to know."""
        outcome: Stored | Exception | None
        try:
            outcome = self.store(message.subject, message.data, message.headers)
        except errors.Overloaded as exc:
            outcome = exc
        if message.reply in self.acks:
            self.acks.pop(message.reply)(outcome or errors.Unavailable(f"no stream takes {message.subject}"))

    def bucket(self, name: str) -> dict[str, bytes]:
        if name not in self.buckets:
            raise errors.Unavailable(f"there is no bucket {name}")
        return self.buckets[name]

    def put(self, name: str, key: str, value: bytes | None) -> int:
        """The new revision."""
        bucket = self.bucket(name)
        if value is None:
            bucket.pop(key, None)
        else:
            bucket[key] = value
        self.revisions[name, key] = revision = next(self._changes)
        head = {"KV-Operation": "DEL"} if value is None else None
        self.route(Message(f"$KV.{name}.{key}", value or b"", head))
        return revision

    def _line_up(self, seq: int, subject: str) -> None:
        for queue in self.queues.values():
            if matches(queue.subject, subject):
                queue.fresh[seq] = None
                self.pump(queue)

    def queue(self, base_name: str, service_class: str) -> Queue:
        name = subjects.consumer(base_name, service_class)
        if name not in self.queues:
            pattern = subjects.request_filter(base_name, service_class)
            waiting = self.streams[subjects.REQUESTS].select(pattern)
            self.queues[name] = Queue(name, pattern, {record.seq: None for record in waiting})
        return self.queues[name]

    def stand(self, queue: Queue, pull: Pull) -> None:
        queue.pulls.append(pull)
        self.pump(queue)

    def pump(self, queue: Queue) -> None:
        """Match what waits with who asked: redeliveries first, pullers in turn."""
        requests = self.streams[subjects.REQUESTS].entries
        while queue.pulls and (queue.again or queue.fresh):
            source = queue.again or queue.fresh
            seq = next(iter(source))
            del source[seq]
            queue.unacked[seq] = self.clock() + self.config.ack_wait
            queue.attempts[seq] = queue.attempts.get(seq, 0) + 1
            pull = queue.pulls.popleft()
            pull.left -= 1
            if pull.left:
                queue.pulls.append(pull)
            entry = requests[seq]
            pull.hand(Lease(entry.record, queue.attempts[seq], len(queue.fresh), entry.at))

    def hang_up(self, client: object) -> None:
        """A connection is gone, and its standing pulls with it."""
        for queue in self.queues.values():
            queue.pulls = deque(pull for pull in queue.pulls if pull.client is not client)

    def ack(self, queue: Queue, seq: int) -> None:
        self.remove(subjects.REQUESTS, seq)

    def nak(self, queue: Queue, seq: int) -> None:
        """Whichever delivery it is for: as in a real server, the message goes out again."""
        queue.give_back(seq)
        self.pump(queue)

    def in_progress(self, queue: Queue, seq: int) -> None:
        if seq in queue.unacked:
            queue.unacked[seq] = self.clock() + self.config.ack_wait

    def remove(self, name: str, seq: int) -> bool:
        if name == subjects.REQUESTS:
            for queue in self.queues.values():
                queue.forget(seq)
        return self.stream(name).remove(seq)

    def expire(self) -> None:
        for queue in self.queues.values():
            for seq in [seq for seq, end in queue.unacked.items() if end <= self.clock()]:
                queue.give_back(seq)
            self.pump(queue)
