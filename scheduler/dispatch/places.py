"""Where a request waits: in the lane of the worker that is the best for it, until its turn comes. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.fleet import Fleet
from scheduler.dispatch.lanes import Lanes, Waiting
from scheduler.dispatch.score import Scorer, View

PLACED = 32
"""Requests without a place that are given one in a call."""

WALKED = 256
"""Requests of a class in another's lane that a worker with nothing to do looks at."""

COMPARED = 3
"""Workers that an explanation compares."""


class Places:
    """In the lanes, or nowhere, where no worker that could run it is there."""

    def __init__(self, config: DispatchConfig, fleet: Fleet, lanes: Lanes, scorer: Scorer) -> None:
        self._config = config
        self._fleet = fleet
        self._lanes = lanes
        self._scorer = scorer
        self._nowhere: dict[tuple[ServiceClass, str], dict[int, Waiting]] = {}  # by class and model

    def put(self, waiting: Waiting, view: View, now: float) -> bool:
        """Give it a place. True: its worker could take it now."""
        if view.best < 0:
            self.strand([waiting])
            return False
        self._enter(waiting, view.best, view, float(view.ahead[view.best]), now)
        if not self._fleet.takes(view.best, waiting.item.service_class, waiting.over, now):
            return False
        self.compare(waiting, view)
        return True

    def strand(self, stranded: Iterable[Waiting]) -> None:
        for waiting in stranded:
            group = waiting.item.service_class, waiting.item.model
            self._nowhere.setdefault(group, {})[waiting.item.key] = waiting

    def lift(self, waiting: Waiting) -> None:
        """Take it from where it waits."""
        if waiting.slot >= 0:
            self._lanes.remove(waiting)
            return
        group = waiting.item.service_class, waiting.item.model
        del self._nowhere[group][waiting.item.key]
        if not self._nowhere[group]:
            del self._nowhere[group]

    def stranded(self) -> Iterator[tuple[ServiceClass, str]]:
        """Groups that are nowhere and for which there is a place now."""
        return (group for group in self._nowhere if self._fleet.eligible(*group).any())

    def put_stranded(self, now: float) -> Iterator[int]:
        """Give some of them their places. Yields the slots of workers that could take one now."""
        left = PLACED
        for group in list(self.stranded()):
            for waiting in list(islice(self._nowhere[group].values(), left)):
                self.lift(waiting)
                if self.put(waiting, self._scorer.view(waiting, now), now):
                    yield waiting.slot
                left -= 1

    def compare(self, waiting: Waiting, view: View) -> None:
        """Note how the workers stand for it."""
        if self._config.explained:
            waiting.figures = self._scorer.figures(view, COMPARED)

    def steal(self, slot: int, skipped: set[int], now: float) -> Waiting | None:
        """From the lane that will take longest, the first that would begin sooner here; it moves here."""
        fleet, tokens = self._fleet, self._lanes.tokens[-1]
        if not len(self._lanes) or self._lanes.counts[-1, slot]:
            return None  # those in its own lane can't go now; others would be no better off
        longest = np.where(self._lanes.counts[-1] > 0, (fleet.pending + tokens) * (fleet.load + 1.0), -1.0)
        lane = int(np.argmax(longest))
        if longest[lane] < 0:
            return None
        here, there = float(fleet.load[slot]) + 1.0, float(fleet.load[lane]) + 1.0
        before = (
            float(fleet.pending[lane]) if fleet.seen[lane] >= now - self._config.stale_after else math.inf
        )
        pending = float(fleet.pending[slot])
        if (pending + 1.0) * here >= (before + float(tokens[lane])) * there:
            return None
        for waiting, ahead in self._lanes.walk(lane, WALKED):
            item = waiting.item
            if (
                waiting.rank not in skipped
                and (pending + item.context) * here < (before + ahead + waiting.cost) * there
                and fleet.takes(slot, item.service_class, waiting.over, now)
                and fleet.eligible(item.service_class, item.model)[slot]
            ):
                view = self._scorer.view(waiting, now)
                self.compare(waiting, view)
                self.lift(waiting)
                self._enter(waiting, slot, view, 0.0, now)
                return waiting
        return None

    def _enter(self, waiting: Waiting, slot: int, view: View, ahead: float, now: float) -> None:
        waiting.cost, waiting.ahead = float(view.uncached[slot]), ahead
        waiting.placed, waiting.version = now, self._fleet.version
        self._lanes.add(waiting, slot)
