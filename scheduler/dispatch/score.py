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

import numpy as np
from numpy.typing import NDArray

from kvstate.index import PrefixIndex
from kvstate.prefix import BLOCK_TOKENS
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.fleet import Fleet, Mask
from scheduler.dispatch.lanes import Lanes, Waiting
from scheduler.dispatch.ttft import Predictor
from scheduler.dispatch.types import Figures

Vector = NDArray[np.float64]

_NONE = np.zeros(1)

MOST_DELAYED = 1000.0
"""Also stands for no limit where no worker is eligible."""


@dataclass(frozen=True, slots=True)
class View:
    """Vectors over worker slots.

    Attributes:
        best: the slot with the lowest score among those whose figures are fresh, or else among all; -1 = none
            is eligible.
        ahead: tokens that go before it there.
        delay: seconds until a slot or KV room falls free for it, and to load its adapter.
    """

    best: int
    score: Vector
    uncached: Vector
    backlog: Vector
    ahead: Vector
    delay: Vector
    eligible: Mask


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
        eligible = fleet.eligible(item.service_class, item.model)
        if closed := fleet.closed(item, waiting.over):
            eligible = eligible.copy()
            eligible[:closed] &= fleet.load[:closed] == 0.0
        uncached = self._uncached(waiting)
        ahead, count = self._ahead(waiting)
        backlog, delayed = ahead, 0.0
        if len(self.lanes):
            common = np.minimum.reduce(ahead, where=eligible, initial=np.inf)
            backlog = np.maximum(ahead - common, 0.0)
            # Its miss would delay as many as wait in every lane.
            delayed = min(float(np.minimum.reduce(count, where=eligible, initial=np.inf)), MOST_DELAYED)
        delay = self._delay(waiting, count)
        if delay is not _NONE:
            backlog = backlog + delay * predictor.rate(fleet.step_tokens)
        score = (fleet.pending + backlog + uncached * (1.0 + delayed)) * (fleet.load + 1.0)
        score[~eligible] = np.inf
        best = _least(np.where(fleet.fresh(now), score, np.inf))
        if best < 0:
            best = _least(score)
        return View(best, score, uncached, backlog, ahead, delay, eligible)

    def ttft(self, view: View) -> Vector:
        """Seconds from now to the first token."""
        return self.wait(view) + self.after_send(view)

    def wait(self, view: View) -> Vector:
        """Seconds until it would be sent."""
        seconds: Vector = np.maximum(self.predictor.behind(view.ahead), view.delay)
        return seconds

    def after_send(self, view: View) -> Vector:
        """Seconds from then to the first token, if the worker held as much as now."""
        return self.predictor.after_send(self.fleet.pending + view.uncached)

    def figures(self, view: View, most: int) -> Figures:
        """Of the best few; made into `Candidate`s when somebody asks."""
        score = view.score
        few = np.argpartition(score, most)[:most] if most < len(score) else np.arange(len(score))
        few = few[np.isfinite(score[few])]
        return tuple(
            zip(
                [self.fleet[slot].worker for slot in few.tolist()],
                score[few].tolist(),
                self.fleet.pending[few].tolist(),
                view.backlog[few].tolist(),
                view.uncached[few].tolist(),
                self.fleet.load[few].tolist(),
                strict=True,
            )
        )

    def _uncached(self, waiting: Waiting) -> Vector:
        item = waiting.item
        # An engine computes the last token even where it has it.
        uncached: Vector = np.maximum(item.context - float(BLOCK_TOKENS) * self.index.hits(item.hashes), 1.0)
        return uncached

    def _delay(self, waiting: Waiting, count: Vector) -> Vector:
        fleet, full = self.fleet, self.fleet.full[waiting.rank]
        short = count + (fleet.load + (1.0 - fleet.slots))
        if full.any():
            short = np.where(full, np.maximum(short, count + 1.0), short)  # somebody must end first
        missing = len(short) > 0 and short.max() > 0.0
        delay = self.predictor.for_slots(np.maximum(short, 0.0)) if missing else _NONE
        loaded = fleet.loaded(waiting.item.model)
        return delay if loaded is None else delay + ~loaded * self.config.load

    def _ahead(self, waiting: Waiting) -> tuple[Vector, Vector]:
        """Tokens and requests that go before it, by lane; where it waits itself it is first."""
        ahead, count = self.lanes.tokens[waiting.row].copy(), self.lanes.counts[waiting.row].copy()
        if waiting.slot >= 0:
            ahead[waiting.slot] = count[waiting.slot] = 0.0
        return ahead, count


def _least(values: Vector) -> int:
    """-1 where all are infinite."""
    if not len(values):
        return -1
    at = int(values.argmin())
    return at if values[at] < np.inf else -1
