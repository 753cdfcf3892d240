"""Which worker shall hold which adapter: the desired state of one base. Pure: every scheduler finds the same.

What is planned stays where it is while it may. Beyond that: an adapter that is asked for and is nowhere
gets a place at once, one whose worker left gets another, one that is asked for more than its replicas
carry gets one more, and one with replicas to spare loses one, each no sooner than `dwell` after its last
change. New places go by rendezvous hashing among workers with a free slot, those of the smallest
sufficient rank first (an engine computes every adapter as if it had the largest rank it takes), and no
worker much fuller than the others (bounded loads, arXiv 1608.01350). Where all slots are taken, an
adapter that nobody asks for makes room, then a replica that is not the only one, then one asked for much
less.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from broker.placement import Assignment, Placement
from scheduler import rendezvous
from scheduler.config import SchedulerConfig
from scheduler.sites import Pool, Site
from scheduler.view import Adapter, Snapshot, Wanted, Worker

RIVAL = 1.5
"""A placed adapter gives way to one that nobody holds and that is asked for so many times as much."""

SPACING = 0.05
"""Seconds from one plan to the next, however much is asked for."""

GIVE_UP = 3
"""Workers on which an adapter may fail before it is its files that are to blame."""

_NOTHING = Wanted()


def plan(
    snapshot: Snapshot,
    demand: Mapping[str, Wanted],
    previous: Placement | None,
    now_ms: int,
    config: SchedulerConfig,
) -> Placement:
    """The placement to follow `previous`; its figures of workers wanted are left as they were."""
    before = previous or Placement(base=snapshot.base)
    assignments = _Plan(snapshot, demand, before, now_ms, config).run()
    return before.model_copy(update={"assignments": assignments})


def replicas_needed(concurrency: float, sequences: float, utilisation: float) -> int:
    """`R = ceil(λ·E[service] / (slots·u))`; λ·E[service] is the concurrency (Little's law)."""
    return max(1, math.ceil(concurrency / max(1.0, sequences * utilisation) - 1e-9))


def _joined(*reasons: str | None) -> str:
    return "; ".join(reason for reason in reasons if reason)


_Victim = tuple[tuple[bool, float], str, str]
"""A replica that may go: what it is worth, its adapter, its worker."""


class _Goal(NamedTuple):
    """How many replicas an adapter shall have, and why so many."""

    replicas: int
    reason: str


class _Plan:
    def __init__(
        self,
        snapshot: Snapshot,
        demand: Mapping[str, Wanted],
        previous: Placement,
        now_ms: int,
        config: SchedulerConfig,
    ) -> None:
        self._snapshot = snapshot
        self._demand = demand
        self._now_ms = now_ms
        self._config = config
        self._before = {each.model: each for each in previous.assignments}
        self._sites: dict[str, Site] = {}
        self._pools: list[Pool] = []
        self._held: dict[str, list[str]] = defaultdict(list)
        self._why: dict[str, str] = {}
        self._victims: dict[int, list[_Victim]] | None = None  # by the pool's rank, a heap; once it is needed
        for worker in sorted(snapshot.workers, key=lambda w: (w.max_rank, w.name)):
            if worker.slots > 0:
                self._enter(worker)
        sizes = [site.worker.sequences for site in self._sites.values()]
        self._sequences = sum(sizes) / len(sizes) if sizes else 1.0

    def run(self) -> tuple[Assignment, ...]:
        goals = {model: self._goal(adapter) for model, adapter in self._known()}
        self._keep(goals)
        for model, goal in goals.items():
            while len(self._held[model]) > goal.replicas:
                self._take(model, self._least(model), goal.reason)
        for model in sorted(goals, key=self._urgency):
            self._place(model, goals[model])
        self._even_out()
        return tuple(self._assignment(model) for model in sorted(goals))

    # What is there

    def _enter(self, worker: Worker) -> None:
        if not self._pools or self._pools[-1].max_rank != worker.max_rank:
            self._pools.append(Pool(worker.max_rank))
        pool = self._pools[-1]
        site = Site(worker, pool)
        pool.sites.append(site)
        pool.slots += worker.slots
        self._sites[worker.name] = site

    def _known(self) -> Iterator[tuple[str, Adapter]]:
        """The adapters that the plan is about: asked for, to be kept, or current and placed already."""
        for model, adapter in self._snapshot.adapters.items():
            before = self._before.get(model)
            lately = before is not None and before.workers and not self._settled(model)
            if (
                self._wanted(model).asked
                or (adapter.current and (adapter.min_replicas or before is not None))
                or lately
            ):
                yield model, adapter

    def _wanted(self, model: str) -> Wanted:
        return self._demand.get(model, _NOTHING)

    def _settled(self, model: str) -> bool:
        before = self._before.get(model)
        return before is None or self._now_ms - before.since_ms >= self._config.dwell * 1000

    def _floor(self, adapter: Adapter) -> int:
        return adapter.min_replicas if adapter.current else 0

    def _eligible(self, model: str) -> Iterator[Site]:
        rank, barred = self._snapshot.adapters[model].rank, self._snapshot.barred.get(model, {})
        if len(barred) >= GIVE_UP:
            return
        for pool in self._pools:
            if pool.max_rank >= rank:
                yield from (site for site in pool.sites if site.worker.name not in barred)

    # How many

    def _goal(self, adapter: Adapter) -> _Goal:
        model, wanted, floor = adapter.model, self._wanted(adapter.model), self._floor(adapter)
        before = self._before.get(model)
        had = len(before.workers) if before else 0
        if had == 0:
            if floor:
                return _Goal(floor, f"{floor} are kept loaded: min_replicas")
            if wanted.asked:
                return _Goal(1, "asked for, and loaded nowhere")
            return _Goal(0, "nobody asks for it")
        goal = _Goal(had, "")
        if self._settled(model) and self._pools:
            goal = self._step(model, had, wanted)
        return _Goal(floor, f"{floor} are kept loaded: min_replicas") if goal.replicas < floor else goal

    def _step(self, model: str, had: int, wanted: Wanted) -> _Goal:
        """One replica more or less, if the load is outside the band that `had` replicas are right for."""
        use = self._config.utilisation
        sequences = self._sequences
        needed = replicas_needed(wanted.concurrency, sequences, use)
        figures = f"{wanted.concurrency:.1f} requests at once, {sequences * use:.1f} a replica"
        if needed > had:
            return _Goal(had + 1, f"one more: {figures}")
        rest = (had - 1) * sequences * use * (1 - self._config.spare)
        if had > 1 and wanted.concurrency <= rest:
            return _Goal(had - 1, f"one less: {figures}")
        return _Goal(had, "")

    # Where

    def _keep(self, goals: Mapping[str, _Goal]) -> None:
        """What was planned stays, in order of its demand where a worker has fewer slots than before."""
        for model in sorted(goals, key=self._urgency):
            before = self._before.get(model)
            if before is None or not before.workers:
                continue
            eligible = {site.worker.name for site in self._eligible_of(model, before.workers)}
            barred = self._snapshot.barred.get(model, {})
            for name in before.workers:
                if name in eligible and self._sites[name].free:
                    self._put(model, self._sites[name])
                elif name in barred:
                    self._why[model] = f"it failed on {name}: {barred[name]}"
                elif name in self._sites:
                    self._why[model] = f"{name} has no slot for it any more"
                else:
                    self._why[model] = f"{name} serves no more"

    def _eligible_of(self, model: str, names: Iterable[str]) -> Iterator[Site]:
        rank, barred = self._snapshot.adapters[model].rank, self._snapshot.barred.get(model, {})
        for name in names:
            site = self._sites.get(name)
            if site is not None and name not in barred and site.worker.max_rank >= rank:
                yield site

    def _urgency(self, model: str) -> tuple[bool, bool, float, str]:
        """Sorts who is placed first: what must be loaded, what is nowhere yet, what is asked for most."""
        short = len(self._held.get(model, ())) < self._floor(self._snapshot.adapters[model])
        wanted = self._wanted(model)
        return not short, bool(self._held.get(model)), -wanted.concurrency, model

    def _place(self, model: str, goal: _Goal) -> None:
        while len(self._held[model]) < goal.replicas:
            site = self._choose(model) or self._make_room(model)
            before = self._why.get(model)
            if site is None:
                if before or not self._held[model]:
                    self._why[model] = _joined(before, self._why_nowhere(model))
                return
            self._put(model, site)
            self._why[model] = _joined(before, goal.reason)

    def _choose(self, model: str) -> Site | None:
        """The free worker with the highest weight, of the first pool that has one."""
        point, rank = rendezvous.point(model), self._snapshot.adapters[model].rank
        barred = self._snapshot.barred.get(model, {})
        if len(barred) >= GIVE_UP:
            return None
        for pool in self._pools:
            if pool.max_rank >= rank and pool.placed < pool.slots:
                site = pool.best(model, point, barred, even=True) or pool.best(
                    model, point, barred, even=False
                )
                if site is not None:
                    return site
        return None

    def _make_room(self, model: str) -> Site | None:
        """Take the slot of the adapter that needs it least, if that is much less; None = there is none."""
        needs_it = len(self._held[model]) < self._floor(self._snapshot.adapters[model])
        if self._held[model] and not needs_it:
            return None
        barred = self._snapshot.barred.get(model, {})
        if len(barred) >= GIVE_UP:
            return None
        rank = self._snapshot.adapters[model].rank
        found = [self._cheapest(pool, model, barred) for pool in self._pools if pool.max_rank >= rank]
        worth, victim, name = min(filter(None, found), default=((True, math.inf), "", ""))
        alone, concurrency = worth
        if not victim or (alone and not needs_it and concurrency * RIVAL >= self._wanted(model).concurrency):
            return None
        self._take(victim, name, f"its slot on {name} went to {model}")
        return self._sites[name]

    def _cheapest(self, pool: Pool, model: str, barred: Mapping[str, str]) -> _Victim | None:
        """The replica in `pool` that is worth the least, of those whose slot `model` may have."""
        if self._victims is None:
            self._victims = {each.max_rank: [] for each in self._pools}
            for site in self._sites.values():
                for other in site.models:
                    self._offer(other, site)
        heap, left_out = self._victims[pool.max_rank], []
        while heap:
            worth, other, name = heap[0]
            site = self._sites[name]
            if other not in site.models or not self._may_go(other):
                heapq.heappop(heap)
            elif worth != self._worth(other):  # it has more or fewer replicas now
                heapq.heapreplace(heap, (self._worth(other), other, name))
            elif name in barred or model in site.models:
                left_out.append(heapq.heappop(heap))
            else:
                break
        found = heap[0] if heap else None
        for each in left_out:
            heapq.heappush(heap, each)
        return found

    def _offer(self, model: str, site: Site) -> None:
        if self._victims is not None and self._may_go(model):
            heapq.heappush(self._victims[site.pool.max_rank], (self._worth(model), model, site.worker.name))

    def _worth(self, model: str) -> tuple[bool, float]:
        """What a replica carries; one that is not the only one counts less."""
        return len(self._held[model]) == 1 and self._wanted(model).asked, (
            self._wanted(model).concurrency / len(self._held[model])
        )

    def _may_go(self, model: str) -> bool:
        """Whether it may lose a replica at all, to one that is asked for more."""
        if len(self._held[model]) <= self._floor(self._snapshot.adapters[model]):
            return False
        if not self._wanted(model).asked:
            return True
        before = self._before.get(model)
        return before is not None and bool(before.workers) and self._settled(model)

    def _why_nowhere(self, model: str) -> str:
        adapter, barred = self._snapshot.adapters[model], self._snapshot.barred.get(model, {})
        if not self._sites:
            return "no worker of its base takes adapters"
        if all(pool.max_rank < adapter.rank for pool in self._pools):
            most = self._pools[-1].max_rank
            return f"its rank, {adapter.rank}, is more than any worker takes: {most} at most"
        if barred and (len(barred) >= GIVE_UP or not any(True for _ in self._eligible(model))):
            name, reason = next(iter(barred.items()))
            return f"it failed on {len(barred)} workers, on {name} as: {reason}"
        if self._held[model]:
            return "no slot is free for one more"
        return "every slot is taken by adapters that are asked for as much"

    def _even_out(self) -> None:
        """Move one adapter off a worker that is fuller than it may be: others have come since."""
        for pool in self._pools:
            for site in pool.sites:
                if len(site.models) > pool.bound(site) and self._move_one(site, pool):
                    return

    def _move_one(self, full: Site, pool: Pool) -> bool:
        for model in sorted(full.models, key=lambda m: rendezvous.weight(rendezvous.point(m), full.point)):
            if not self._settled(model) or model in self._why:
                continue
            barred = self._snapshot.barred.get(model, {})
            others = [
                site
                for site in pool.sites
                if len(site.models) < pool.bound(site)
                and len(site.models) + 1 < len(full.models)
                and model not in site.models
                and site.worker.name not in barred
            ]
            if others:
                point = rendezvous.point(model)
                emptiest = min(len(site.models) / site.worker.slots for site in others)
                best = max(
                    (site for site in others if len(site.models) / site.worker.slots == emptiest),
                    key=lambda site: rendezvous.weight(point, site.point),
                )
                self._take(model, full.worker.name, "")
                self._put(model, best)
                self._why[model] = f"moved from {full.worker.name}, which holds more than its share"
                return True
        return False

    # Keeping the books

    def _put(self, model: str, site: Site) -> None:
        site.models.add(model)
        site.pool.placed += 1
        self._held[model].append(site.worker.name)
        self._offer(model, site)

    def _take(self, model: str, name: str, reason: str) -> None:
        site = self._sites[name]
        site.models.discard(model)
        site.pool.placed -= 1
        self._held[model].remove(name)
        self._why[model] = reason

    def _least(self, model: str) -> str:
        """Of the workers that hold it, the one it would have chosen last."""
        point = rendezvous.point(model)
        sites = (self._sites[name] for name in self._held[model])
        last = min(sites, key=lambda s: (-s.pool.max_rank, rendezvous.weight(point, s.point)))
        return last.worker.name

    def _assignment(self, model: str) -> Assignment:
        before, workers = self._before.get(model), tuple(self._held[model])
        reason = self._why.get(model) or (before.reason if before else "nobody asks for it")
        if before is not None and before.workers == workers:
            # Unless it is nowhere: why is what there is to say of it then.
            if workers or reason == before.reason:
                return before
            return before.model_copy(update={"reason": reason})
        return Assignment(model=model, workers=workers, reason=reason, since_ms=self._now_ms)
