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
from scheduler.dispatch.types import Candidate

Vector = NDArray[np.float64]

MOST_DELAYED = 1000.0
"""Also stands for no limit where no worker is eligible."""


@dataclass(frozen=True, slots=True)
class View:
    """Vectors over worker slots.

    Attributes:
        best: the slot with the lowest score among those whose figures are fresh, or else among all; -1 = none
            is eligible.
        wait: time until it would be sent there. ttft: to its first token.
    """

    best: int
    score: Vector
    uncached: Vector
    backlog: Vector
    ahead: Vector
    wait: Vector
    ttft: Vector
    credit: Mask
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
        item, fleet = waiting.item, self.fleet
        eligible = fleet.eligible(item.service_class, item.model)
        uncached = self._uncached(waiting)
        ahead, count = self._ahead(waiting)
        short = np.maximum(0.0, count + fleet.load + 1.0 - fleet.slots)
        for_slot = self.predictor.for_slots(short)
        wait = np.maximum(for_slot, self.predictor.behind(ahead))
        ttft = wait + self.predictor.after_send(fleet.pending + uncached)
        backlog = ahead - np.min(ahead, where=eligible, initial=np.inf)
        np.maximum(backlog, 0.0, out=backlog)
        backlog += for_slot * self.predictor.rate(fleet.step_tokens)
        # Its miss would delay as many as wait in every lane.
        delayed = min(float(np.min(count, where=eligible, initial=np.inf)), MOST_DELAYED)
        score = (fleet.pending + backlog + uncached * (1.0 + delayed)) * (fleet.load + 1.0)
        score[~eligible] = np.inf
        fresh = fleet.fresh(now)
        best = _least(np.where(fresh, score, np.inf))
        if best < 0:
            best = _least(score)
        credit = fleet.credit(item.service_class, waiting.over, now)
        return View(best, score, uncached, backlog, ahead, wait, ttft, credit, eligible)

    def candidates(self, view: View, most: int) -> tuple[Candidate, ...]:
        """The best few."""
        score = view.score
        few = np.argpartition(score, most)[:most] if most < len(score) else np.arange(len(score))
        few = few[np.isfinite(score[few])]
        return tuple(
            Candidate(self.fleet[slot].worker, *figures)
            for slot, *figures in sorted(
                zip(
                    few.tolist(),
                    score[few].tolist(),
                    self.fleet.pending[few].tolist(),
                    view.backlog[few].tolist(),
                    view.uncached[few].tolist(),
                    self.fleet.load[few].tolist(),
                    view.credit[few].tolist(),
                    strict=True,
                ),
                key=lambda entry: (entry[1], entry[0]),
            )
        )

    def _uncached(self, waiting: Waiting) -> Vector:
        item, fleet = waiting.item, self.fleet
        context = float(item.context)
        # An engine computes the last token even where it has it.
        uncached: Vector = np.maximum(context - BLOCK_TOKENS * self.index.hits(item.hashes), 1.0)
        loaded = fleet.loaded(item.model)
        if loaded is not None:
            uncached += ~loaded * (self.config.load * self.predictor.rate(fleet.step_tokens))
        return uncached

    def _ahead(self, waiting: Waiting) -> tuple[Vector, Vector]:
        """Tokens and requests that go before it, by lane; where it waits itself it is first."""
        ahead, count = self.lanes.tokens[waiting.row].copy(), self.lanes.counts[waiting.row].copy()
        if waiting.slot >= 0:
            ahead[waiting.slot] = count[waiting.slot] = 0.0
        return ahead, count


def _least(values: Vector) -> int:
    """-1 where all are infinite."""
    at = int(np.argmin(values)) if len(values) else -1
    return at if at >= 0 and np.isfinite(values[at]) else -1
