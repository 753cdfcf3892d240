"""Workers as a plan fills them, in pools of those that take the same rank. Pure; owned by one plan."""

from __future__ import annotations

import math
from collections.abc import Collection

from scheduler import rendezvous
from scheduler.view import Worker

BALANCE = 1.25
"""A worker holds so many times the mean at most while another of its pool has room."""


class Site:
    """A worker, and what the plan has on it so far."""

    __slots__ = ("models", "point", "pool", "worker")

    def __init__(self, worker: Worker, pool: Pool) -> None:
        self.worker = worker
        self.pool = pool
        self.point = rendezvous.point(worker.name)
        self.models: set[str] = set()

    @property
    def free(self) -> bool:
        return len(self.models) < self.worker.slots


class Pool:
    """Workers that take the same rank."""

    def __init__(self, max_rank: int) -> None:
        self.max_rank = max_rank
        self.sites: list[Site] = []
        self.slots = 0
        self.placed = 0

    def bound(self, site: Site, more: int = 0) -> int:
        """Adapters that one of its workers may hold while another has room, `more` of them to come."""
        mean = (self.placed + more) / self.slots
        return min(site.worker.slots, max(1, math.ceil(BALANCE * mean * site.worker.slots)))

    def best(self, model: str, point: int, barred: Collection[str], *, even: bool) -> Site | None:
        """The worker with room for it that has the highest weight; with `even`, of those not too full."""
        found, highest = None, -1
        for site in self.sites:
            # `rendezvous.weight`, written out, and first: it rules out all but a few in a thousand.
            weight = point * site.point % rendezvous.PRIME
            if weight > highest and model not in site.models and site.worker.name not in barred:
                limit = self.bound(site, 1) if even else site.worker.slots
                if len(site.models) < limit:
                    found, highest = site, weight
        return found
