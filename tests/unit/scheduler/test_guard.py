"""Lost workers: who counts as one, and what becomes of its requests. Over the fake broker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from broker import base, errors, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Credit, Heartbeat, ModelCard, ServiceClass
from scheduler.config import SchedulerConfig
from scheduler.dispatch.config import DispatchConfig
from scheduler.service import Scheduler
from tests.waiting import LIMIT, until
from tests.workbench import PATH, Caller, calling, metric, serving
from workers.config import SimConfig
from workers.engines import sim
from workers.held import Held

LOST_AFTER = 0.06


class Fake:
    """A worker that takes and never answers, and beats as long as it is told to."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.broker, self.name = broker, name
        self.held = Held(broker, name, 1)
        self.got: list[base.Delivery] = []
        self.lives = True

    async def take(self, count: int) -> None:
        puller = await self.broker.pull("sim", ServiceClass.STANDARD, self.got.append, lambda: None)
        before = len(self.got)
        await puller.ask(count)
        await until(lambda: len(self.got) == before + count)
        for delivery in self.got[before:]:
            self.held.take(delivery)
        await self.held.tell()

    async def beat(self, state: str = "serving") -> None:
        card = ModelCard(id="sim", base="sim", paths=(PATH,))
        told: dict[str, Any] = {"seq": 0, "state": state, "credit": Credit(), "told": self.held.number}
        told["inbox"] = self.broker.inbox
        heartbeat = Heartbeat(
            worker=self.name, engine="sim", base="sim", models=(card,), started_ms=1, **told
        )
        data = heartbeat.model_dump_json().encode()
        await self.broker.publish(subjects.heartbeat(self.name), data)

    async def live(self) -> None:
        while True:
            if self.lives:
                await self.beat()
            await asyncio.sleep(LOST_AFTER / 10)


@asynccontextmanager
async def living(broker: MemoryBroker, name: str) -> AsyncIterator[Fake]:
    worker = Fake(broker.client(), name)
    tasks = [asyncio.create_task(worker.live())]

    def asked(_: base.Message) -> None:
        tasks.append(asyncio.create_task(worker.held.tell_all()))

    roster = await broker.subscribe(subjects.roster(name), asked)
    yield worker
    for task in tasks:
        task.cancel()
    await roster.close()


@asynccontextmanager
async def scheduling(broker: MemoryBroker, leads: bool = True, **settings: Any) -> AsyncIterator[Scheduler]:
    config = SchedulerConfig(**{"lost_after": LOST_AFTER, "lease": 0.2, **settings})
    # The workers here are no workers: they pull for themselves.
    scheduler, stop = Scheduler(config, broker, DispatchConfig(enabled=False)), asyncio.Event()
    task = asyncio.create_task(scheduler.run(stop))
    await until(lambda: broker.watches and (scheduler.leads or not leads))
    try:
        yield scheduler
    finally:
        stop.set()
        await asyncio.wait_for(task, LIMIT)


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def caller(broker: MemoryBroker) -> AsyncIterator[Caller]:
    async with calling(broker.client()) as made:
        yield made


async def known(scheduler: Scheduler, count: int) -> None:
    await until(lambda: len(scheduler._guard._held) == count)


async def test_a_lost_workers_requests_go_to_another_at_once(
    broker: MemoryBroker, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    """The fake's ack wait never passes: nothing else hands them on."""
    lost, handed = metric("headrace_workers_lost_total"), metric("headrace_handed_on_total")
    engine = await sim.start(SimConfig(ttft_ms=1, itl_ms=1))
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        calls = [await caller.submit(3) for _ in range(4)]
        await worker.take(3)
        await known(scheduler, 3)
        worker.lives = False
        async with serving(broker.client(), engine, "w2", heartbeat=LOST_AFTER / 10):
            for call in calls:
                await call.finishes()
            await caller.drained()
    assert [call.frames[-1].epoch for call in calls] == [2, 2, 2, 1]
    assert metric("headrace_workers_lost_total") == lost + 1
    assert metric("headrace_handed_on_total") == handed + 3
    assert "worker w1 fell silent; requests held: 3" in caplog.text
    await engine.close()


async def test_what_a_lost_worker_had_no_time_to_tell_of_is_handed_on(
    broker: MemoryBroker, caller: Caller
) -> None:
    """And what another one told of stays with it."""
    async with scheduling(broker) as scheduler, living(broker, "w1") as one, living(broker, "w2") as other:
        for _ in range(3):
            await caller.submit()
        await other.take(1)
        await known(scheduler, 1)
        puller = await one.broker.pull("sim", ServiceClass.STANDARD, one.got.append, lambda: None)
        await puller.ask(2)
        await until(lambda: len(one.got) == 2)
        one.lives = False
        await other.take(2)
        assert [(delivery.seq, delivery.attempt) for delivery in other.got] == [(1, 1), (2, 2), (3, 2)]


async def test_who_bears_with_long_silences_keeps_the_lead(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with scheduling(broker, lost_after=10 * LIMIT, lease=2.0) as scheduler:
        led = scheduler._leader.revision
        await until(lambda: scheduler._leader.revision >= led + 5)
        assert "leads no longer" not in caplog.text


async def test_what_comes_to_a_worker_that_hangs_is_handed_on_until_it_is_heard(
    broker: MemoryBroker, caller: Caller
) -> None:
    async with scheduling(broker) as scheduler, living(broker, "w1") as hung, living(broker, "w2") as other:
        puller = await hung.broker.pull("sim", ServiceClass.STANDARD, hung.got.append, lambda: None)
        await until(lambda: len(scheduler._guard._held._lives) == 2)
        hung.lives = False
        await until(lambda: scheduler._guard._bounced)
        ((until_before, listening),) = scheduler._guard._bounced.values()
        await scheduler._guard.bounce("w1", hung.broker.inbox)  # listened for already, and longer now
        ((until_now, still),) = scheduler._guard._bounced.values()
        assert still is listening
        assert until_now > until_before
        await puller.ask(1)
        await caller.submit()
        await other.take(1)
        assert [(delivery.seq, delivery.attempt) for delivery in other.got] == [(1, 2)]
        hung.lives = True
        await until(lambda: not scheduler._guard._bounced)
        await puller.ask(1)
        await caller.submit()
        await until(lambda: len(hung.got) == 2)
        await caller.submit()
        await other.take(1)
        assert other.got[-1].seq == 3


async def test_what_a_worker_that_lives_holds_stays_with_it(broker: MemoryBroker, caller: Caller) -> None:
    async with (
        scheduling(broker) as scheduler,
        living(broker, "w1") as one,
        living(broker, "w2") as other,
    ):
        for _ in range(3):
            await caller.submit()
        await one.take(2)
        await other.take(1)
        await known(scheduler, 3)
        other.lives = False
        await one.take(1)
        assert [(delivery.seq, delivery.attempt) for delivery in one.got] == [(1, 1), (2, 1), (3, 2)]
        await known(scheduler, 3)


async def test_one_that_comes_back_is_seen_again(broker: MemoryBroker, caller: Caller) -> None:
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        await caller.submit()
        await worker.take(1)
        await known(scheduler, 1)
        lost = metric("headrace_workers_lost_total")
        for number in (1, 2):
            worker.lives = False
            await until(lambda number=number: metric("headrace_workers_lost_total") == lost + number)  # type: ignore[misc]
            await known(scheduler, 0)
            worker.lives = True
            await known(scheduler, 1)  # by its roster: nobody has taken what it had


async def test_our_own_standstill_is_nobodys_death(broker: MemoryBroker, caller: Caller) -> None:
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        await caller.submit()
        await worker.take(1)
        await known(scheduler, 1)
        lost = metric("headrace_workers_lost_total")
        for _ in range(5):
            time.sleep(2 * LOST_AFTER)  # noqa: ASYNC251  # the loop stands still
            await until(lambda: scheduler.leads)
            await asyncio.sleep(0)
        await caller.submit()
        await worker.take(1)
        assert worker.got[-1].seq == 2
        assert metric("headrace_workers_lost_total") == lost


async def test_a_broker_out_of_reach_is_nobodys_death(broker: MemoryBroker, caller: Caller) -> None:
    """Its heartbeats were missed, and so was what it took meanwhile: its roster tells of that."""
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        await caller.submit()
        await worker.take(1)
        await known(scheduler, 1)
        lost = metric("headrace_workers_lost_total")
        broker.disconnect()
        await caller.submit()
        await worker.take(1)
        end = time.monotonic() + 2 * LOST_AFTER
        await until(lambda: time.monotonic() > end)
        broker.reconnect()
        await known(scheduler, 2)
        await until(lambda: scheduler.leads)
        assert metric("headrace_workers_lost_total") == lost


async def test_a_slow_answer_of_the_broker_is_nobodys_death(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that stands still passes no heartbeats on either, and they come when it goes on."""
    swap = broker.swap
    async with scheduling(broker, lease=30.0) as scheduler, living(broker, "w1") as worker:
        await caller.submit()
        await worker.take(1)
        await known(scheduler, 1)
        lost = metric("headrace_workers_lost_total")
        asked: list[int] = []

        async def stands(bucket: str, key: str, value: bytes, expected: int) -> int | None:
            asked.append(expected)
            await asyncio.sleep(LOST_AFTER)
            worker.lives = True
            return await swap(bucket, key, value, expected)

        with monkeypatch.context() as patch:
            patch.setattr(broker, "swap", stands)
            worker.lives = False
            await until(lambda: worker.lives and asked)
        await caller.submit()
        await worker.take(1)
        assert worker.got[-1].seq == 2
        assert metric("headrace_workers_lost_total") == lost
        worker.lives = False
        await until(lambda: metric("headrace_workers_lost_total") == lost + 1)


async def test_a_standby_knows_what_is_held_and_hands_it_on_once_it_leads(
    broker: MemoryBroker, caller: Caller
) -> None:
    first = broker.client()
    async with (
        scheduling(first) as leader,
        scheduling(broker, leads=False) as standby,
        living(broker, "w1") as worker,
        living(broker, "w2") as other,
    ):
        await caller.submit()
        await worker.take(1)
        await known(standby, 1)
        assert not standby.leads
        first.disconnect()
        worker.lives = False
        await other.take(1)
        assert (standby.leads, leader.leads) == (True, False)
        assert [(delivery.seq, delivery.attempt) for delivery in other.got] == [(1, 2)]
        await known(standby, 1)


async def test_a_standby_writes_nothing_and_cancels_nothing(broker: MemoryBroker, caller: Caller) -> None:
    leader = broker.client()
    async with scheduling(leader, lease=60.0), scheduling(broker, leads=False, lease=60.0) as standby:
        leader.disconnect()  # and so nobody leads
        async with living(broker, "w1"):
            call = await caller.submit()
            await until(lambda: standby._guard._held._lives)
            await call.cancel()
            await until(lambda: standby._tasks)
            await until(lambda: not standby._tasks)
            assert broker.hub.bucket(subjects.KV_MODELS) == {}
            assert await caller.queued() == 1
        leader.reconnect()
        await call.cancel()
        await call.fails("cancelled")


async def test_what_a_leaderless_while_left_over_is_forgotten_past_the_ack_wait(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker has handed it on by then."""
    broker = MemoryBroker(BrokerConfig(ack_wait=0.5))
    handed = metric("headrace_handed_on_total")
    async with calling(broker.client()) as caller, living(broker, "w1") as worker:
        await broker.swap(subjects.KV_LEASES, subjects.LEADER, b"another", 0)
        async with scheduling(broker, leads=False, lease=60.0) as standby:
            await caller.submit()
            await until(lambda: standby._guard._held._lives)
            await worker.take(1)
            await known(standby, 1)
            worker.lives = False
            await known(standby, 0)
    assert metric("headrace_handed_on_total") == handed


@pytest.mark.parametrize(
    "receipt", ["out.acme.box.r1", "nonsense", "$JS.ACK.REQUESTS.sim_standard.1.1.1.1.0"]
)
async def test_a_receipt_that_is_none_is_left(
    broker: MemoryBroker, caller: Caller, caplog: pytest.LogCaptureFixture, receipt: str
) -> None:
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        await until(lambda: scheduler._guard._held._lives)
        told = {"started_ms": 1, "number": 1, "take": [[1, 1, receipt]]}
        worker.held.number = 1
        await broker.publish(subjects.held("w1"), orjson.dumps(told))
        await known(scheduler, 1)
        worker.lives = False
        await until(lambda: "left to the ack wait" in caplog.text)


async def test_garbage_is_logged_and_left(
    broker: MemoryBroker, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        with caplog.at_level(logging.WARNING):
            for data in (b"", b"\xff", b"{}", b'{"started_ms":1,"number":1,"take":[[1]]}', b"[" * 10_000):
                await broker.publish("held.w1", data)
            await broker.publish("held.%FF", b'{"started_ms":1,"number":1}')
            await caller.submit()
            await worker.take(1)
            await known(scheduler, 1)
    assert caplog.text.count("is unreadable") == 6


async def test_a_broker_that_goes_away_leaves_the_rest_to_the_ack_wait(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(receipt: str) -> None:
        raise errors.Unavailable("it went away")

    monkeypatch.setattr(broker, "hand_on", fails)
    async with scheduling(broker) as scheduler, living(broker, "w1") as worker:
        await caller.submit()
        await worker.take(1)
        await known(scheduler, 1)
        worker.lives = False
        await until(lambda: "left to the ack wait: it went away" in caplog.text)
