"""What a scheduler takes of a core to hear a fleet of 10 to 1,000 workers, each of which tells ten times a
second how it is.

A nats-server and a scheduler that dispatches, each a process. The workers are one more process, which says
what they would say and is sent nothing:

    python -m benchmarks.heartbeats NATS_URL WORKERS
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks import fleet, quiet, results
from broker import client, subjects
from broker.base import Message
from broker.config import BrokerConfig
from broker.messages import Credit, Dispatch, Heartbeat, ModelCard
from broker.server import NatsServer
from workers.dispatched import BEAT, SILENCE

FLEETS = (10, 100, 300, 1000)
SETTLE, SECONDS = 5.0, 15.0
"""Seconds before those that count, and of those."""


def run(quick: bool) -> dict[str, Any]:
    seconds = 1.0 if quick else SECONDS
    found, foreign = {}, []
    for workers in FLEETS:
        found[str(workers)], cores = quiet.undisturbed(lambda: uvloop.run(_measure(workers, seconds)))  # noqa: B023
        foreign.append(cores)
        results.say(f"  {workers} workers: {found[str(workers)]}")
    return {
        "seconds": seconds,
        "every_s": BEAT,
        "silence_s": SILENCE,
        "fleets": found,
        "cores_used_by_others": max(foreign),
    }


async def _measure(workers: int, seconds: float) -> dict[str, float]:
    """Of a core, microseconds a heartbeat, and seconds between two words of the scheduler at most."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        async with (
            NatsServer(Path(scratch)) as nats,
            await client.connect(BrokerConfig(url=nats.url), "benchmark") as broker,
        ):
            heard, words = 0, []

            def on_heartbeat(_: Message) -> None:
                nonlocal heard
                heard += 1

            def on_word(message: Message) -> None:
                if Dispatch.model_validate_json(message.data).bases:
                    words.append(time.monotonic())

            await broker.subscribe(subjects.DISPATCH, on_word)
            speaking = [sys.executable, "-m", "benchmarks.heartbeats", nats.url, str(workers)]
            with fleet.part("scheduler", nats.url) as scheduler, fleet.helper(speaking):
                async with asyncio.timeout(fleet.START):
                    while not words:  # noqa: ASYNC110
                        await asyncio.sleep(BEAT)
                await asyncio.sleep(SETTLE)
                process = psutil.Process(scheduler.pid)
                words.clear()
                listening = await broker.subscribe(subjects.heartbeat("w0"), on_heartbeat)
                began, cpu = time.monotonic(), fleet.cpu_seconds(process)
                await asyncio.sleep(seconds)
                took, cpu = time.monotonic() - began, fleet.cpu_seconds(process) - cpu
                heard *= workers  # they speak in turn
                await listening.close()
    return {
        "heartbeats_per_s": round(heard / took),
        "cores": round(cpu / took, 3),
        "us": round(1e6 * cpu / heard, 1),
        "silence_s": round(max(b - a for a, b in itertools.pairwise(words)), 3),
    }


async def _workers(url: str, count: int) -> None:
    """Say what so many workers would, evenly, for ever."""
    credit = Credit(
        requests=32,
        slots_free=32,
        slots_total=64,
        step_tokens=512,
        kv_tokens_free=10**5,
        kv_tokens_total=2 * 10**5,
    )
    models = (ModelCard(id="sim", base="sim", paths=("/v1/completions",)),)
    beats = [
        Heartbeat(
            worker=f"w{number}",
            engine="sim",
            base="sim",
            models=models,
            started_ms=1,
            seq=0,
            state="serving",
            credit=credit,
        )
        for number in range(count)
    ]
    async with await client.connect(BrokerConfig(url=url), "workers") as broker:
        print("ready", flush=True)
        began = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(began + BEAT * number / count - time.monotonic())
            beat = beats[number % count].model_copy(update={"seq": number // count})
            await broker.publish(subjects.heartbeat(beat.worker), beat.model_dump_json().encode())


if __name__ == "__main__":
    if len(sys.argv) == 3:
        uvloop.run(_workers(sys.argv[1], int(sys.argv[2])))
    else:
        results.main("heartbeats", run)
