"""How many workers a base needs, from the balance of tokens. Pure: the clock is handed in.

Supply of a worker: the KV tokens that it can hold, or those that it held while it could take no more, if
these are fewer: its slots or its prefill end before its memory then. Demand: the tokens in use, and those
that the queue will take. Workers that are ready or start are no part of the sum: what comes out is their
number, and who starts them knows which it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from broker.messages import Credit
from kvstate import budget
from scheduler.config import SchedulerConfig

_KV_SHARE = 0.8
"""Of a worker's KV tokens: beyond it preemption sets in."""

_SMOOTHING = 0.2
"""Weight of the newest sample of what saturated workers hold."""

_FORGETTING = 0.01
"""Part of the way back to a worker's room that this mean goes with each sample without a queue: what made
workers full with little may be over, and only more load shows whether it is."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One worker: tokens, or requests where its engine tells nothing of its KV cache.

    Attributes:
        room: that it has.
        used: held, and promised to what it runs.
        full: it takes no request now.
    """

    room: float
    used: float
    full: bool


@dataclass(frozen=True, slots=True)
class Load:
    """One base at one moment. `queued`: requests that no worker has; `each`: what one of them takes."""

    replicas: tuple[Replica, ...]
    queued: int
    each: float


@dataclass(frozen=True, slots=True)
class Balance:
    """`supply` of one worker, `demand` of all."""

    supply: float
    demand: float


@dataclass(frozen=True, slots=True)
class Target:
    """Workers that a base shall have, since when (monotonic seconds), and why."""

    replicas: int
    since: float
    reason: str


def load(credits: Sequence[Credit], present: int, tokens: float, parked: Sequence[int] = ()) -> Load:
    """What the heartbeats and the queue say.

    Args:
        parked: requests of each worker that wait in it for an adapter; empty = of none any.
        present: requests that are queued or run.
        tokens: that one of them takes.
    """
    parked = parked or [0] * len(credits)
    running = sum(credit.running + credit.waiting for credit in credits) + sum(parked)
    in_tokens = all(credit.kv_tokens_total for credit in credits)
    replicas = tuple(map(_in_tokens if in_tokens else _in_requests, credits, parked))
    return Load(replicas, max(0, present - running), tokens if in_tokens else 1.0)


def _full(credit: Credit, parked: int) -> bool:
    """Not while it takes no more because requests wait for adapters that load: its engine is at rest."""
    return credit.requests == 0 and not (parked and credit.running + credit.waiting < credit.slots_total)


def _in_tokens(credit: Credit, parked: int) -> Replica:
    # The credit's free tokens are those below the ceiling that nothing holds or will take.
    held = budget.KV_CEILING * credit.kv_tokens_total - credit.kv_tokens_free
    return Replica(_KV_SHARE * credit.kv_tokens_total, max(0.0, held), _full(credit, parked))


def _in_requests(credit: Credit, parked: int) -> Replica:
    used = float(credit.running + credit.waiting)
    return Replica(float(max(1, credit.slots_total)), used, _full(credit, parked))


class Saturation:
    """What one worker of a base holds while it takes no more; a running mean."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def sample(self, load: Load) -> None:
        """Only a queue shows that a worker without credit is full, and not at rest. What one holds it can
        hold, full or not."""
        for replica in load.replicas:
            shown = replica.full and replica.used and load.queued
            if self._mean is None:
                self._mean = replica.used if shown else None
            elif shown or replica.used > self._mean:
                self._mean += _SMOOTHING * (replica.used - self._mean)
        if self._mean is not None and not load.queued and load.replicas:
            self._mean += _FORGETTING * max(0.0, _room(load) - self._mean)

    def balance(self, load: Load) -> Balance:
        room = _room(load)
        supply = room if self._mean is None else min(room, self._mean)
        demand = sum(replica.used for replica in load.replicas) + load.queued * load.each
        return Balance(max(supply, load.each), demand)


def _room(load: Load) -> float:
    """Of one worker, on the average."""
    return sum(replica.room for replica in load.replicas) / max(1, len(load.replicas))


def target(
    balance: Balance, load: Load, previous: Target | None, now: float, config: SchedulerConfig
) -> Target:
    """As many workers as the demand asks for, at once; fewer one by one, `dwell` seconds after the last
    change, and only if the rest still has `spare` of its capacity to spare."""
    count = len(load.replicas)
    was = previous or Target(min(max(count, config.min_workers), config.max_workers), now, "those that serve")
    if not count:
        # Nothing is known of what one can do: the first one tells.
        wanted = max(1 if load.queued else 0, config.min_workers, was.replicas if load.queued else 0)
        why = f"{load.queued} requests wait, and no worker serves" if load.queued else "nobody asks"
    else:
        wanted = math.ceil(balance.demand / (config.utilisation * balance.supply) - 1e-9)
        why = (
            f"{balance.demand:.0f} in use or queued, {balance.supply:.0f} a worker, "
            f"to be filled to {config.utilisation:.0%}"
        )
    wanted = min(max(wanted, config.min_workers), config.max_workers)
    if wanted > was.replicas:
        return Target(wanted, now, why)
    if wanted < was.replicas and now - was.since >= config.dwell:
        rest = (was.replicas - 1) * balance.supply * config.utilisation * (1 - config.spare)
        if not count or balance.demand <= rest:
            return Target(was.replicas - 1, now, why)
    return was
