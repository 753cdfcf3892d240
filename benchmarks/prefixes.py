"""Requests that share system prompts, on two real vLLM workers: a scheduler that hands them out, against
workers that pull them first come, first served.

Each worker's KV cache has room for what it runs and about half of the prompts: both together hold all of
them, neither does alone. The same workers serve both sides in turn, each round with prompts of its own,
which nobody has cached. Each engine computes in one thread, since they share what cores there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import fleet, quiet, results, stages
from benchmarks.load import Load, Result, measure
from broker.server import NatsServer
from ops import demo_model

PROMPTS, WORDS = 8, 450
"""System prompts, and words in each: about 500 tokens."""
CACHE_BYTES = 56 * 2**20
"""Of a worker: 2,500 tokens of the demo model, five prompts, those of what runs included."""
KV_BYTES = 30 * 2 * 3 * 64 * 2
"""Of a token: 30 layers of keys and values, 3 heads of 64 numbers of two bytes."""
CLIENTS, REQUESTS, TOKENS = 4, 96, 8
THINK = 0.1
"""Seconds between a client's requests, on average."""
ROUNDS = 2
SIDES = {"fifo": False, "dispatched": True}

_WORDS = """
always answer the question in plain words and keep to what you know name a source where there is one say
so when you are not sure of it never tell others about these rules be kind short exact and calm a
customer may write from any country about an order price delivery day return letter bill or broken part
of the machine
"""


def prompts(dice: random.Random) -> list[str]:
    return [" ".join(dice.choices(_WORDS.split(), k=WORDS)) for _ in range(PROMPTS)]


def load(url: str, model: str, requests: int, seed: int, side: str) -> Load:
    """Chats that begin with one of the prompts, drawn by Zipf's law."""
    systems = prompts(random.Random(f"{seed} {side}"))
    dice = random.Random(seed)  # both sides draw alike
    weights = [1 / rank for rank in range(1, PROMPTS + 1)]
    drawn = dice.choices(systems, weights, k=requests)
    return Load(
        url,
        model,
        CLIENTS,
        requests,
        TOKENS,
        think=THINK,
        one_event_per_token=False,
        seed=seed,
        extra={"temperature": 0, "ignore_eos": True},
        each=[
            {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"Question {number}: what does the mill do?"},
                ]
            }
            for number, system in enumerate(drawn)
        ],
    )


@contextlib.contextmanager
def worker(nats: str, name: str, model: Path) -> Iterator[None]:
    settings = {"model": model, "max_model_len": 1024, "kv_cache_bytes": CACHE_BYTES}
    of_engine = {f"vllm__{key}": value for key, value in settings.items()}
    with fleet.joined("worker", nats, worker__name=name, worker__engine="vllm", **of_engine):
        yield


async def measured(quick: bool) -> dict[str, Any]:
    model = demo_model.ensure(Path(".data"), progress=True)
    requests, rounds = (REQUESTS // 4, 1) if quick else (REQUESTS, ROUNDS)
    taken: dict[str, list[Result]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch, contextlib.ExitStack() as stack:
        async with NatsServer(Path(scratch) / "nats") as server:
            stack.enter_context(stages.single_threaded())
            for name in ("one", "two"):  # one after the other: two that load at once take longer
                stack.enter_context(worker(server.url, name, model))
            url = stack.enter_context(fleet.joined("ingress", server.url))
            for number in range(rounds):
                for side in sorted(SIDES, reverse=bool(number % 2)):
                    async with stages.scheduler(server.url, dispatches=SIDES[side]):
                        asked = load(url, model.name, requests, seed=len(taken[side]), side=side)
                        result = await asyncio.to_thread(measure, asked)
                    if result.failures:
                        raise RuntimeError(f"{len(result.failures)} failed: {result.failures[0]}")
                    taken[side].append(result)
                    results.say(f"  round {number + 1}, {side}: {_figures([result])}")
            stack.close()
    found = {side: _figures(rounds) for side, rounds in taken.items()}
    return {
        "model": model.name,
        "prompts": PROMPTS,
        "prompt_tokens": round(sum(each.prompt_tokens for each in taken["fifo"]) / (rounds * requests)),
        "cache_tokens": CACHE_BYTES // KV_BYTES,
        "clients": CLIENTS,
        "requests": requests,
        "tokens": TOKENS,
        "rounds": rounds,
        "sides": found,
        "ratio": {p: found["fifo"][p] / found["dispatched"][p] for p in ("ttft_p50_ms", "ttft_p99_ms")},
    }


def _figures(taken: list[Result]) -> dict[str, float]:
    times = [seconds for result in taken for seconds in result.ttft]
    return {
        "hit_rate": sum(each.cached_tokens for each in taken) / sum(each.prompt_tokens for each in taken),
        "ttft_p50_ms": 1000 * results.percentile(times, 50),
        "ttft_p99_ms": 1000 * results.percentile(times, 99),
        "requests_per_s": len(times) / sum(each.wall for each in taken),
    }


if __name__ == "__main__":
    results.main("prefixes", lambda quick: quiet.noted(lambda: asyncio.run(measured(quick))))
