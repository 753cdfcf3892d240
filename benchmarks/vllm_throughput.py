"""Tokens a second of real vLLM through Headrace, against AsyncLLM called directly.

Two engines with the same model and settings stand for the whole run, each in its own processes, and
are loaded in turn. Greedy, `ignore_eos`, the same prompts in a closed loop; through Headrace they go the
whole way: HTTP, queue, worker, vLLM's OpenAI application, journaled frames, SSE.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks import fleet, quiet, results
from benchmarks.load import Load, measure
from broker import processes
from ops import demo_model

TOKENS = 64
STREAMS = {1: 6, 8: 32, 32: 128}
"""Concurrent streams -> requests of one side in one round."""
ROUNDS = 3

Side = Callable[[int, int], float]
"""(concurrent streams, requests) -> tokens a second."""


def run(quick: bool) -> dict[str, Any]:
    model = demo_model.ensure(Path(".data"), progress=True)
    rounds = 1 if quick else ROUNDS
    with fleet.up("vllm", vllm__model=model) as up, _direct(model) as direct:
        sides: dict[str, Side] = {
            "direct": direct,
            "headrace": functools.partial(_through, up.url, model.name),
        }
        for side in sides.values():
            side(8, 8)
        taken: dict[int, list[dict[str, float]]] = {streams: [] for streams in STREAMS}
        foreign = []
        for number in range(rounds):
            for streams, requests in STREAMS.items():
                count = streams if quick else requests
                order = sorted(sides, reverse=bool(number % 2))
                pair, others = quiet.undisturbed(functools.partial(_pair, sides, order, streams, count))
                foreign.append(others)
                taken[streams].append(pair)
                shown = ", ".join(f"{side} {rate:.1f} tok/s" for side, rate in pair.items())
                results.say(f"  round {number + 1}, {streams} streams: {shown}")
    return {
        "model": model.name,
        "tokens": TOKENS,
        "rounds": rounds,
        "cores_used_by_others": max(foreign),
        "streams": {str(streams): _summary(pairs) for streams, pairs in taken.items()},
    }


def _pair(sides: dict[str, Side], order: list[str], streams: int, requests: int) -> dict[str, float]:
    return {side: sides[side](streams, requests) for side in order}


def _summary(pairs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "direct_tokens_per_s": results.spread([pair["direct"] for pair in pairs]),
        "headrace_tokens_per_s": results.spread([pair["headrace"] for pair in pairs]),
        "ratio": results.spread([pair["headrace"] / pair["direct"] for pair in pairs]),
    }


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
        yield run
    finally:
        stdin.close()
        fleet.stop(process)
        stdout.close()


if __name__ == "__main__":
    results.main("vllm_throughput", run)
