"""What it costs that a scheduler hands requests out: a fleet that dispatches, against one whose workers pull.

Both are whole fleets with the sim engine, stand for the whole run and are loaded in turn, with the load of
`overhead`: nothing waits, so what is added is the way through the scheduler.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from benchmarks import fleet, journal, overhead, results
from benchmarks.load import Load

STREAMS = {1: 40, 32: 160}
"""Concurrent streams -> requests of one side in one round."""
ROUNDS = 6
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
            found[str(streams)] = journal.ttft(pairs)
    return {
        "rounds": rounds,
        "ttft_ms": overhead.TTFT_MS,
        "itl_ms": overhead.ITL_MS,
        "tokens": overhead.TOKENS,
        "streams": found,
        "cores_used_by_others": max(foreign),
    }


if __name__ == "__main__":
    results.main("handing", run)
