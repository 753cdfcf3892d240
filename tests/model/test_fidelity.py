"""The simulator against the code that it stands for: a scheduler and workers under a virtual clock, on a
broker that takes no time, do with one workload what the simulator foretells. `benchmarks.fidelity` asks the
same of processes, with NATS and HTTP between them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import numpy as np
import orjson

from benchmarks import fidelity
from benchmarks.fidelity import Answer
from broker import replies, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Frame, FrameKind, Request, ServiceClass
from ingress import prompt
from ops.simulate import fleet_file
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.virtual_time import virtual_time
from workers.config import WorkerConfig
from workers.engines import sim
from workers.runner import Worker

SETTLED = 3.0
"""Seconds after which the scheduler dispatches, and knows its workers."""


def test_times_and_hits_are_those_of_the_simulator() -> None:
    file = _file("fidelity", duration=40.0)
    asked = fidelity.calls(file)
    foretold, found = fidelity.simulated(file, asked), replay(file, asked)
    for percent, off in (50, 0.1), (90, 0.1), (95, 0.1), (99, 0.2):  # the last is five requests
        there = np.percentile([answer.ttft for answer in found], percent)
        assert abs(there / np.percentile([answer.ttft for answer in foretold], percent) - 1) < off
    assert 0.95 < sum(answer.cached for answer in found) / sum(answer.cached for answer in foretold) < 1.05


def test_most_that_are_refused_are_told_how_long_it_would_take() -> None:
    file = _file("refusals", duration=32.0)
    asked = fidelity.calls(file)
    for answers in (fidelity.simulated(file, asked), replay(file, asked)):
        ratios = [answer.told / answer.ttft for answer in answers if not np.isnan(answer.told)]
        assert len(ratios) > 20
        assert sum(abs(ratio - 1) <= fidelity.RIGHT for ratio in ratios) > len(ratios) / 2


def _file(name: str, duration: float) -> FleetFile:
    instant = {"send": 0.0, "news": 0.0}
    return fleet_file.load(
        fidelity.FOLDER / f"{name}.toml", {"duration": duration, "warmup": 0.0, "network": instant}
    )


def replay(file: FleetFile, asked: Sequence[Call]) -> list[Answer]:
    web = mock.Mock(server_port=1), None
    with (
        virtual_time() as loop,
        mock.patch("workers.runner.start_http_server", return_value=web),
        mock.patch("scheduler.service.start_http_server", return_value=web),
    ):
        return loop.run_until_complete(_asked(file, asked))


async def _asked(file: FleetFile, asked: Sequence[Call]) -> list[Answer]:
    broker = MemoryBroker(BrokerConfig(dedup_window=3600), time.time)
    for service_class in ServiceClass:  # what is queued before a worker is there waits for it
        await (await broker.pull("sim", service_class, lambda delivery: None, lambda: None)).close()
    async with replies.Mailbox(broker, "box") as box, _fleet(file, broker):
        await asyncio.sleep(SETTLED)
        begin = time.monotonic()

        async def ask(number: int, call: Call) -> Answer:
            source = file.sources[call.source]
            await asyncio.sleep(begin + call.at - time.monotonic())
            request = _request(call, file.block_size, str(source.service_class), f"r{number}")
            if not source.deadline_ms:
                return await _answer(broker, box, request)
            deadline = int(broker.now_ms() + source.deadline_ms)
            refused = await _answer(broker, box, dataclasses.replace(request, deadline_ms=deadline))
            if np.isnan(refused.told):
                return refused
            again = _request(call, file.block_size, str(source.service_class), f"r{number}-again")
            return dataclasses.replace(await _answer(broker, box, again), told=refused.told)

        return await asyncio.gather(*(ask(number, call) for number, call in enumerate(asked)))


@asynccontextmanager
async def _fleet(file: FleetFile, broker: MemoryBroker) -> AsyncIterator[None]:
    stop = asyncio.Event()
    scheduler = Scheduler(SchedulerConfig(), broker.client(), file.dispatch)
    tasks = [asyncio.create_task(scheduler.run(stop))]
    (section,) = file.workers
    for number in range(section.count):
        worker = Worker(WorkerConfig(name=f"w{number}"), broker.client(), await sim.start(section.engine))
        tasks.append(asyncio.create_task(worker.run(stop)))
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


def _request(call: Call, block_size: int, service_class: str, name: str) -> Request:
    body = fidelity.body(call, block_size)
    data = orjson.dumps(body)
    return Request(
        subject=subjects.RequestSubject("sim", service_class, call.tenant, "sim"),
        request_id=name,
        reply_to=subjects.reply(call.tenant, "box", name),
        path="/v1/completions",
        body=data,
        prefix=prompt.hashes(body, len(data), "sim"),
        budget=prompt.budget(body),
    )


async def _answer(broker: MemoryBroker, box: replies.Mailbox, request: Request) -> Answer:
    came = time.monotonic()
    stream = box.open(request.subject.tenant, request.request_id)
    await (await broker.enqueue(str(request.subject), request.body, request.headers()))
    answer: Answer | None = None
    while not stream.finished:
        for frame in await stream.next(1.0):
            if answer is None:
                answer = _first(frame, time.monotonic() - came)
    assert answer is not None
    return answer


def _first(frame: Frame, after: float) -> Answer | None:
    """What the frame that bears the first token says, or the one that refuses."""
    nan = float("nan")
    if frame.kind is FrameKind.ERROR:
        return Answer(nan, nan, nan, -1, told=frame.extra.get("retry_after", 0.0))
    if not frame.ids:
        return None
    told: dict[str, Any] = frame.extra["timing"]
    return Answer(after, told["queue"] / 1000, after - told["predicted"] / 1000, told["cached"])
