"""Which adapter's requests may start now: an engine step holds a bounded number of adapters. Pure.

An engine that is given more lets some wait among its own, in no order that we know, while it counts them as
taken. So here none starts beyond the slots. First come, first served for each adapter, and a slot that falls
free goes to the adapter whose request waits longest. An adapter that has been active for a turn while others
wait takes no more: it runs out, and another has its slot. So nobody starves: before a request's adapter has
its turn come those only of which an older request waits.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

TURN = 2.0
"""Seconds for which an adapter stays active at least, if it has requests, whoever waits."""

T = TypeVar("T")


@dataclass(slots=True)
class _Active:
    """An adapter of which requests run. `since`: when the first of them started."""

    since: float
    running: int = 0


@dataclass(slots=True)
class Slots(Generic[T]):
    """Times are in seconds on any one clock. `swaps` counts the adapters that made room for another."""

    count: int
    turn: float = TURN
    swaps: int = 0
    _active: dict[str, _Active] = field(default_factory=dict)  # the longest active first
    _waiting: dict[str, deque[tuple[float, T]]] = field(default_factory=dict)  # the longest waiting first
    _resident: OrderedDict[str, None] = field(default_factory=OrderedDict)  # least recently started first

    @property
    def used(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def running(self, model: str) -> int:
        return self._active[model].running if model in self._active else 0

    def enter(self, model: str, ticket: T, now: float) -> None:
        """A request of `model` wants to start; `start` says when it may."""
        self._waiting.setdefault(model, deque()).append((now, ticket))

    def give_up(self, model: str, ticket: T) -> None:
        """A request that waits does not want any more. Follow it by `start`."""
        queue = self._waiting[model]
        queue.remove(next(entry for entry in queue if entry[1] is ticket))
        self._drop_empty(model)

    def leave(self, model: str) -> None:
        """A request that had started has ended. Follow it by `start`."""
        active = self._active[model]
        active.running -= 1
        if not active.running:
            del self._active[model]

    def forget(self, model: str) -> None:
        """It was unloaded, and its slot is empty."""
        self._resident.pop(model, None)

    def start(self, now: float) -> list[T]:
        """Take those that may start from the waiting, in their order; each counts as running from now on."""
        started: list[T] = []
        while len(self._active) < self.count and (model := self._next()) is not None:
            started += self._take(model, now)
        closed = self._closed(now)
        for active in list(self._active):
            if active in self._waiting and active not in closed:
                started += self._take(active, now)
        return started

    def _next(self) -> str | None:
        """The adapter without a slot whose request waits longest."""
        waiting = {m: queue[0][0] for m, queue in self._waiting.items() if m not in self._active}
        return min(waiting, key=waiting.__getitem__) if waiting else None

    def _closed(self, now: float) -> set[str]:
        """Active adapters that take no more: for each adapter that waits without a slot the longest active
        one, and one more for each turn that it has waited."""
        waits = [now - queue[0][0] for m, queue in self._waiting.items() if m not in self._active]
        due = sum(1 + int(wait / self.turn) for wait in waits)
        past = [model for model, active in self._active.items() if now - active.since >= self.turn]
        return set(past[:due])

    def _take(self, model: str, now: float) -> list[T]:
        queue = self._waiting.pop(model)
        active = self._active.setdefault(model, _Active(since=now))
        active.running += len(queue)
        if model not in self._resident and len(self._resident) >= self.count:
            self._resident.pop(next(idle for idle in self._resident if idle not in self._active))
            self.swaps += 1
        self._resident[model] = None
        self._resident.move_to_end(model)
        return [ticket for _, ticket in queue]

    def _drop_empty(self, model: str) -> None:
        if not self._waiting[model]:
            del self._waiting[model]
