"""Time to plan 1,000 workers and 200 adapters: from nothing, with nothing changed, and after a worker left;
and 300 workers whose slots are full while several hundred adapters more are asked for.

The goal is 50 ms for any of the former. No queue and no broker: the planner is a function.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import results
from broker.placement import Placement
from scheduler import planner
from scheduler.config import SchedulerConfig
from scheduler.view import Adapter, Snapshot, Wanted, Worker

WORKERS, ADAPTERS, SLOTS = 1000, 200, 8
ROUNDS = 50
DWELL_MS = 60_000
CROWDED, TOO_MANY = 300, 3000


def snapshot(workers: int = WORKERS, adapters: int = ADAPTERS) -> Snapshot:
    """Two pools by rank; a quarter of the adapters need the larger one."""
    return Snapshot(
        "base",
        tuple(Worker(f"worker-{n}", SLOTS, 64 if n % 4 == 0 else 16, 64) for n in range(workers)),
        {f"a{n}@1": Adapter(f"a{n}@1", 64 if n % 4 == 0 else 16) for n in range(adapters)},
    )


def zipf(count: int) -> dict[str, Wanted]:
    """What is asked for: the first adapter the most, and enough of it for some forty replicas."""
    return {f"a{n}@1": Wanted(2000 / (n + 1), 1) for n in range(count)}


def run(quick: bool) -> dict[str, Any]:
    rounds = 5 if quick else ROUNDS
    config = SchedulerConfig()
    full, demand = snapshot(), zipf(ADAPTERS)
    settled = _settled(full, demand, config)
    held = next(name for each in settled.assignments for name in each.workers)
    fewer = Snapshot("base", tuple(w for w in full.workers if w.name != held), full.adapters)
    later = max(each.since_ms for each in settled.assignments) + DWELL_MS
    cases: dict[str, tuple[Snapshot, Placement | None]] = {
        "from_nothing": (full, None),
        "nothing_changed": (full, settled),
        "a_worker_left": (fewer, settled),
    }
    crowded = snapshot(CROWDED, TOO_MANY)
    packed = planner.plan(crowded, zipf(TOO_MANY), None, 0, config)
    cases["too_many"] = crowded, packed
    measured = {}
    for name, (seen, before) in cases.items():
        asked = zipf(len(seen.adapters)) if seen is crowded else demand
        times = [_time(seen, asked, before, later, config) for _ in range(rounds)]
        measured[name] = {f"p{p}_ms": round(1000 * results.percentile(times, p), 2) for p in (50, 99)}
        results.say(f"  {name}: {measured[name]}")
    replicas = sum(len(each.workers) for each in settled.assignments)
    fleet = {"workers": WORKERS, "slots": SLOTS, "adapters": ADAPTERS, "replicas": replicas}
    return {**fleet, "rounds": rounds, **measured}


def _settled(seen: Snapshot, demand: dict[str, Wanted], config: SchedulerConfig) -> Placement:
    placed: Placement | None = None
    for number in range(1, 60):
        placed = planner.plan(seen, demand, placed, number * DWELL_MS, config)
    assert placed is not None
    return placed


def _time(
    seen: Snapshot,
    demand: dict[str, Wanted],
    before: Placement | None,
    now_ms: int,
    config: SchedulerConfig,
) -> float:
    began = time.perf_counter()
    planner.plan(seen, demand, before, now_ms, config)
    return time.perf_counter() - began


if __name__ == "__main__":
    results.main("planner", run)
