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


class Deadlines:
    """Looks at each request that has one as it comes, once its slack is two steps, and once it has none."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._alarms: list[tuple[float, int]] = []  # heap; of keys that may have left the queue

    def refuses(self, waiting: Waiting, view: View, now: float) -> float | None:
        """The wait until its first token where that is too long on every worker; None = it may be in time."""
        if waiting.item.deadline == math.inf or view.best < 0:
            return None
        waiting.least = self._least(view)
        wait = float(self._scorer.ttft(view)[view.eligible].min())
        return wait if now + wait > waiting.item.deadline else None

    def watch(self, waiting: Waiting, now: float) -> None:
        if waiting.item.deadline < math.inf:
            heapq.heappush(self._alarms, (self._next(waiting, now), waiting.item.key))

    def due(self, queue: Mapping[int, Waiting]) -> float:
        """When to `ring` again; inf = never, as things are."""
        while self._alarms and self._alarms[0][1] not in queue:
            heapq.heappop(self._alarms)
        return self._alarms[0][0] if self._alarms else math.inf

    def ring(self, queue: Mapping[int, Waiting], now: float) -> Iterator[tuple[Waiting, float | None]]:
        """Those whose time is up: with the wait that makes them too late, or None = they must go first.

        Whoever is above his share has no claim to go before others.
        """
        while self._alarms and self._alarms[0][0] <= now:
            waiting = queue.get(heapq.heappop(self._alarms)[1])
            if waiting is None:
                continue
            view = self._scorer.view(waiting, now)
            if view.best >= 0:
                waiting.least = self._least(view)
            if now + waiting.least >= waiting.item.deadline:
                yield waiting, waiting.least
                continue
            if (
                now >= self._hurry_at(waiting)
                and waiting.slot >= 0
                and not waiting.over
                and not waiting.urgent
            ):
                yield waiting, None
            self.watch(waiting, now)

    def _least(self, view: View) -> float:
        return float(self._scorer.after_send(view)[view.eligible].min())

    def _hurry_at(self, waiting: Waiting) -> float:
        return waiting.item.deadline - waiting.least * (1.0 + 2.0 / STEPS)

    def _next(self, waiting: Waiting, now: float) -> float:
        hurry = self._hurry_at(waiting)
        return max(now + SOON, hurry if hurry > now else waiting.item.deadline - waiting.least)
