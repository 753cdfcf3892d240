"""How long outputs are: what was seen of each model and tenant, asked about requests that run. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import TypeVar

SAMPLES = 256
"""Outputs that are remembered of each key, the newest."""

KEYS = 4096
"""Pairs of model and tenant, and as many models; past it, those unused longest are forgotten."""

ENOUGH = 16
"""Remembered outputs longer than a request's own so far that a forecast for it is made of, at least."""

COLD_RATIO, WARM_RATIO, DECAY = 0.7, 0.098, 600
"""Share of `max_tokens` that is assumed where nothing is known: from the first to the second, in as many
outputs as the third (SGLang's new-token ratio and its decay)."""

UNKNOWN_MAX = 1024
"""Tokens taken for `max_tokens` where the request names none and nothing is known."""

K = TypeVar("K", bound=Hashable)


class _Ring:
    """The last `SAMPLES` lengths, in order of arrival and of length."""

    __slots__ = ("arrived", "ordered")

    def __init__(self) -> None:
        self.arrived: deque[int] = deque()
        self.ordered: list[int] = []

    def add(self, tokens: int) -> None:
        if len(self.arrived) == SAMPLES:
            del self.ordered[bisect_left(self.ordered, self.arrived.popleft())]
        self.arrived.append(tokens)
        insort(self.ordered, tokens)

    def quantile(self, beyond: int, quantile: float) -> int | None:
        """Of the lengths above `beyond`, the least that `quantile` of them do not exceed; None: too few."""
        first = bisect_right(self.ordered, beyond)
        count = len(self.ordered) - first
        if count < ENOUGH:
            return None
        return self.ordered[first + max(0, math.ceil(quantile * count) - 1)]


class Lengths:
    """Output lengths of the (model, tenant), of the model, and of all; the first of them that knows enough says."""

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
        """Tokens that a request which has made `so_far` will still make, as `quantile` of its like do not exceed.

        Args:
            max_tokens: its own limit; 0 = it has none.
            quantile: in (0, 1].
        """
        left = max(0, max_tokens - so_far) if max_tokens else math.inf
        for ring in (self._pairs.get((model, tenant)), self._models.get(model), self._all):
            total = ring.quantile(so_far, quantile) if ring is not None else None
            if total is not None:
                return min(left, total - so_far)
        return self._ratio() * (left if max_tokens else UNKNOWN_MAX)

    def _ratio(self) -> float:
        return COLD_RATIO - (COLD_RATIO - WARM_RATIO) * min(1.0, self._learned / DECAY)


def _ring(rings: OrderedDict[K, _Ring], key: K, most: int) -> _Ring:
    ring = rings.setdefault(key, _Ring())
    rings.move_to_end(key)
    if len(rings) > most:
        rings.popitem(last=False)
    return ring
