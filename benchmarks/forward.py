"""SSE events a second that one ingress process forwards, against the sim's app served directly.

The server under test has core 0 for itself, everything else is on core 1: the load, and for Headrace
nats-server and the source of the frames too. So that core 1 keeps up, the frames come from
`frame_source`, which publishes prebuilt ones at the same pace as the sim makes its tokens.

Paced: 20 ms between tokens, neither server is busy; what counts is events for a second of its CPU time.
Saturated: tokens fall due faster than either server can send them. Both then join what waits into one write.
"""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager
from typing import Any

import psutil

from benchmarks import fleet, frame_source, quiet, results
from benchmarks.load import Load, Result, measure

SERVER_CORE, OTHER_CORE = 0, 1
TOKENS = 200
STREAMS = 200
PACES = {"paced": (20.0, 400), "saturated": (2.0, 1600)}
"""Name -> ms between two tokens of a stream, requests in one round."""
ROUNDS = 3


def run(quick: bool) -> dict[str, Any]:
    if len(psutil.Process().cpu_affinity() or []) < 2:
        raise RuntimeError("two cores are needed: one for the server under test, one for all else")
    found: dict[str, Any] = {"streams": STREAMS, "tokens": TOKENS, "rounds": 1 if quick else ROUNDS}
    for pace, (itl_ms, requests) in PACES.items():
        found[pace] = _at_pace(pace, itl_ms, STREAMS if quick else requests, found["rounds"])
    return found


def _at_pace(pace: str, itl_ms: float, requests: int, rounds: int) -> dict[str, Any]:
    taken: dict[str, list[dict[str, float]]] = {"direct": [], "headrace": []}
    with (
        fleet.sim_engine(sim__ttft_ms=itl_ms, sim__itl_ms=itl_ms) as direct,
        fleet.up("sim") as up,
        _frames(up.nats, itl_ms),
    ):
        for child in up.root.children():
            fleet.pin(child, OTHER_CORE)
        servers = {
            "direct": (direct, direct.root, "sim"),
            "headrace": (up, up.part("ingress"), frame_source.MODEL),
        }
        for _, process, _ in servers.values():
            fleet.pin(process, SERVER_CORE)
        for number in range(rounds):
            for side, (server, process, model) in servers.items():
                load = Load(server.url, model, STREAMS, requests, TOKENS, spread=itl_ms / 1000)
                run, _ = quiet.undisturbed(functools.partial(_measure, load, process))
                taken[side].append(run)
                results.say(f"  {pace}, round {number + 1}, {side}: {taken[side][-1]}")
    return _summary(itl_ms, taken)


def _measure(load: Load, server: psutil.Process) -> dict[str, float]:
    cpu = fleet.cpu_seconds(server)
    result: Result = measure(load, core=OTHER_CORE)
    cpu = fleet.cpu_seconds(server) - cpu
    if result.failures:
        raise RuntimeError(f"{len(result.failures)} of {load.requests} streams failed: {result.failures[0]}")
    return {
        "events_per_s": round(result.events / result.wall),
        "events_per_cpu_s": round(result.events / cpu),
        "core_used": round(cpu / result.wall, 3),
    }


def _summary(itl_ms: float, taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"itl_ms": itl_ms}
    for what in ("events_per_s", "events_per_cpu_s", "core_used"):
        found |= {
            f"{side}_{what}": results.spread([run[what] for run in runs]) for side, runs in taken.items()
        }
        pairs = zip(taken["headrace"], taken["direct"], strict=True)
        found[f"{what}_ratio"] = results.spread([ours[what] / theirs[what] for ours, theirs in pairs])
    return found


def _frames(nats: str, itl_ms: float) -> AbstractContextManager[None]:
    command = [sys.executable, "-m", "benchmarks.frame_source", nats, str(TOKENS), str(itl_ms)]
    return fleet.helper(["taskset", "-c", str(OTHER_CORE), *command])


if __name__ == "__main__":
    results.main("forward", run)
