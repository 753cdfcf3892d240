"""Continuous against static batching on real vLLM: the same arrivals, lengths and batch size.

Static: up to BATCH requests are collected, or as many as have come within WAIT of the first, and run
until the longest of them has ended; then the next. vLLM drops a finished sequence from its steps, so
this baseline is kinder than the classic one, which computes padding to the end.
Continuous: each request goes to the engine when it arrives; vLLM holds at most BATCH at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import direct_vllm, results
from ops import demo_model
from workers.config import VllmConfig

BATCH = 16
WAIT = 0.5
"""Seconds a static batch waits for company after its first request."""
MEAN_TOKENS, MAX_TOKENS, MIN_TOKENS = 64, 256, 4

LOAD = 0.7
"""Offered load of the latency runs, of what continuous batching can do."""

Generate = Callable[[str, int], Awaitable[object]]
"""Run one prompt for so many output tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    """Seconds after the start."""
    prompt: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of all requests over the time from first arrival to last end; latencies in seconds."""

    tokens_per_s: float
    latencies: list[float]


def arrivals(rate: float, count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals at `rate` a second; output lengths exponential, cut to the stated range."""
    dice = random.Random(seed)
    at, plan = 0.0, []
    for number in range(count):
        at += dice.expovariate(rate)
        tokens = round(min(MAX_TOKENS, max(MIN_TOKENS, dice.expovariate(1 / MEAN_TOKENS))))
        words = " ".join(["wheel", "mill", "water", "race"][: dice.randint(1, 4)] * dice.randint(1, 12))
        plan.append(Arrival(at, f"Story {number} of the {words}:", tokens))
    return plan


async def continuous(generate: Generate, plan: Sequence[Arrival]) -> Run:
    """Hand each request to the engine as it arrives."""
    start = time.perf_counter()

    async def one(arrival: Arrival) -> float:
        await asyncio.sleep(start + arrival.at - time.perf_counter())
        await generate(arrival.prompt, arrival.tokens)
        return time.perf_counter() - start

    return _run(plan, await asyncio.gather(*map(one, plan)))


async def static(generate: Generate, plan: Sequence[Arrival]) -> Run:
    """Run whole batches, one after another."""
    start = time.perf_counter()
    ended: list[float] = []

    async def one(arrival: Arrival) -> None:
        await generate(arrival.prompt, arrival.tokens)

    index = 0
    while index < len(plan):
        await asyncio.sleep(start + plan[index].at - time.perf_counter())
        closes = max(plan[index].at + WAIT, time.perf_counter() - start)
        batch = [arrival for arrival in plan[index : index + BATCH] if arrival.at <= closes]
        full = len(batch) == BATCH
        ready = start + (batch[-1].at if full else closes)
        await asyncio.sleep(ready - time.perf_counter())
        await asyncio.gather(*map(one, batch))
        # A static batch answers when all of it is done.
        ended += [time.perf_counter() - start] * len(batch)
        index += len(batch)
    return _run(plan, ended)


def _run(plan: Sequence[Arrival], ended: Sequence[float]) -> Run:
    tokens = sum(arrival.tokens for arrival in plan)
    latencies = [end - arrival.at for end, arrival in zip(ended, plan, strict=True)]
    return Run(tokens / (max(ended) - plan[0].at), latencies)


async def compare(quick: bool) -> dict[str, Any]:
    """Capacity from requests that all come at once, then latencies at LOAD of continuous capacity."""
    count, rounds = (32, 1) if quick else (160, 2)
    model = demo_model.ensure(Path(".data"), progress=True)
    async with direct_vllm.direct(VllmConfig(model=str(model), max_num_seqs=BATCH)) as engine:
        await asyncio.gather(*(engine.chat("Warm up.", 8) for _ in range(BATCH)))
        flooded: list[dict[str, Run]] = []
        paced: list[dict[str, Run]] = []
        rate = 0.0
        for number in range(rounds):
            plan = arrivals(1e6, count, seed=number)
            flooded.append(await _both(engine.chat, plan))
            rate = rate or LOAD * flooded[0]["continuous"].tokens_per_s * count / _tokens(plan)
            paced.append(await _both(engine.chat, arrivals(rate, count, seed=100 + number)))
    return {
        "batch": BATCH,
        "requests": count,
        "rounds": rounds,
        "mean_tokens": _tokens(arrivals(1, count, seed=0)) / count,
        "load": LOAD,
        "rate_per_s": rate,
        "throughput": {
            "continuous_tokens_per_s": results.spread([run["continuous"].tokens_per_s for run in flooded]),
            "static_tokens_per_s": results.spread([run["static"].tokens_per_s for run in flooded]),
            "ratio": results.spread(
                [run["continuous"].tokens_per_s / run["static"].tokens_per_s for run in flooded]
            ),
        },
        "latency": {f"p{p}": _latency(paced, p) for p in (50, 99)},
    }


async def _both(generate: Generate, plan: Sequence[Arrival]) -> dict[str, Run]:
    runs = {"static": await static(generate, plan), "continuous": await continuous(generate, plan)}
    results.say("  " + ", ".join(f"{name} {run.tokens_per_s:.0f} tok/s" for name, run in runs.items()))
    return runs


def _latency(runs: Sequence[dict[str, Run]], p: float) -> dict[str, Any]:
    static_s = [results.percentile(run["static"].latencies, p) for run in runs]
    continuous_s = [results.percentile(run["continuous"].latencies, p) for run in runs]
    ratios = [slow / fast for slow, fast in zip(static_s, continuous_s, strict=True)]
    return {
        "static_s": results.spread(static_s),
        "continuous_s": results.spread(continuous_s),
        "ratio": results.spread(ratios),
    }


def _tokens(plan: Sequence[Arrival]) -> int:
    return sum(arrival.tokens for arrival in plan)


def run(quick: bool) -> dict[str, Any]:
    return asyncio.run(compare(quick))


if __name__ == "__main__":
    results.main("batching", run)
