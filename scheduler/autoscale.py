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


def load(credits: Sequence[Credit], present: int, tokens: float) -> Load:
    """What the heartbeats and the queue say.

    Args:
        present: requests that are queued or run.
        tokens: that one of them takes.
    """
    running = sum(credit.running + credit.waiting for credit in credits)
    in_tokens = all(credit.kv_tokens_total for credit in credits)
    replicas = tuple(map(_in_tokens if in_tokens else _in_requests, credits))
    return Load(replicas, max(0, present - running), tokens if in_tokens else 1.0)


def _in_tokens(credit: Credit) -> Replica:
    # The credit's free tokens are those below the ceiling that nothing holds or will take.
    held = budget.KV_CEILING * credit.kv_tokens_total - credit.kv_tokens_free
    return Replica(_KV_SHARE * credit.kv_tokens_total, max(0.0, held), credit.requests == 0)


def _in_requests(credit: Credit) -> Replica:
    used = float(credit.running + credit.waiting)
    return Replica(float(max(1, credit.slots_total)), used, credit.requests == 0)


class Saturation:
    """What one worker of a base holds while it takes no more; a running mean."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def sample(self, load: Load) -> None:
        """Only a queue shows that a worker without credit is full, and not at rest."""
        if not load.queued:
            return
        for replica in load.replicas:
            if replica.full and replica.used:
                mean = replica.used if self._mean is None else self._mean
                self._mean = mean + _SMOOTHING * (replica.used - mean)

    def balance(self, load: Load) -> Balance:
        count = len(load.replicas)
        room = sum(replica.room for replica in load.replicas) / count if count else 0.0
        supply = room if self._mean is None else min(room, self._mean)
        demand = sum(replica.used for replica in load.replicas) + load.queued * load.each
        return Balance(max(supply, load.each), demand)


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
