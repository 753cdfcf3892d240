"""Who can't be in time, and who must go first to be. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping

from scheduler.dispatch.lanes import Waiting
from scheduler.dispatch.score import Scorer, View
from scheduler.dispatch.ttft import STEPS

SOON = 1e-3
"""Seconds between two looks at a request whose deadline is near."""


RUNG = 8
"""Requests looked at in a call; who queued at once may all be due at once."""


class Deadlines:
    """Looks at each request of `queue` that has one as it comes, once its slack is two steps, and once it has
    none."""

    def __init__(self, queue: Mapping[int, Waiting], scorer: Scorer) -> None:
        self._queue = queue
        self._scorer = scorer
        self._alarms: list[tuple[float, int]] = []  # heap; of keys that may have left the queue

    def refuses(self, waiting: Waiting, view: View, now: float) -> float | None:
        """The wait until its first token where that is too long on the worker that is the best for it; None =
        it may be in time. Others may have shorter lanes, but it would not stay in them."""
        if waiting.item.deadline == math.inf or view.best < 0:
            return None
        waiting.least = self._least(view)
        wait = self.wait(waiting, view)
        return wait if now + wait > waiting.item.deadline else None

    def wait(self, waiting: Waiting, view: View) -> float:
        """Until its first token, if it came now: `waiting` has no place."""
        return float(self._scorer.ttft(view)[view.best]) if view.best >= 0 else waiting.least

    def watch(self, waiting: Waiting, now: float) -> None:
        if waiting.item.deadline == math.inf:
            return
        heapq.heappush(self._alarms, (self._next(waiting, now), waiting.item.key))
        if len(self._alarms) > 2 * len(self._queue) + 64:
            first = {key: at for at, key in sorted(self._alarms, reverse=True) if key in self._queue}
            self._alarms = [(at, key) for key, at in first.items()]
            heapq.heapify(self._alarms)

    def due(self) -> float:
        """When to `ring` again; inf = never, as things are."""
        while self._alarms and self._alarms[0][1] not in self._queue:
            heapq.heappop(self._alarms)
        return self._alarms[0][0] if self._alarms else math.inf

    def ring(self, now: float) -> Iterator[tuple[Waiting, bool]]:
        """Some of those whose time is up: True = each is too late, False = it must go first.

        Whoever is above his share has no claim to go before others.
        """
        for _ in range(RUNG):
            if self.due() > now:
                return
            waiting = self._queue[heapq.heappop(self._alarms)[1]]
            view = self._scorer.view(waiting, now)
            if view.best >= 0:
                waiting.least = self._least(view)
            if now + waiting.least >= waiting.item.deadline:
                yield waiting, True
                continue
            if (
                now >= self._hurry_at(waiting)
                and waiting.slot >= 0
                and not waiting.over
                and not waiting.urgent
            ):
                yield waiting, False
            self.watch(waiting, now)

    def _least(self, view: View) -> float:
        return float(self._scorer.after_send(view).min())

    def _hurry_at(self, waiting: Waiting) -> float:
        return waiting.item.deadline - waiting.least * (1.0 + 2.0 / STEPS)

    def _next(self, waiting: Waiting, now: float) -> float:
        hurry = self._hurry_at(waiting)
        return max(now + SOON, hurry if hurry > now else waiting.item.deadline - waiting.least)
