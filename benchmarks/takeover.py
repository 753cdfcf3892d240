"""How long nobody leads when the scheduler that leads is killed, or hangs, and what callers notice of it.

A nats-server, two schedulers and a sim worker, each a process. Requests come all the time; what is struck is
replaced before the next strike. Times count from the strike.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson

from benchmarks import fleet, quiet, results
from broker import client, subjects
from broker.base import Message
from broker.config import BrokerConfig
from broker.messages import Dispatch, Request, Sent, ServiceClass
from broker.server import NatsServer

STRIKES = {"leader killed": 6, "leader hangs for 5 s": 4, "standby killed": 2, "both killed": 2}
HANGS = 5.0
RATE = 50.0
"""Requests a second."""
SETTLE = 2.0
"""Seconds before a strike in which nothing else happens."""
AFTER = 3.0
"""Seconds after a strike in which requests are counted."""


class Watch:
    """Who leads, and how long each request waits for its first frame. Times: `time.monotonic()` seconds."""

    def __init__(self, broker: client.NatsBroker) -> None:
        self._broker = broker
        self.leader, self.epoch = "", 0
        self.word = self.sent = -math.inf  # the first of that epoch
        self.waits: list[tuple[float, float]] = []  # published at, and how long it waited
        self._open: dict[str, float] = {}

    async def start(self) -> None:
        await self._broker.subscribe(subjects.DISPATCH, self._on_dispatch)
        await self._broker.subscribe("run.*", self._on_run)
        await self._broker.subscribe("out.bench.box.*", self._on_frame)

    def _on_dispatch(self, message: Message) -> None:
        told = Dispatch.model_validate_json(message.data)
        if told.epoch > self.epoch:
            self.leader, self.epoch, self.word, self.sent = (
                told.scheduler,
                told.epoch,
                time.monotonic(),
                math.inf,
            )

    def _on_run(self, message: Message) -> None:
        sent = Sent.model_validate_json((message.headers or {})[subjects.SENT])
        if sent.epoch == self.epoch and self.sent == math.inf:
            self.sent = time.monotonic()

    def _on_frame(self, message: Message) -> None:
        at = self._open.pop(message.subject, None)
        if at is not None:
            self.waits.append((at, time.monotonic() - at))

    async def ask(self, number: int) -> None:
        reply = subjects.reply("bench", "box", f"r{number}")
        request = Request(
            subject=subjects.RequestSubject("sim", ServiceClass.INTERACTIVE, "bench", "sim"),
            request_id=f"r{number}",
            reply_to=reply,
            path="/v1/completions",
            body=orjson.dumps(
                {"model": "sim", "prompt": f"prompt {number}", "max_tokens": 3, "stream": True}
            ),
        )
        self._open[reply] = time.monotonic()
        await self._broker.enqueue(str(request.subject), request.body, request.headers())

    async def ask_on(self) -> None:
        """At a steady rate, for ever."""
        began = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(began + number / RATE - time.monotonic())
            await self.ask(number)

    async def until(self, strike: float) -> None:
        """Until a scheduler has handed out a request since."""
        while self.word < strike or self.sent == math.inf:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def longest(self, strike: float) -> float:
        """The longest that a request waited which came at the strike or soon after."""
        await asyncio.sleep(max(0.0, strike + AFTER - time.monotonic()))
        while any(at < strike + AFTER for at in self._open.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return max(waited for at, waited in self.waits if strike - 0.1 <= at <= strike + AFTER)


class Schedulers:
    """Two, by name. A killed one is replaced with `fill`."""

    def __init__(self, nats: str, stack: contextlib.ExitStack) -> None:
        self._nats, self._stack = nats, stack
        self._numbers = itertools.count(1)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    async def fill(self) -> None:
        while len(self.running) < 2:
            name = f"s{next(self._numbers)}"
            part = fleet.part("scheduler", self._nats, scheduler__name=name)
            self.running[name] = await asyncio.to_thread(self._stack.enter_context, part)

    def kill(self, name: str) -> None:
        self.running.pop(name).kill()


async def _strike(kind: str, watch: Watch, schedulers: Schedulers) -> dict[str, float]:
    """The leader's first word, the first request that it hands out, the longest wait; seconds."""
    leader = watch.leader
    (standby,) = schedulers.running.keys() - {leader}
    strike = time.monotonic()
    if kind == "leader hangs for 5 s":
        hung = schedulers.running[leader]
        hung.send_signal(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(HANGS, hung.send_signal, signal.SIGCONT)
    if kind in ("leader killed", "both killed"):
        schedulers.kill(leader)
    if kind in ("standby killed", "both killed"):
        schedulers.kill(standby)
    if kind == "both killed":
        await schedulers.fill()
    found = {}
    if kind != "standby killed":
        await watch.until(strike)
        found = {"word": watch.word - strike, "sent": watch.sent - strike}
    found["wait"] = await watch.longest(strike)
    await schedulers.fill()
    await asyncio.sleep(max(SETTLE, strike + HANGS + SETTLE - time.monotonic() if "hangs" in kind else 0.0))
    return found


@contextlib.asynccontextmanager
async def _fleet() -> AsyncIterator[tuple[Watch, Schedulers]]:
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch, contextlib.ExitStack() as stack:
        async with NatsServer(Path(scratch)) as nats:
            with fleet.worker(nats.url, worker__engine="sim", sim__ttft_ms=5):
                schedulers = Schedulers(nats.url, stack)
                await schedulers.fill()
                async with await client.connect(BrokerConfig(url=nats.url), "benchmark") as broker:
                    watch = Watch(broker)
                    await watch.start()
                    asking = asyncio.create_task(watch.ask_on())
                    await watch.until(0.0)
                    await asyncio.sleep(SETTLE)
                    yield watch, schedulers
                    asking.cancel()
            stack.close()


async def _measure(strikes: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in strikes}
    async with _fleet() as (watch, schedulers):
        for kind, count in strikes.items():
            for _ in range(count):
                for name, seconds in (await _strike(kind, watch, schedulers)).items():
                    found[kind][name].append(seconds)
            told = (f"{name} {max(seconds):.2f} s" for name, seconds in found[kind].items())
            results.say(f"  {kind}, {count} times: at most {', '.join(told)}")
    return found


def run(quick: bool) -> dict[str, Any]:
    strikes = dict.fromkeys(STRIKES, 1) if quick else STRIKES
    found, foreign = quiet.undisturbed(lambda: asyncio.run(_measure(strikes)))
    struck = {
        kind: {name: results.spread(seconds) for name, seconds in times.items()}
        for kind, times in found.items()
    }
    return {"strikes": strikes, "struck": struck, "rate": RATE, "cores_used_by_others": foreign}


if __name__ == "__main__":
    results.main("takeover", run)
