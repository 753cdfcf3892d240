"""What hurts an engine's KV cache most, on real vLLM with a small one: long prompts, long answers of unknown
length, and bursts, all at once, far more than it has room for.

The scheduler hands them to a worker in this process, whose engine tells after each step what it holds;
against it, the worker pulls by its own credit. Nobody but the caller knows how long an answer becomes: the
request does not say.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from benchmarks import quiet, results, stages
from broker.messages import UsageEvent
from ops import demo_model
from workers.config import VllmConfig
from workers.engines import vllm
from workers.engines.base import Engine, EngineStats

KV_BYTES = 138 * 2**20
"""Of the engine's cache: room for four contexts of the demo model."""
CONTEXT = 1536
SCALE = 8
FULL = 0.85
"""Share of the KV cache in use from which on it counts as filled: prompts take their time."""
MEAN_ANSWER = 200
"""Tokens of a long answer."""
_TOLD = 0.02
"""Seconds within which the worker is told of a step, while the next runs already. No step is as short."""
_WORDS = ("mill", "river", "wheel", "stone", "grain", "water", "race", "gate", "flour", "miller", "sluice")


@dataclass(frozen=True, slots=True)
class Ask:
    words: int
    tokens: int


def mix(scale: int) -> list[Ask]:
    """Requests in the order in which they are asked, all at once: of each kind `scale` times some."""
    dice = random.Random(3)
    long_prompts = [Ask(dice.randint(300, 900), dice.randint(4, 32)) for _ in range(3 * scale)]
    long_answers = [
        Ask(dice.randint(10, 60), min(700, 20 + int(dice.expovariate(1 / MEAN_ANSWER))))
        for _ in range(5 * scale)
    ]
    asks = long_prompts + long_answers
    dice.shuffle(asks)
    for _ in range(scale):  # bursts
        at = dice.randrange(len(asks))
        asks[at:at] = [Ask(dice.randint(5, 30), 8) for _ in range(8)]
    return asks


@dataclass
class Steps:
    """What the engine told after each step, and `at` which monotonic time. `queued` are steps while requests
    waited outside of it."""

    queued: list[EngineStats] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    asked: int = 0
    ended: int = 0

    def add(self, stats: EngineStats) -> None:
        held = REGISTRY.get_sample_value("headrace_running") or 0.0
        self.at.append(time.monotonic())
        if self.asked - self.ended > held:
            self.queued.append(stats)

    def between(self, event: UsageEvent, ended: float) -> int:
        """Steps that ended between a request's taking by the worker and the engine's first step with it. Its
        times are counted back from `ended`, when its event came: a moment late, and far less than a step."""
        assert event.latency.total is not None
        assert event.latency.queue is not None
        taken = ended - (event.latency.total - event.latency.queue)
        first = taken + stages.wait(event)
        return bisect.bisect(self.at, first + _TOLD) - bisect.bisect(self.at, taken)

    def figures(
        self, events: Sequence[tuple[UsageEvent, float]], seconds: float, preemptions: int
    ) -> dict[str, Any]:
        use = [1 - stats.kv_tokens_free / stats.kv_tokens_total for stats in self.queued]
        filled = next((at for at, share in enumerate(use) if share >= FULL), 0)
        use = use[filled:]
        waiting = [stats.waiting for stats in self.queued]
        waits = [self.between(*each) for each in events]
        return {
            "requests": len(events),
            "output_tokens": sum(event.completion_tokens for event, _ in events),
            "seconds": seconds,
            "steps": len(self.at),
            "queued_steps": len(self.queued),
            "filling_steps": filled,
            "preemptions": preemptions,
            "kv_use": sum(use) / len(use),
            "kv_use_p10": results.percentile(use, 10),
            "waiting": sum(waiting) / len(waiting),
            "waiting_p99": results.percentile(waiting, 99),
            "wait_steps": sum(waits) / len(waits),
            "wait_steps_p99": results.percentile(waits, 99),
        }


@contextlib.asynccontextmanager
async def engine(kv_bytes: int = KV_BYTES) -> AsyncIterator[Engine]:
    model = demo_model.ensure(Path(".data"), progress=True)
    config = VllmConfig(model=str(model), max_model_len=CONTEXT, kv_cache_bytes=kv_bytes)
    with stages.single_threaded():
        started = await vllm.start(config)
    try:
        yield started
    finally:
        await started.close()


async def measured(engine: Engine, asks: Sequence[Ask], *, dispatched: bool) -> dict[str, Any]:
    """Ask them all, and wait for all ends. Raises RuntimeError if one fails, or has not all its tokens."""
    async with contextlib.AsyncExitStack() as stack:
        stage = await stack.enter_async_context(stages.staged(engine))
        if dispatched:
            await stack.enter_async_context(stages.scheduler(stage.url, dispatches=True))
        steps = Steps()
        stack.enter_context(stages.each_step(engine, steps.add))
        started, before = time.monotonic(), engine.stats().preemptions

        async def ask(each: Ask) -> tuple[UsageEvent, float]:
            steps.asked += 1
            event = await stage.ask(engine.base, each.tokens, " ".join(dice.choices(_WORDS, k=each.words)))
            steps.ended += 1
            if event.completion_tokens != each.tokens:
                raise RuntimeError(f"{event.completion_tokens} tokens of {each.tokens}")
            return event, stage.ended[event.request_id]

        dice = random.Random(5)
        events = await asyncio.gather(*map(ask, asks))
        return steps.figures(events, time.monotonic() - started, engine.stats().preemptions - before)


async def run(quick: bool) -> dict[str, Any]:
    asks = mix(1 if quick else SCALE)
    async with engine() as started:
        found = {}
        for side, dispatched in (("pulled", False), ("dispatched", True)):
            found[side] = await measured(started, asks, dispatched=dispatched)
            results.say(f"  {side}: {found[side]}")
        total = started.stats().kv_tokens_total
    return {"model": demo_model.NAME, "kv_tokens": total, "mean_answer": MEAN_ANSWER, "sides": found}


if __name__ == "__main__":
    results.main("hostile", lambda quick: quiet.noted(lambda: asyncio.run(run(quick))))
