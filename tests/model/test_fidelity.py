"""The simulator against the code that it stands for: a scheduler and workers under a virtual clock, on a broker
that takes no time, give one workload the times that the simulator foretells."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import numpy as np
import orjson

from broker import replies, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import FrameKind, Request, ServiceClass
from ingress import prompt
from ops.simulate import command
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile
from ops.simulate.run import simulate
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.virtual_time import virtual_time
from workers.config import WorkerConfig
from workers.engines import sim
from workers.runner import Worker

PATH = "/v1/completions"


def body(call: Call, block_size: int) -> dict[str, Any]:
    size = block_size * 4
    blocks = [f"{each:x}".rjust(size, "-") for each in call.hashes]
    rest = call.prompt * 4 - len(blocks) * size
    return {"model": "sim", "prompt": "".join(blocks) + "." * rest, "max_tokens": call.output, "stream": True}


@asynccontextmanager
async def fleet_of(file: FleetFile, broker: MemoryBroker) -> AsyncIterator[None]:
    stop, tasks = asyncio.Event(), []
    scheduler = Scheduler(SchedulerConfig(), broker.client(), file.dispatch)
    tasks.append(asyncio.create_task(scheduler.run(stop)))
    for section in file.workers:
        for n in range(section.count):
            engine = await sim.start(section.engine)
            worker = Worker(WorkerConfig(name=f"{section.name}-{n}"), broker.client(), engine)
            tasks.append(asyncio.create_task(worker.run(stop)))
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def ask(file: FleetFile, broker: MemoryBroker, box: replies.Mailbox, call: Call, number: int, begin: float):
    await asyncio.sleep(begin + call.at - time.monotonic())
    source = file.sources[call.source]
    asked = body(call, file.block_size)
    data = orjson.dumps(asked)
    name = f"r{number}"
    request = Request(
        subject=subjects.RequestSubject("sim", source.service_class, call.tenant, "sim"),
        request_id=name,
        reply_to=subjects.reply(call.tenant, box.name, name),
        path=PATH,
        body=data,
        deadline_ms=replies.now_ms() + int(source.deadline_ms) if source.deadline_ms else 0,
        prefix=prompt.hashes(asked, len(data), "sim"),
        budget=prompt.budget(asked),
    )
    stream = box.open(call.tenant, name)
    came = time.monotonic()
    await (await broker.enqueue(str(request.subject), request.body, request.headers()))
    out: dict[str, Any] = {"ttft": math.nan, "cached": -1, "queue": math.nan, "retry": math.nan, "error": math.nan}
    while not stream.finished:
        for frame in await stream.next(1.0):
            if frame.kind is FrameKind.ERROR:
                out["retry"] = frame.extra.get("retry_after", math.nan)
            if frame.kind is FrameKind.HEAD and frame.ids and math.isnan(out["ttft"]):
                told = frame.extra["timing"]
                out.update(ttft=time.monotonic() - came, cached=told["cached"], queue=told["queue"] / 1000,
                           error=(told["ttft"] - told["predicted"]) / 1000)
    return out


def replay(file: FleetFile, calls: Sequence[Call]):
    async def run():
        broker = MemoryBroker(BrokerConfig(dedup_window=3600), time.time)
        for each in ServiceClass:
            await (await broker.pull("sim", each, lambda d: None, lambda: None)).close()
        async with replies.Mailbox(broker, "box") as box, fleet_of(file, broker):
            await asyncio.sleep(3.0)
            begin = time.monotonic()
            return await asyncio.gather(*(ask(file, broker, box, c, n, begin) for n, c in enumerate(calls)))

    with virtual_time() as loop:
        web = mock.Mock(server_port=1)
        with mock.patch("workers.runner.start_http_server", return_value=(web, None)), mock.patch(
            "scheduler.service.start_http_server", return_value=(web, None)
        ):
            return loop.run_until_complete(run())
