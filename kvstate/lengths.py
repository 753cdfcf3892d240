"""How long outputs are: what was seen of each model and tenant, asked about requests that run. Pure."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

SAMPLES = 256
"""Outputs that are remembered of each key, the newest."""

KEYS = 2048
"""Pairs of model and tenant, and as many models; past it, those unused longest are forgotten."""

ENOUGH = 8
"""Remembered outputs longer than a request's own so far that a forecast for it is made of, at least."""

MEAN = 256
"""Tokens that requests make, or go on to make, on average, where nothing is known."""

COLD_RATIO, WARM_RATIO, DECAY = 0.7, 0.098, 600
"""Share of `max_tokens` that is assumed at most where nothing is known: from the first to the second, in as
many outputs as the third (SGLang's new-token ratio and its decay)."""

UNKNOWN_MAX = 1024
"""Tokens taken for `max_tokens` where the request names none and nothing is known."""

K = TypeVar("K", bound=Hashable)


class _Ring:
    """The last `SAMPLES` lengths, in order of length, and as they arrived: from `oldest` on, then round."""

    __slots__ = ("arrived", "oldest", "ordered")

    def __init__(self) -> None:
        self.arrived = array("q")
        self.ordered = array("q")
        self.oldest = 0

    def add(self, tokens: int) -> None:
        if len(self.arrived) < SAMPLES:
            self.arrived.append(tokens)
        else:
            del self.ordered[bisect_left(self.ordered, self.arrived[self.oldest])]
            self.arrived[self.oldest] = tokens
            self.oldest = (self.oldest + 1) % SAMPLES
        insort(self.ordered, tokens)

    def quantile(self, beyond: int, quantile: float) -> int | None:
        """Of the lengths above `beyond`, the least that `quantile` of them do not exceed; None: too few."""
        first = bisect_right(self.ordered, beyond)
        count = len(self.ordered) - first
        if count < ENOUGH:
            return None
        return self.ordered[first + max(0, math.ceil(quantile * count) - 1)]


class Lengths:
    """Output lengths of each model and tenant, each model, and all: the first that knows enough says."""

    def __init__(self, keys: int = KEYS) -> None:
        self._keys = keys
        self._pairs: OrderedDict[tuple[str, str], _Ring] = OrderedDict()
        self._models: OrderedDict[str, _Ring] = OrderedDict()
        self._all = _Ring()
        self._learned = 0

    def learn(self, model: str, tenant: str, tokens: int) -> None:
        """A request has ended after `tokens` of output."""
        self._learned += 1
        self._all.add(tokens)
        _ring(self._models, model, self._keys).add(tokens)
        _ring(self._pairs, (model, tenant), self._keys).add(tokens)

    def remaining(self, model: str, tenant: str, so_far: int, max_tokens: int, quantile: float) -> float:
        """Tokens that a request which made `so_far` will still make: `quantile` of its like make no more.

        Where too few were longer to say, all end at the same rate, whatever they have made (exponentially).

        Args:
            max_tokens: its own limit; 0 = it has none.
            quantile: in [0, 1].
        """
        left = max(0, max_tokens - so_far) if max_tokens else math.inf
        for ring in (self._pairs.get((model, tenant)), self._models.get(model), self._all):
            total = ring.quantile(so_far, quantile) if ring is not None else None
            if total is not None:
                return min(left, total - so_far)
        guess = self._ratio() * (left if max_tokens else UNKNOWN_MAX)
        # The few that have ended say little: of those that came together the shortest end first.
        return min(guess, -MEAN * math.log1p(-quantile)) if quantile < 1.0 else guess

    def _ratio(self) -> float:
        return COLD_RATIO - (COLD_RATIO - WARM_RATIO) * min(1.0, self._learned / DECAY)


def _ring(rings: OrderedDict[K, _Ring], key: K, most: int) -> _Ring:
    ring = rings.get(key)
    if ring is None:
        ring = rings[key] = _Ring()
        if len(rings) > most:
            rings.popitem(last=False)
    else:
        rings.move_to_end(key)
    return ring
