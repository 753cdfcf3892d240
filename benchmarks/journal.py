"""What the journal, and the code that recovers from losses, cost where nothing is lost: with and without.

Both sides are whole fleets with the sim engine, stand for the whole run and are loaded in turn. `bare` says
what one of them lacks; it starts both, so that they are the same processes otherwise.

Saturated: an engine that takes no time, so that nats-server, ingress and worker share the machine with the
load and use all of it. No engine that takes time leaves them so little. Paced: the load of `overhead`.

Memory: what the journal holds, and nats-server's resident memory, after 1,000 streams and when it is full.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import nats
import psutil
import uvloop

from benchmarks import bare, fleet, overhead, quiet, results
from benchmarks.load import Load, Result, measure
from broker import subjects
from broker.config import BrokerConfig

SIDES = {"on": "nothing", "off": ",".join(bare.ALL)}
PARTS = ("ingress", "worker", "nats-server", "scheduler")
PERCENTILES = (50, 99)

SATURATED = 64, 384, 200
"""Streams, requests of one side in one round, tokens of each request."""
STREAMS = {32: 160, 200: 400}
"""Paced: concurrent streams -> requests of one side in one round."""
ROUNDS = 6
FREE = {"sim__beta0": 0.01, "sim__beta1": 0, "sim__beta2": 0}
"""Settings of an engine that takes no time. Its steps follow the turns of the worker's event loop, so that
each token still has a frame of its own."""
STORED = 1000, 200
"""Memory: streams, and tokens of each."""


def run(quick: bool) -> dict[str, Any]:
    rounds, share = (1, 4) if quick else (ROUNDS, 1)
    foreign: list[float] = []
    with _both(**FREE) as ups:
        streams, requests, tokens = SATURATED
        load = functools.partial(Load, model="sim", streams=streams, requests=requests // share)
        saturated = pairs("saturated", ups, rounds, foreign, functools.partial(load, max_tokens=tokens))
    paced = {}
    with _both(sim__ttft_ms=overhead.TTFT_MS, sim__itl_ms=overhead.ITL_MS) as ups:
        for streams, requests in STREAMS.items():
            of = functools.partial(paced_load, streams=streams, requests=max(streams, requests // share))
            paced[str(streams)] = pairs(f"{streams} streams", ups, rounds, foreign, of)
    return {
        "rounds": rounds,
        "saturated": {
            "streams": SATURATED[0],
            "tokens": SATURATED[2],
            **speed(saturated),
            **_cpu(saturated),
        },
        "paced": {
            "ttft_ms": overhead.TTFT_MS,
            "itl_ms": overhead.ITL_MS,
            "tokens": overhead.TOKENS,
            "streams": {streams: speed(pairs) | ttft(pairs) for streams, pairs in paced.items()},
        },
        "memory": _memory(STORED[0] // (10 * share if quick else 1)),
        "cores_used_by_others": max(foreign),
    }


Run = tuple[Result, dict[str, float]]
"""What the load found, and the CPU seconds of each part meanwhile."""
Pair = dict[str, Run]


@contextlib.contextmanager
def _both(**engine: object) -> Iterator[dict[str, fleet.Running]]:
    """A fleet for each side, warmed up."""
    with contextlib.ExitStack() as stack:
        ups = {}
        for side, off in SIDES.items():
            # No scheduler dispatches on the one side, so none may on the other.
            alike = {**engine, "dispatch__enabled": False}
            ups[side] = stack.enter_context(fleet.up_by(["benchmarks.bare", off], "sim", alike))
            measured(Load(ups[side].url, "sim", 32, 64, 40), ups[side])
        yield ups


def paced_load(url: str, streams: int, requests: int) -> Load:
    length = (overhead.TTFT_MS + overhead.TOKENS * overhead.ITL_MS) / 1000
    think = overhead.ITL_MS / 1000
    return Load(url, "sim", streams, requests, overhead.TOKENS, spread=length, think=think)


def pairs(
    name: str, ups: dict[str, fleet.Running], rounds: int, foreign: list[float], load: Callable[[str], Load]
) -> list[Pair]:
    """Both sides under one load, `rounds` times, in changing order; the cores of others go to `foreign`."""
    pairs = []
    for number in range(rounds):
        order = sorted(ups, reverse=bool(number % 2))
        pair, cores = quiet.undisturbed(functools.partial(_pair, ups, order, load))
        foreign.append(cores)
        pairs.append(pair)
        results.say(f"  {name}, round {number + 1}: {_line(pair)}")
    return pairs


def _pair(ups: dict[str, fleet.Running], order: list[str], load: Callable[[str], Load]) -> Pair:
    pair = {side: measured(load(ups[side].url), ups[side]) for side in order}
    if pair["on"][0].digest != pair["off"][0].digest:
        raise RuntimeError("the two sides answered differently: nothing is measured")
    return pair


def measured(load: Load, up: fleet.Running) -> Run:
    parts = {name: up.part(name) for name in PARTS}
    before = {name: fleet.cpu_seconds(part) for name, part in parts.items()}
    result = measure(load)
    if result.failures:
        raise RuntimeError(f"{len(result.failures)} of {load.requests} streams failed: {result.failures[0]}")
    return result, {name: fleet.cpu_seconds(part) - before[name] for name, part in parts.items()}


def _rate(run: Run) -> float:
    return run[0].tokens / run[0].wall


def _line(pair: Pair) -> str:
    rates = ", ".join(f"{side} {_rate(pair[side]):,.0f} tokens/s" for side in SIDES)
    added = (added_ttft(pair, p) for p in PERCENTILES)
    return rates + ", added TTFT " + ", ".join(f"{ms:+.2f} ms" for ms in added)


def added_ttft(pair: Pair, p: float) -> float:
    """Difference of the two sides' percentiles, in ms."""
    on, off = (results.percentile(pair[side][0].ttft, p) for side in ("on", "off"))
    return (on - off) * 1000


def speed(pairs: list[Pair]) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{side}_tokens_per_s": results.spread([_rate(pair[side]) for pair in pairs]) for side in SIDES
    }
    ratios = [_rate(pair["on"]) / _rate(pair["off"]) for pair in pairs]
    return found | {"tokens_per_s_ratio": results.spread(ratios)}


def ttft(pairs: list[Pair]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for p in PERCENTILES:
        found[f"added_ttft_p{p}_ms"] = results.spread([added_ttft(pair, p) for pair in pairs])
        for side in SIDES:
            values = [results.percentile(pair[side][0].ttft, p) * 1000 for pair in pairs]
            found[f"{side}_ttft_p{p}_ms"] = results.spread(values)
    return found


def _cpu(pairs: list[Pair]) -> dict[str, Any]:
    """Microseconds of CPU time for a token, by part."""
    found: dict[str, Any] = {
        f"{side}_us_per_token": {
            name: results.spread([_us(pair[side], name) for pair in pairs]) for name in PARTS
        }
        for side in SIDES
    }
    added = {name: [_us(pair["on"], name) - _us(pair["off"], name) for pair in pairs] for name in PARTS}
    return found | {"added_us_per_token": {name: results.spread(us) for name, us in added.items()}}


def _us(run: Run, part: str) -> float:
    return run[1][part] / run[0].tokens * 1e6


def _memory(streams: int) -> dict[str, Any]:
    """Load a new fleet with `streams` at a time until its journal forgets the first of them."""
    with fleet.up_by(["ops"], "sim", FREE) as up:
        server, worker = up.part("nats-server"), up.part("worker")
        measured(Load(up.url, "sim", 32, 32, 40), up)
        found: dict[str, Any] = {"streams": streams, "tokens": STORED[1], "limit": _limit()}
        before = _stored(up.nats, server, worker)
        load = Load(up.url, "sim", SATURATED[0], streams, STORED[1])
        measured(load, up)
        after = _stored(up.nats, server, worker)
        found |= {"before": before, "after": after}
        full = after
        while streams == STORED[0] and full["first"] == 1:
            measured(load, up)
            full = _stored(up.nats, server, worker)
            results.say(f"  the journal holds {full['bytes'] / 2**20:.0f} MiB: {full}")
        return found | {"full": full}


def _limit() -> int:
    return int(BrokerConfig.model_fields["journal_bytes"].default)


def _stored(url: str, server: psutil.Process, worker: psutil.Process) -> dict[str, Any]:
    state = uvloop.run(_state(url))
    return state | {"nats_mib": fleet.rss_mib(server), "worker_mib": fleet.rss_mib(worker)}


async def _state(url: str) -> dict[str, int]:
    """What the journal holds: messages, their bytes as the server counts them, and the first one's number."""
    connection = await nats.connect(url)
    try:
        state = (await connection.jetstream().stream_info(subjects.REPLIES)).state
    finally:
        await connection.close()
    return {"messages": state.messages, "bytes": state.bytes, "first": state.first_seq}


if __name__ == "__main__":
    results.main("journal", run)
