"""How each worker stands for one request. Pure.

`score = (pending + backlog + uncached * (1 + delayed)) * (load + 1)`, the lowest wins: LMetric
(arXiv 2603.15202) with what waits in the workers' lanes. Where requests wait for every worker, two things
count otherwise. `backlog` is what waits in a lane beyond what waits in each: a delay that is met everywhere
says nothing against any worker, and multiplied by the load it would drown what a cached prefix saves. And
what is not cached delays those behind, `delayed` of them at least: so the less capacity there is, the more
requests stick to their prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstate.index import PrefixIndex
from kvstate.prefix import BLOCK_TOKENS
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.fleet import Fleet
from scheduler.dispatch.lanes import Lanes, Waiting
from scheduler.dispatch.ttft import Predictor
from scheduler.dispatch.types import Figures, Item

Vector = NDArray[np.float64]

_NONE = np.zeros(1)

MOST_DELAYED = 1000.0
"""Also stands for no limit where no worker is eligible."""


class View(NamedTuple):
    """Vectors over worker slots, as of now: some are the fleet's and the lanes' own.

    Attributes:
        best: the slot with the lowest score among those whose figures are fresh, or else among all; -1 = none
            is eligible.
        rank: of its class.
        ahead: tokens that go before it there.
        delay: seconds until a slot or KV room falls free for it, and to load its adapter.
        barred: inf where it can't run, else 0.
    """

    best: int
    rank: int
    score: Vector
    uncached: Vector
    backlog: Vector
    ahead: Vector
    delay: Vector
    barred: Vector


@dataclass(frozen=True, slots=True)
class Scorer:
    """What scores are made of."""

    config: DispatchConfig
    fleet: Fleet
    lanes: Lanes
    index: PrefixIndex
    predictor: Predictor

    def view(self, waiting: Waiting, now: float) -> View:
        """`waiting` counts as the first in the lane where it is."""
        item, fleet, predictor = waiting.item, self.fleet, self.predictor
        barred = fleet.barred(item.service_class, item.model)
        if closed := fleet.closed(item.service_class, waiting.over, item.model):
            barred = barred.copy()
            barred[:closed][fleet.load[:closed] > 0.0] = np.inf
        uncached = self._uncached(item)
        ahead, count = self._ahead(waiting)
        backlog, work = ahead, uncached
        if len(self.lanes):
            backlog = np.maximum(ahead - _lowest(ahead + barred), 0.0)
            # Its miss would delay as many as wait in every lane.
            delayed = min(_lowest(count + barred), MOST_DELAYED)
            work = uncached * (1.0 + delayed)
        delay = self._delay(waiting, count)
        if delay is not _NONE:
            backlog = backlog + delay * predictor.rate
        score = (fleet.pending + backlog + work) * (fleet.load + 1.0) + barred
        best = _least(score)
        if best >= 0 and not fleet.is_fresh(best, now):
            fresh = _least(np.where(fleet.fresh(now), score, np.inf))
            best = fresh if fresh >= 0 else best
        return View(best, waiting.rank, score, uncached, backlog, ahead, delay, barred)

    def ttft(self, view: View) -> Vector:
        """Seconds from now to the first token; inf where it can't run."""
        return self.wait(view) + self.after_send(view)

    def wait(self, view: View) -> Vector:
        """Seconds until it would be sent."""
        seconds: Vector = np.maximum(self.predictor.behind(view.rank, view.ahead), view.delay)
        return seconds

    def after_send(self, view: View) -> Vector:
        """Seconds from then to the first token, if the worker held as much as now; inf where it can't run."""
        return self.predictor.after_send(self.fleet.pending + view.uncached) + view.barred

    def figures(self, view: View, most: int) -> Figures:
        """Of the best few, best first; made into `Candidate`s when somebody asks."""
        fleet, score = self.fleet, view.score.copy()
        found: list[tuple[str, float, float, float, float, float]] = []
        while len(found) < most and (slot := _least(score)) >= 0:
            figures = score.item(slot), fleet.pending.item(slot), view.backlog.item(slot)
            found.append((fleet[slot].worker, *figures, view.uncached.item(slot), fleet.load.item(slot)))
            score[slot] = np.inf
        return tuple(found)

    def _uncached(self, item: Item) -> Vector:
        # An engine computes the last token even where it has it.
        tokens: Vector = item.context - self.index.hits(item.hashes) * BLOCK_TOKENS
        return np.maximum(tokens, 1.0, out=tokens)

    def _delay(self, waiting: Waiting, count: Vector) -> Vector:
        fleet = self.fleet
        short = count + fleet.short
        if fleet.crammed:
            full = fleet.full[waiting.rank]
            short = np.where(full, np.maximum(short, count + 1.0), short)  # somebody must end first
        missing = len(short) > 0 and short[short.argmax()] > 0.0
        delay = self.predictor.for_slots(np.maximum(short, 0.0)) if missing else _NONE
        loaded = fleet.loaded(waiting.item.model)
        return delay if loaded is None else delay + ~loaded * self.config.load

    def _ahead(self, waiting: Waiting) -> tuple[Vector, Vector]:
        """Tokens and requests that go before it, by lane; where it waits itself it is first."""
        ahead, count = self.lanes.tokens[waiting.row], self.lanes.counts[waiting.row]
        if waiting.slot >= 0:
            ahead, count = ahead.copy(), count.copy()
            ahead[waiting.slot] = count[waiting.slot] = 0.0
        return ahead, count


def _lowest(values: Vector) -> float:
    """Of at least one."""
    return values.item(values.argmin())


def _least(values: Vector) -> int:
    """Where the lowest is; -1 where all are infinite."""
    if not len(values):
        return -1
    at = int(values.argmin())
    return at if values[at] < np.inf else -1
