"""What it costs that a scheduler hands requests out: a fleet that dispatches, against one whose workers pull.

Both are whole fleets with the sim engine, stand for the whole run and are loaded in turn, with the load of
`overhead`: nothing waits, so what is added is the way through the scheduler. Beside it what one bare process
more on the way takes, which decides nothing (`floor`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from benchmarks import fleet, floor, journal, overhead, quiet, results
from benchmarks.load import Load

STREAMS = {1: 24, 32: 160}
"""Concurrent streams -> requests of one side in one round."""
ROUNDS = 4
PACE = {"sim__ttft_ms": overhead.TTFT_MS, "sim__itl_ms": overhead.ITL_MS}


def run(quick: bool) -> dict[str, Any]:
    rounds, share = (1, 4) if quick else (ROUNDS, 1)
    foreign: list[float] = []
    found = {}
    with contextlib.ExitStack() as stack:
        ups = {
            side: stack.enter_context(fleet.up("sim", **PACE, dispatch__enabled=side == "on"))
            for side in journal.SIDES
        }
        for up in ups.values():
            journal.measured(Load(up.url, "sim", 32, 64, 40), up)
        for streams, requests in STREAMS.items():
            of = functools.partial(
                journal.paced_load, streams=streams, requests=max(streams, requests // share)
            )
            pairs = journal.pairs(f"{streams} streams", ups, rounds, foreign, of)
            rate = streams / (overhead.TTFT_MS + overhead.TOKENS * overhead.ITL_MS) * 1000
            floors = [_floor(rate, max(streams, requests // share), foreign) for _ in range(rounds)]
            found[str(streams)] = journal.ttft(pairs) | {
                f"floor_p{p}_ms": results.spread([of[p] for of in floors]) for p in journal.PERCENTILES
            }
    return {
        "rounds": rounds,
        "ttft_ms": overhead.TTFT_MS,
        "itl_ms": overhead.ITL_MS,
        "tokens": overhead.TOKENS,
        "streams": found,
        "cores_used_by_others": max(foreign),
    }


def _floor(rate: float, count: int, foreign: list[float]) -> dict[int, float]:
    """Milliseconds that a process on the way adds, by percentile."""
    sides = []
    for relayed in (False, True):
        trips, cores = quiet.undisturbed(functools.partial(floor.round_trips, rate, count, relayed))
        foreign.append(cores)
        sides.append(trips)
    without, beside = sides
    return {
        p: 1000 * (results.percentile(beside, p) - results.percentile(without, p))
        for p in journal.PERCENTILES
    }


if __name__ == "__main__":
    results.main("handing", run)
