"""Many adapters on one engine: the time until a request of one is scheduled, and who waits where they are
more than slots.

- Real vLLM, one request at a time, so that nothing else is waited for. `slotted`: the adapter has a slot.
  `swap`: it is in memory, and another has its slot. `cold`: it lies in the object store only. `wanted`:
  likewise, but it was asked for beforehand, as an ingress does while the request is queued. Measured from the
  worker's taking the request to vLLM's first step with it and to its first token, as the usage event tells.
- The sim engine under Poisson arrivals, adapters drawn by Zipf's law: turns as workers give them, against an
  engine that is handed everything and passes over what has no slot.
- Resident memory of one engine with all adapters loaded, against an engine for each.

Everything but EngineCore and nats-server runs in this process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import fleet, results, stages
from broker import subjects
from broker.messages import UsageEvent
from ops import demo_model
from workers.config import SimConfig, VllmConfig
from workers.engines import sim, vllm

ADAPTERS, SLOTS = 20, 8
TOKENS = 32
RATES = (20.0, 40.0, 80.0)
"""Requests a second to the sim engine; at about 30 more adapters are asked for at once than it has slots."""
LOAD_MS = 20.0
"""Time that the sim engine takes to load an adapter: what vLLM took here."""


# Real vLLM


async def on_cpu(quick: bool) -> dict[str, Any]:
    count, rounds = (5, 4) if quick else (ADAPTERS, 8)
    model = demo_model.ensure(Path(".data"), progress=True)
    config = VllmConfig(model=str(model), adapter_slots=2, adapters_in_memory=2 * ADAPTERS)
    engine = await vllm.start(config)
    try:
        async with stages.staged(engine) as stage:
            return {"model": model.name, **await first_steps(stage, model, count, rounds)}
    finally:
        await engine.close()


async def first_steps(stage: stages.Stage, model: Path, count: int, rounds: int) -> dict[str, Any]:
    """How long requests of `count` new adapters of `model` take to their first scheduled step and to their
    first token, one at a time; and the memory that the adapters take."""
    await stage.ask(stage.base_model, 4)
    before = _memory()
    adapters = await stage.push(count, model)
    events = {"cold": await stage.each(adapters)}
    after = _memory()
    swaps = stages.swaps()
    events["swap"] = await stage.each(adapters * rounds)
    swaps = stages.swaps() - swaps
    events["slotted"] = await stage.each(adapters[-1:] * len(events["swap"]))
    events["wanted"] = []
    for adapter in await stage.push(count, model):
        await stage.broker.publish(subjects.want(stage.base_model, adapter))
        await stage.state(adapter, "ready")
        events["wanted"] += await stage.each([adapter])
    events["base"] = await stage.each([stage.base_model] * len(events["swap"]))
    found = {name: times(events[name]) for name in ("base", "slotted", "swap", "wanted", "cold")}
    for name, each in found.items():
        shown = ", ".join(
            f"{what} p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms" for what, ms in each.items()
        )
        results.say(f"  {name}: {shown} of {len(events[name])}")
    results.say(f"  memory: {before:.0f} MiB, with {count} adapters {after:.0f} MiB")
    return {
        "adapters": count,
        "swaps": swaps,
        **{
            f"{what}_ms": {name: {"count": len(events[name]), **each[what]} for name, each in found.items()}
            for what in ("wait", "first_token")
        },
        "memory_mib": {"base": before, "with_adapters": after, "an_engine_each": count * before},
    }


def _memory() -> float:
    """MiB of this process and of EngineCore."""
    own = psutil.Process()
    return sum(fleet.rss_mib(process) for process in (own, *own.children()) if "nats" not in process.name())


def times(events: Sequence[UsageEvent]) -> dict[str, dict[str, float]]:
    """Milliseconds from the worker's taking a request to its first scheduled step ("wait"), and to its first
    token: what the step itself does to have an adapter in a slot is in the latter only."""
    waits = [stages.wait(event) for event in events]
    tokens = [wait + (event.latency.prefill or 0.0) for wait, event in zip(waits, events, strict=True)]
    return {
        what: {f"p{p}": stages.ms(seconds, p) for p in (50, 99)}
        for what, seconds in (("wait", waits), ("first_token", tokens))
    }


# Traffic


class Zipf:
    """Draws from `models` by Zipf's law, the first the most often."""

    def __init__(self, models: Sequence[str]) -> None:
        self._models = models
        self._weights = [1 / rank for rank in range(1, len(models) + 1)]
        self._dice = random.Random(7)

    def draw(self) -> str:
        return self._dice.choices(self._models, self._weights)[0]

    def pause(self, rate: float) -> float:
        """Seconds until the next of Poisson arrivals."""
        return self._dice.expovariate(rate)


async def zipf(adapters: int, rate: float, seconds: float, *, turns: bool) -> dict[str, Any]:
    """Requests of `adapters` adapters at `rate` a second to the sim engine; without `turns` it is handed
    them all."""
    engine = await sim.start(SimConfig(adapter_slots=SLOTS, load_ms=LOAD_MS))
    if not turns:
        engine.adapter_slots = adapters
    async with stages.staged(engine) as stage:
        models = await stage.push(adapters)
        for model in models:
            await stage.ask(model, 1)  # all are in memory
        dice = Zipf(models)
        with stages.watched(engine) as watch:
            started, at = time.monotonic(), 0.0
            calls: list[asyncio.Task[UsageEvent]] = []
            while at < seconds:
                at += dice.pause(rate)
                await asyncio.sleep(started + at - time.monotonic())
                calls.append(asyncio.create_task(stage.ask(dice.draw(), TOKENS)))
            events = await asyncio.gather(*calls)
    await engine.close()
    found = {"adapters": adapters, "rate": rate, "turns": turns, **watch.figures(events)}
    results.say(f"  {found}")
    return found


async def measure(quick: bool) -> dict[str, Any]:
    seconds = 5.0 if quick else 20.0
    rates = RATES[-1:] if quick else RATES
    runs = [await zipf(ADAPTERS, rate, seconds, turns=turns) for rate in rates for turns in (True, False)]
    fitting = await zipf(SLOTS, rates[-1], seconds, turns=True)
    return {
        "slots": SLOTS,
        "tokens": TOKENS,
        "load_ms": LOAD_MS,
        "seconds": seconds,
        "zipf": runs,
        "all_fit": fitting,
        "vllm": await on_cpu(quick),
    }


def run(quick: bool) -> dict[str, Any]:
    return asyncio.run(measure(quick))


if __name__ == "__main__":
    results.main("adapters", run)
