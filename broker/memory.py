"""The fake broker: what `client.NatsBroker` promises, inside one process and one event loop.

Time is the given clock's alone, so nothing here waits: a test that wants the ack wait over moves the
clock and calls `expire`. Handlers run from the event loop, never from inside the call that caused them,
as with a real connection.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker import base, errors, subjects
from broker.base import Delivery, Message, Record, Stored
from broker.config import BrokerConfig
from broker.messages import ServiceClass

log = logging.getLogger(__name__)


def matches(pattern: str, subject: str) -> bool:
    """NATS subject matching: `*` stands for one token, a last `>` for one or more."""
    want, have = pattern.split("."), subject.split(".")
    for place, tok in enumerate(want):
        if tok == ">":
            return len(have) > place
        if place >= len(have) or tok not in ("*", have[place]):
            return False
    return len(want) == len(have)


def _size(subject: str, data: bytes, headers: Mapping[str, str] | None) -> int:
    head = sum(len(key) + len(value) + 4 for key, value in headers.items()) + 12 if headers else 0
    return len(subject) + len(data) + head


def _run(handler: Callable[..., None], *args: object) -> None:
    try:
        handler(*args)
    except Exception:
        log.exception("a handler failed")


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
        size = _size(subject, data, headers)
        while self.entries and (len(self.entries) >= self._count or self._bytes + size > self._size):
            if self._refuses:
                raise errors.Overloaded("the request queue is full")
            self.remove(next(iter(self.entries)))
        self._last += 1
        self._bytes += size
        self.entries[self._last] = _Entry(Record(self._last, subject, data, headers), now, size)
        if msg_id:
            self._ids[msg_id] = (self._last, now)
        return Stored(self._last, False)

    def remove(self, seq: int) -> bool:
        entry = self.entries.pop(seq, None)
        if entry:
            self._bytes -= entry.size
        return entry is not None

    def age(self, now: float) -> None:
        """Forget messages and dedup ids that are too old."""
        while self.entries and now - (first := next(iter(self.entries.values()))).at > self._age:
            self.remove(first.record.seq)
        while self._ids and now - self._ids[first_id := next(iter(self._ids))][1] > self._window:
            del self._ids[first_id]

    def select(self, pattern: str) -> list[Record]:
        return [entry.record for entry in self.entries.values() if matches(pattern, entry.record.subject)]


@dataclass(slots=True)
class _Queue:
    """A consumer of REQUESTS. `fresh` and `again` are ordered sets of sequences."""

    subject: str
    fresh: dict[int, None]
    again: dict[int, None] = field(default_factory=dict)
    unacked: dict[int, float] = field(default_factory=dict)  # seq -> when its ack wait ends
    attempts: dict[int, int] = field(default_factory=dict)
    pulls: deque[_Puller] = field(default_factory=deque)  # one entry for each message asked for

    def forget(self, seq: int) -> None:
        for place in (self.fresh, self.again, self.unacked, self.attempts):
            place.pop(seq, None)

    def give_back(self, seq: int) -> None:
        if self.unacked.pop(seq, None) is not None:
            self.again[seq] = None


class _Hub:
    """What the clients of one fleet share: the server."""

    def __init__(self, config: BrokerConfig, clock: Callable[[], float], max_payload: int) -> None:
        self.config, self.clock, self.max_payload = config, clock, max_payload
        self.subscriptions: list[_Subscription] = []
        self.watches: dict[str, list[_Subscription]] = {}
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.queues: dict[str, _Queue] = {}
        self.inboxes = itertools.count()
        window, forever = config.dedup_window, math.inf
        self.streams = {
            subjects.REQUESTS: _Stream(
                subjects.ALL_REQUESTS,
                count=config.max_queued,
                size=config.max_queued_bytes,
                age=forever,
                window=window,
                refuses=True,
            )
        }
        for name, subject, size, age in (
            (subjects.REPLIES, subjects.ALL_REPLIES, config.journal_bytes, config.journal_age),
            (subjects.USAGE, subjects.ALL_USAGE, config.usage_bytes, config.usage_age),
            (subjects.DEAD, subjects.ALL_DEAD, config.dead_bytes, config.dead_age),
        ):
            self.streams[name] = _Stream(
                subject, count=forever, size=size, age=age, window=window, refuses=False
            )

    def stream(self, name: str) -> _Stream:
        stream = self.streams[name]
        stream.age(self.clock())
        return stream

    def route(self, message: Message) -> int:
        """Hand a message to its subscribers; how many there are."""
        takers = [sub for sub in self.subscriptions if matches(sub.subject, message.subject)]
        for taker in takers:
            taker.hand(message)
        return len(takers)

    def store(self, subject: str, data: bytes, headers: Mapping[str, str] | None) -> Stored | None:
        """None where no stream listens to `subject`."""
        for name, stream in self.streams.items():
            if matches(stream.subject, subject):
                stored = stream.add(self.clock(), subject, data, headers)
                if name == subjects.REQUESTS and not stored.duplicate:
                    self._line_up(stored.seq, subject)
                return stored
        return None

    def _line_up(self, seq: int, subject: str) -> None:
        for queue in self.queues.values():
            if matches(queue.subject, subject):
                queue.fresh[seq] = None
                self.pump(queue)

    def queue(self, base_name: str, service_class: str) -> _Queue:
        name = subjects.consumer(base_name, service_class)
        if name not in self.queues:
            pattern = subjects.request_filter(base_name, service_class)
            waiting = self.streams[subjects.REQUESTS].select(pattern)
            self.queues[name] = _Queue(pattern, {record.seq: None for record in waiting})
        return self.queues[name]

    def pump(self, queue: _Queue) -> None:
        """Match what waits with who asked: redeliveries first, pullers in turn."""
        requests = self.streams[subjects.REQUESTS].entries
        while queue.pulls and (queue.again or queue.fresh):
            source = queue.again or queue.fresh
            seq = next(iter(source))
            del source[seq]
            queue.unacked[seq] = self.clock() + self.config.ack_wait
            queue.attempts[seq] = queue.attempts.get(seq, 0) + 1
            entry = requests[seq]
            queue.pulls.popleft().hand(
                _Delivery(
                    subject=entry.record.subject,
                    headers=entry.record.headers,
                    data=entry.record.data,
                    seq=seq,
                    attempt=queue.attempts[seq],
                    pending=len(queue.fresh),
                    enqueued_ms=entry.at * 1000,
                    hub=self,
                    queue=queue,
                )
            )

    def remove(self, stream: str, seq: int) -> bool:
        if stream == subjects.REQUESTS:
            for queue in self.queues.values():
                queue.forget(seq)
        return self.streams[stream].remove(seq)

    def expire(self) -> None:
        for queue in self.queues.values():
            for seq in [seq for seq, end in queue.unacked.items() if end <= self.clock()]:
                queue.give_back(seq)
            self.pump(queue)
