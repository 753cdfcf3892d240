"""What Headrace adds to TTFT and ITL: the sim engine over plain HTTP against the same behind the queue.

Both sides stand for the whole run and are loaded in turn, the order changing each round. Durable (each
request synced to disk before it is acknowledged) and journaled. The load, and all parts of Headrace,
share the machine. Beside it, in the same run and at the same rate of requests, what the broker alone
takes (`floor`).
"""

from __future__ import annotations

import functools
from typing import Any

from benchmarks import fleet, floor, quiet, results
from benchmarks.load import Load, Result, measure

TTFT_MS = ITL_MS = 20
TOKENS = 40
STREAMS = {1: 8, 32: 160, 100: 400, 200: 800}
"""Concurrent streams -> requests of one side in one round."""
ROUNDS = 3
PERCENTILES = (50, 99)


def run(quick: bool) -> dict[str, Any]:
    engine = {"sim__ttft_ms": TTFT_MS, "sim__itl_ms": ITL_MS}
    rounds, share = (1, 4) if quick else (ROUNDS, 1)
    with fleet.sim_engine(**engine) as direct, fleet.up("sim", **engine) as up:
        urls = {"direct": direct.url, "headrace": up.url}
        for url in urls.values():
            _measure(url, 32, 64)
        taken: dict[int, list[dict[str, Result]]] = {streams: [] for streams in STREAMS}
        floors: dict[int, list[list[float]]] = {streams: [] for streams in STREAMS}
        foreign = []
        for number in range(rounds):
            for streams, requests in STREAMS.items():
                order = sorted(urls, reverse=bool(number % 2))
                count = max(streams, requests // share)
                pair, others = quiet.undisturbed(functools.partial(_pair, urls, order, streams, count))
                foreign.append(others)
                taken[streams].append(pair)
                rate = streams / (TTFT_MS + TOKENS * ITL_MS) * 1000
                trips, others = quiet.undisturbed(functools.partial(floor.round_trips, rate, count))
                foreign.append(others)
                floors[streams].append(trips)
                results.say(f"  round {number + 1}, {streams} streams: {_line(pair)}")
        memory = {name: round(fleet.rss_mib(up.part(name)), 1) for name in ("ingress", "worker")}
    return {
        "ttft_ms": TTFT_MS,
        "itl_ms": ITL_MS,
        "tokens": TOKENS,
        "rounds": rounds,
        "cores_used_by_others": max(foreign),
        "rss_mib_after": memory,
        "streams": {str(streams): _summary(pairs, floors[streams]) for streams, pairs in taken.items()},
    }


def _pair(urls: dict[str, str], order: list[str], streams: int, requests: int) -> dict[str, Result]:
    pair = {side: _measure(urls[side], streams, requests) for side in order}
    if pair["direct"].digest != pair["headrace"].digest:
        raise RuntimeError("the two sides answered differently: nothing is measured")
    return pair


def _measure(url: str, streams: int, requests: int) -> Result:
    length = (TTFT_MS + TOKENS * ITL_MS) / 1000
    load = Load(url, "sim", streams, requests, TOKENS, spread=length, think=ITL_MS / 1000)
    result = measure(load)
    if result.failures:
        raise RuntimeError(f"{len(result.failures)} of {requests} streams failed: {result.failures[0]}")
    return result


def added(pair: dict[str, Result], what: str, p: float) -> float:
    """Difference of the two sides' percentiles, in ms."""
    slow, fast = (results.percentile(getattr(pair[side], what), p) for side in ("headrace", "direct"))
    return (slow - fast) * 1000


def _summary(pairs: list[dict[str, Result]], floors: list[list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"requests": sum(len(pair["headrace"].ttft) for pair in pairs)}
    for p in PERCENTILES:
        found[f"floor_p{p}_ms"] = results.spread([results.percentile(trips, p) * 1000 for trips in floors])
    for name, what in (("ttft", "ttft"), ("itl", "gaps")):
        for p in PERCENTILES:
            found[f"added_{name}_p{p}_ms"] = results.spread([added(pair, what, p) for pair in pairs])
            for side in ("direct", "headrace"):
                values = [results.percentile(getattr(pair[side], what), p) * 1000 for pair in pairs]
                found[f"{side}_{name}_p{p}_ms"] = results.spread(values)
    return found


def _line(pair: dict[str, Result]) -> str:
    parts = [
        f"{name} p{p} {added(pair, what, p):+.2f} ms"
        for name, what in (("TTFT", "ttft"), ("ITL", "gaps"))
        for p in PERCENTILES
    ]
    return "added " + ", ".join(parts)


if __name__ == "__main__":
    results.main("overhead", run)
