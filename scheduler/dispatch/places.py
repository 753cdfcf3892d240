"""Where a request waits: in the lane of the worker that is the best for it, until its turn comes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice

import numpy as np

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.fleet import Fleet
from scheduler.dispatch.lanes import Lanes, Waiting
from scheduler.dispatch.score import Scorer, View

PLACED = 32
"""Requests without a place that are given one in a call."""

LOOKED = 4
"""Lanes that a worker with nothing to do looks at; one, where some wait in its own and can't go now."""

WALKED = 64
"""Requests of each class that it looks at in each."""

COMPARED = 3
"""Workers that an explanation compares."""


CLASSES = tuple(ServiceClass)

_Group = tuple[ServiceClass, str]
"""Class and model."""


class Places:
    """In the lanes, or nowhere, where no worker that could run it is there."""

    def __init__(self, config: DispatchConfig, fleet: Fleet, lanes: Lanes, scorer: Scorer) -> None:
        self._config = config
        self._fleet = fleet
        self._lanes = lanes
        self._scorer = scorer
        self._nowhere: dict[_Group, dict[int, Waiting]] = {}
        self._placeable: dict[_Group, None] = {}  # of those, for which there is a place
        self._homes = 0  # as of when

    def put(self, waiting: Waiting, view: View, now: float) -> bool:
        """Give it a place. True: its worker could take it now."""
        if view.best < 0:
            self.strand([waiting])
            return False
        self._enter(waiting, view.best, view, float(view.ahead[view.best]), now)
        item = waiting.item
        if not self._fleet.takes(view.best, item.service_class, waiting.over, now, item.model):
            return False
        self.compare(waiting, view)
        return True

    def strand(self, stranded: Iterable[Waiting]) -> None:
        for waiting in stranded:
            group = waiting.item.service_class, waiting.item.model
            if group not in self._nowhere:
                self._nowhere[group] = {}
                if self._fleet.runs(*group):
                    self._placeable[group] = None
            self._nowhere[group][waiting.item.key] = waiting

    def lift(self, waiting: Waiting) -> None:
        """Take it from where it waits."""
        if waiting.slot >= 0:
            self._lanes.remove(waiting)
            return
        group = waiting.item.service_class, waiting.item.model
        del self._nowhere[group][waiting.item.key]
        if not self._nowhere[group]:
            del self._nowhere[group]
            self._placeable.pop(group, None)

    def stranded(self) -> bool:
        """Whether some are nowhere for which there is a place now."""
        if self._homes != self._fleet.homes:
            self._homes = self._fleet.homes
            self._placeable = {group: None for group in self._nowhere if self._fleet.runs(*group)}
        return bool(self._placeable)

    def put_stranded(self, now: float) -> Iterator[int]:
        """Give some of them their places. Yields the slots of workers that could take one now."""
        left = PLACED
        for group in list(islice(self._placeable, PLACED)):
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
        """From the lanes that will take longest, the first that would begin sooner here; it moves here.

        Nobody knows when a worker will take any that tells nothing, or has no room: anywhere else is sooner.
        """
        fleet, lanes = self._fleet, self._lanes
        ranks = [
            rank
            for rank in lanes.ranks()
            if 2 * rank not in skipped and fleet.eligible(CLASSES[rank], fleet.base)[slot]
        ]
        full = skipped | fleet.full_rows(slot, now)
        takes = {rank: (2 * rank not in full, 2 * rank + 1 not in full) for rank in ranks}
        # By what their tenants were when they were placed; what they are now counts below.
        rows = [row for rank in ranks if any(takes[rank]) for row in (2 * rank, 2 * rank + 1)]
        if not any(map(any, takes.values())):
            return None
        longest = (fleet.pending + lanes.tokens[-1]) * (fleet.load + 1.0)
        longest[~fleet.fresh(now)] = np.inf
        if fleet.crammed:
            longest[list(fleet.crammed)] = np.inf
        longest[lanes.waiting(rows) <= 0] = -1.0
        longest[slot] = -1.0
        for _ in range(1 if lanes.counts[-1, slot] else LOOKED):
            lane = int(longest.argmax())
            # What begins sooner here is sooner than the end of that lane.
            if longest[lane] <= (fleet.pending[slot] + 1.0) * (fleet.load[slot] + 1.0):
                return None
            for waiting in self._sooner(slot, lane, takes, now):
                if fleet.eligible(waiting.item.service_class, waiting.item.model)[slot]:
                    self._move(waiting, slot, now)
                    return waiting
            longest[lane] = -1.0
        return None

    def _sooner(
        self, slot: int, lane: int, takes: Mapping[int, Sequence[bool]], now: float
    ) -> Iterator[Waiting]:
        """Those of `lane` that would begin on `slot` before they do where they wait.

        Args:
            takes: which it takes now: by class, and whether their tenants are above their share.
        """
        fleet, lanes = self._fleet, self._lanes
        mine, here = fleet.pending.item(slot), fleet.load.item(slot) + 1.0
        others, there = fleet.pending.item(lane), fleet.load.item(lane) + 1.0
        for rank, taken in takes.items():
            tenants = lanes.tenants(lane, rank, now) if any(taken) else ()
            may: set[str] = set().union(*compress(tenants, taken))
            if not may:
                continue
            hopeless = [fleet.hopeless(lane, CLASSES[rank], over, now) for over in (False, True)]
            for waiting, ahead in lanes.walk(lane, rank, WALKED):
                if waiting.item.tenant not in may:
                    continue
                before = (others + ahead + waiting.cost) * there
                if hopeless[waiting.over] or (mine + waiting.item.context) * here < before:
                    yield waiting

    def _move(self, waiting: Waiting, slot: int, now: float) -> None:
        view = self._scorer.view(waiting, now)
        self.compare(waiting, view)
        self.lift(waiting)
        self._enter(waiting, slot, view, 0.0, now)

    def _enter(self, waiting: Waiting, slot: int, view: View, ahead: float, now: float) -> None:
        waiting.cost, waiting.ahead = float(view.uncached[slot]), ahead
        waiting.placed, waiting.version = now, self._fleet.version
        self._lanes.add(waiting, slot)
