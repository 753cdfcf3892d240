"""Whose turn it is. Pure.

Tenants: virtual token counters (VTC, OSDI '24): of those that wait, the one that was served the fewest tokens
for its weight goes first. Service is forgotten with a time constant, so that neither a busy night nor a quiet
one is held against anybody the day after. Counters are logarithms of
`sum(tokens * exp(time / memory)) / weight`: all fade alike, so their order needs no renewal.

Classes: deficit round robin in quanta of tokens, most urgent first.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

OVER = 1.5
"""A tenant is above its share when it used so many times as much, and `burst` tokens more."""


@dataclass(slots=True)
class _Tenant:
    """`seen`: when it last sent a request."""

    weight: float
    seen: float
    queued: int = 0
    waiting: float = 0.0  # tokens of those


class Shares:
    """The tenants of one class. Those that have nothing queued and were silent for `memory` are forgotten.

    Attributes:
        counters: of each tenant; the lower, the less it was served.
    """

    def __init__(self, memory: float, burst: float) -> None:
        self._memory = memory
        self._burst = burst
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # the longest silent first
        self.counters: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []  # heap; counters may have grown since
        self._weights = 0.0
        self._total = -math.inf
        self._waiting = 0.0

    def enter(self, name: str, weight: float, tokens: float, now: float) -> None:
        """A request of the tenant joins the queue. One that returns begins at the least of those there.

        Another `weight` than before holds for what is served from now on.
        """
        self._forget(now)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(weight, now)
            used = self.counters[name] = self._least()
            heapq.heappush(self._order, (used, name))
            if len(self._order) > 2 * len(self._tenants) + 64:
                self._order = [(used, of) for of, used in self.counters.items()]
                heapq.heapify(self._order)
            self._weights += weight
            self._total = _add(self._total, used + math.log(weight))
        elif tenant.weight != weight:
            self._weights += weight - tenant.weight
            tenant.weight = weight
        self._tenants.move_to_end(name)
        tenant.seen = now
        tenant.queued += 1
        tenant.waiting += tokens
        self._waiting += tokens

    def leave(self, name: str, tokens: float) -> None:
        """A request of the tenant is no longer queued."""
        tenant = self._tenants[name]
        tenant.queued -= 1
        tenant.waiting -= tokens
        self._waiting -= tokens

    def charge(self, name: str, tokens: float, now: float) -> None:
        """The tenant was served; nothing is noted of one that has been forgotten meanwhile."""
        tenant = self._tenants.get(name)
        if tenant is None or tokens <= 0:
            return
        grown = math.log(tokens) + now / self._memory
        self.counters[name] = _add(self.counters[name], grown - math.log(tenant.weight))
        self._total = _add(self._total, grown)

    def served(self, now: float) -> dict[str, float]:
        """Tokens that each tenant was served for its weight, less what is forgotten."""
        fade = now / self._memory
        used = {name: math.exp(counter - fade) for name, counter in self.counters.items()}
        return {name: tokens for name, tokens in used.items() if tokens >= 1.0}

    def resume(
        self, served: Mapping[str, float], weights: Mapping[str, float], at: float, now: float
    ) -> None:
        """Go on from what another one had `served` at `at`; before any request has come here."""
        for name, tokens in served.items():
            weight = weights.get(name, 1.0)
            self._tenants[name] = _Tenant(weight, now)
            used = self.counters[name] = math.log(tokens) + at / self._memory
            heapq.heappush(self._order, (used, name))
            self._weights += weight
            self._total = _add(self._total, used + math.log(weight))

    def least(self, names: Iterable[str]) -> str:
        """Who of these was served least."""
        return min(zip(map(self.counters.__getitem__, names), names, strict=True))[1]

    def by_service(self, names: Iterable[str]) -> list[str]:
        """These, who was served least first."""
        return [name for _, name in sorted(zip(map(self.counters.__getitem__, names), names, strict=True))]

    def over(self, name: str, now: float) -> bool:
        """Whether it was served and asks for more than its share, beyond what chance and a burst explain, and
        was served no less than others on average."""
        return next(self.within((name,), now), None) is None

    def within(self, names: Iterable[str], now: float) -> Iterator[str]:
        """Those of these tenants, of which there is one at least, of which that is not so."""
        fade = now / self._memory
        total = math.exp(self._total - fade)
        share, mean = (total + self._waiting) / self._weights, total / self._weights
        for name in names:
            tenant = self._tenants[name]
            served = math.exp(self.counters[name] - fade)
            used = served + tenant.waiting / tenant.weight
            # Else who asks for little more than his share, and for more than there is, would have all.
            behind = served < mean * (1 - 1e-9)
            if behind or used <= OVER * share or (used - share) * tenant.weight <= self._burst:
                yield name

    def _least(self) -> float:
        while self._order:
            before, name = self._order[0]
            used = self.counters.get(name)
            if used is None:
                heapq.heappop(self._order)
            elif used > before:
                heapq.heapreplace(self._order, (used, name))
            else:
                return used
        return -math.inf

    def _forget(self, now: float) -> None:
        while self._tenants:
            name, tenant = next(iter(self._tenants.items()))
            if now - tenant.seen <= self._memory:
                return
            if tenant.queued:
                tenant.seen = now
                self._tenants.move_to_end(name)
                continue
            self._weights -= tenant.weight
            self._total = _less(self._total, self.counters[name] + math.log(tenant.weight))
            del self._tenants[name], self.counters[name]


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _less(a: float, b: float) -> float:
    """log(exp(a) - exp(b)); -inf where b is no less, as sums of floats may have it."""
    return a + math.log1p(-math.exp(b - a)) if b < a else -math.inf


class Rounds:
    """Deficit round robin of the classes that wait for one worker, the most urgent first in each round."""

    def __init__(self, quanta: Sequence[int]) -> None:
        self._quanta = quanta
        self._deficits = [float(quantum) for quantum in quanta]

    def goes_on(self, rank: int, cost: float) -> bool:
        """Whether the class may be served this in the round that is under way."""
        return cost <= self._deficits[rank]

    def turn(self, costs: Sequence[float | None]) -> int | None:
        """The class to serve next: an index. `costs`: of the first request of each; None = it has none."""
        waiting = [(rank, cost) for rank, cost in enumerate(costs) if cost is not None]
        if not waiting:
            return None
        while True:
            for rank, cost in waiting:
                if self.goes_on(rank, cost):
                    return rank
            # As many rounds at once as the first of them lacks.
            lacks = ((cost - self._deficits[rank]) / self._quanta[rank] for rank, cost in waiting)
            rounds = max(1, math.ceil(min(lacks)))
            for rank, quantum in enumerate(self._quanta):
                # What a class did not use while it had nothing is not kept for it.
                kept = self._deficits[rank] + (rounds - 1) * quantum if costs[rank] is not None else 0.0
                self._deficits[rank] = kept + quantum

    def charge(self, rank: int, cost: float) -> None:
        self._deficits[rank] -= cost
