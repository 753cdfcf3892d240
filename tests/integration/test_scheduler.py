"""The scheduler beside real workers on a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker import client, subjects
from broker.base import Broker
from broker.config import BrokerConfig
from broker.messages import FrameKind, ModelCard
from broker.server import NatsServer
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.waiting import LIMIT, until
from tests.workbench import FAST, PATH, STUCK, Caller, calling, metric, serving
from workers.engines import sim


@pytest.fixture
async def server(nats_server: NatsServer) -> NatsServer:
    return nats_server


@pytest.fixture
async def broker(server: NatsServer) -> AsyncIterator[Broker]:
    async with await client.connect(BrokerConfig(url=server.url), "test") as made:
        yield made


@pytest.fixture
async def caller(broker: Broker) -> AsyncIterator[Caller]:
    async with calling(broker) as made:
        yield made


@asynccontextmanager
async def scheduling(url: str) -> AsyncIterator[None]:
    async with await client.connect(BrokerConfig(url=url), "scheduler") as broker:
        config = SchedulerConfig(lost_after=0.3, sweep=0.05, orphan_after=0.0)
        stop = asyncio.Event()
        task = asyncio.create_task(Scheduler(config, broker).run(stop))
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait_for(task, LIMIT)


async def test_the_registry_outlives_its_worker(server: NatsServer, broker: Broker, caller: Caller) -> None:
    cards: dict[str, ModelCard | None] = {}

    def changed(key: str, value: bytes | None) -> None:
        cards[key] = None if value is None else ModelCard.model_validate_json(value)

    await broker.watch(subjects.KV_MODELS, changed)
    engine = await sim.start(FAST)
    async with scheduling(server.url):
        async with serving(broker, engine):
            await until(lambda: "sim" in cards)
            await until(lambda: metric("headrace_workers", base="sim", state="serving") == 1)
        await until(lambda: metric("headrace_workers", base="sim", state="serving") == 0)
        # Known, though nobody serves it now: the request waits for its worker.
        call = await caller.submit(6)
        async with serving(broker, engine, "w2"):
            await call.finishes()
    assert cards == {"sim": engine.models[0]}
    await engine.close()


async def test_requests_that_nobody_will_pull_are_ended(
    server: NatsServer, broker: Broker, caller: Caller
) -> None:
    async with scheduling(server.url):
        headers = {"Nats-Msg-Id": "acme:raw", "Reply-To": "out.acme.box.raw", "Path": PATH}
        stream = await caller.publish(headers, subject="req.typo.standard.acme.typo")
        (frame,) = await stream.next(LIMIT)
        assert (frame.kind, frame.extra["code"]) == (FrameKind.ERROR, "model_not_found")
        await caller.drained()
        stream.close()
        stream = await caller.publish(headers | {"Nats-Msg-Id": "acme:2"}, subject="req.sim.urgent.acme.sim")
        (frame,) = await stream.next(LIMIT)
        assert frame.extra["code"] == "malformed_message"
        await caller.drained()


async def test_a_queued_request_is_cancelled_while_the_worker_is_busy(
    server: NatsServer, broker: Broker, caller: Caller
) -> None:
    engine = await sim.start(STUCK.model_copy(update={"max_num_seqs": 1}))
    async with scheduling(server.url), serving(broker, engine, drain_timeout=0.0):
        running = await caller.submit()
        await until(lambda: engine.stats().running)
        queued = await caller.submit()
        await queued.cancel()
        await queued.fails("cancelled")
        assert await caller.queued() == 1
        await running.cancel()
        await running.fails("cancelled")
        await caller.drained()
        assert {e.request_id: e.outcome for e in await caller.usage(2)} == {
            "r1": "cancelled",
            "r2": "cancelled",
        }
    await engine.close()
