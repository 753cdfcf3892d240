"""What the broker alone takes, on this machine now: the least that a durable request can add.

One bare client publishes a request into the durable queue, another, in a process of its own, takes it by a
standing pull and answers with one frame: no HTTP, no engine, no tokens beside it. Timed from the publish to
the frame, at the rate at which the load of `overhead` starts requests. `relayed`, a third one takes it and
passes it on to the one that answers, as a scheduler does, and decides nothing.

    python -m benchmarks.floor NATS_URL answers|relays|listens
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import fleet
from broker import base, client, replies, subjects
from broker.config import BrokerConfig
from broker.messages import ServiceClass
from broker.server import NatsServer

BODY = b"x" * 300
"""As large as the load's requests."""

WARM_UP = 20
"""Round trips before those that count."""


_WORKER = "floor"


def round_trips(rate: float, count: int, relayed: bool = False) -> list[float]:
    """Seconds from publish to frame of `count` requests, Poisson at `rate` a second."""
    return uvloop.run(_measure(rate, count, ("listens", "relays") if relayed else ("answers",)))


async def _measure(rate: float, count: int, others: tuple[str, ...]) -> list[float]:
    dice = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        async with NatsServer(Path(scratch)) as server:
            broker = await client.connect(BrokerConfig(url=server.url), "floor")
            with contextlib.ExitStack() as stack:
                for each in others:
                    stack.enter_context(
                        fleet.helper([sys.executable, "-m", "benchmarks.floor", server.url, each])
                    )
                async with broker, replies.Mailbox(broker, "floor") as mailbox, asyncio.TaskGroup() as group:
                    for number in range(WARM_UP):
                        await _one(broker, mailbox, f"warm-{number}")
                    started = []
                    for number in range(count):
                        started.append(group.create_task(_one(broker, mailbox, str(number))))
                        await asyncio.sleep(dice.expovariate(rate))
    return [task.result() for task in started]


async def _one(broker: base.Broker, mailbox: replies.Mailbox, number: str) -> float:
    stream = mailbox.open("bench", number)
    start = time.perf_counter()
    subject = subjects.RequestSubject("floor", ServiceClass.STANDARD, "bench", "floor")
    headers = {subjects.MSG_ID: f"bench:{number}", subjects.REPLY_TO: stream.subject}
    ack = await broker.enqueue(str(subject), BODY, headers)
    if not await stream.next(10.0):
        raise RuntimeError("no answer within 10 s")
    took = time.perf_counter() - start
    await ack
    stream.close()
    return took


async def _other(url: str, does: str) -> None:
    async with await client.connect(BrokerConfig(url=url), f"floor-{does}") as broker:
        tasks: set[asyncio.Task[None]] = set()

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            task = asyncio.create_task(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        if does == "listens":
            to = subjects.run(_WORKER)
            await broker.subscribe(to, lambda message: spawn(_reply_to_relayed(broker, message)))
            print("ready", flush=True)
            await asyncio.Event().wait()

        def take(delivery: base.Delivery) -> None:
            spawn((_reply if does == "answers" else _relay)(broker, delivery))

        lapsed = asyncio.Event()
        puller = await broker.pull("floor", ServiceClass.STANDARD, take, lapsed.set)
        await puller.ask(1_000_000)
        print("ready", flush=True)
        while True:
            await lapsed.wait()
            lapsed.clear()
            await puller.ask(1_000_000)


async def _relay(broker: base.Broker, delivery: base.Delivery) -> None:
    headers = delivery.headers or {}
    parcel = base.Parcel(delivery.subject, dict(headers), delivery.data, delivery.receipt)
    await broker.relay(subjects.run(_WORKER), parcel, "{}")


async def _reply_to_relayed(broker: base.Broker, message: base.Message) -> None:
    delivery = await broker.relayed(message)
    if delivery is not None:
        await _reply(broker, delivery)


async def _reply(broker: base.Broker, delivery: base.Delivery) -> None:
    await replies.Writer(broker, (delivery.headers or {})[subjects.REPLY_TO], delivery.attempt).end({})
    await delivery.ack()


if __name__ == "__main__":
    uvloop.run(_other(*sys.argv[1:]))
