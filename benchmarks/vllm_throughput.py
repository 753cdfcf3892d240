"""Tokens a second of real vLLM through Headrace, against AsyncLLM called directly.

Two engines with the same model and settings stand for the whole run, each in its own processes, and
are loaded in turn. Greedy, `ignore_eos`, the same prompts in a closed loop; through Headrace they go the
whole way: HTTP, queue, worker, vLLM's OpenAI application, journaled frames, SSE.

On CPU the engine has work for every core, so what the serving processes use is taken from it: that is
measured too.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from benchmarks import fleet, quiet, results
from benchmarks.load import Load, measure
from broker import processes
from ops import demo_model

TOKENS = 64
STREAMS = {1: 6, 8: 32, 32: 128}
"""Concurrent streams -> requests of one side in one round."""
ROUNDS = 3

SERVING = ("ingress", "nats-server", "worker", "scheduler")
"""Parts of Headrace; the engine is a process of its own, the worker's child."""

Generate = Callable[[int, int], float]
"""(concurrent streams, requests) -> tokens a second."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way to the engine, and the processes on it that are not the engine's."""

    load: Generate
    serving: Sequence[psutil.Process]


@dataclass(frozen=True, slots=True)
class Run:
    tokens_per_s: float
    serving_ms_per_token: float


def run(quick: bool) -> dict[str, Any]:
    model = demo_model.ensure(Path(".data"), progress=True)
    rounds = 1 if quick else ROUNDS
    with fleet.up("vllm", vllm__model=model) as up, _direct(model) as direct:
        through = functools.partial(_through, up.url, model.name)
        sides = {"direct": direct, "headrace": Side(through, [up.part(name) for name in SERVING])}
        for side in sides.values():
            side.load(8, 8)
        taken: dict[int, list[dict[str, Run]]] = {streams: [] for streams in STREAMS}
        foreign = []
        for number in range(rounds):
            for streams, requests in STREAMS.items():
                count = streams if quick else requests
                order = sorted(sides, reverse=bool(number % 2))
                pair, others = quiet.undisturbed(functools.partial(_pair, sides, order, streams, count))
                foreign.append(others)
                taken[streams].append(pair)
                shown = ", ".join(f"{side} {run.tokens_per_s:.1f} tok/s" for side, run in pair.items())
                results.say(f"  round {number + 1}, {streams} streams: {shown}")
    return {
        "model": model.name,
        "tokens": TOKENS,
        "rounds": rounds,
        "cores_used_by_others": max(foreign),
        "streams": {str(streams): _summary(pairs) for streams, pairs in taken.items()},
    }


def _pair(sides: dict[str, Side], order: list[str], streams: int, requests: int) -> dict[str, Run]:
    return {name: _run(sides[name], streams, requests) for name in order}


def _run(side: Side, streams: int, requests: int) -> Run:
    before = sum(map(fleet.cpu_seconds, side.serving))
    rate = side.load(streams, requests)
    spent = sum(map(fleet.cpu_seconds, side.serving)) - before
    return Run(rate, spent / (requests * TOKENS) * 1000)


def _summary(pairs: list[dict[str, Run]]) -> dict[str, Any]:
    ratios = [pair["headrace"].tokens_per_s / pair["direct"].tokens_per_s for pair in pairs]
    found: dict[str, Any] = {"ratio": results.spread(ratios)}
    for side in ("direct", "headrace"):
        runs = [pair[side] for pair in pairs]
        found[f"{side}_tokens_per_s"] = results.spread([run.tokens_per_s for run in runs])
        found[f"{side}_serving_ms_per_token"] = results.spread([run.serving_ms_per_token for run in runs])
    return found


def _through(url: str, model: str, streams: int, requests: int) -> float:
    greedy = {"temperature": 0, "ignore_eos": True}
    load = Load(url, model, streams, requests, TOKENS, one_event_per_token=False, extra=greedy)
    result = measure(load)
    if result.failures:
        raise RuntimeError(f"{len(result.failures)} of {requests} streams failed: {result.failures[0]}")
    return result.tokens / result.wall


@contextlib.contextmanager
def _direct(model: Path) -> Iterator[Side]:
    """AsyncLLM in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.direct_vllm", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=processes.bound_to_me(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(streams: int, requests: int) -> float:
        asked = {"streams": streams, "requests": requests, "tokens": TOKENS}
        stdin.write(orjson.dumps(asked) + b"\n")
        stdin.flush()
        answer = orjson.loads(stdout.readline())
        if answer["tokens"] != requests * TOKENS:
            raise RuntimeError(f"{answer['tokens']} tokens instead of {requests * TOKENS}")
        return float(answer["tokens"] / answer["wall"])

    try:
        if stdout.readline() != b"\n":
            raise RuntimeError("the direct engine did not start")
        yield Side(run, [psutil.Process(process.pid)])
    finally:
        stdin.close()
        fleet.stop(process)
        stdout.close()


if __name__ == "__main__":
    results.main("vllm_throughput", run)
