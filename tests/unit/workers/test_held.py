"""What a worker tells of what it holds, heard by a scheduler's table and in a real worker's life."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import base, errors, subjects
from broker.base import Message
from broker.memory import MemoryBroker
from broker.messages import Heartbeat, ServiceClass
from broker.messages import Held as Told
from tests.waiting import LIMIT, until
from tests.workbench import WaxEngine, calling, gone, serving, start_response
from workers.engines.base import Receive, Scope, Send
from workers.held import Held


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker()


class Ear:
    """What was said on `held.w1`."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def __call__(self, message: Message) -> None:
        self.told.append(Told.model_validate_json(message.data))


@pytest.fixture
async def ear(broker: MemoryBroker) -> Ear:
    ear = Ear()
    await broker.subscribe(subjects.held("w1"), ear)
    return ear


async def deliveries(broker: MemoryBroker, count: int) -> list[base.Delivery]:
    box: list[base.Delivery] = []
    puller = await broker.pull("sim", ServiceClass.STANDARD, box.append, lambda: None)
    await puller.ask(count)
    for _ in range(count):
        await broker.enqueue("req.sim.standard.acme.sim", b"")
    await until(lambda: len(box) == count)
    return box


async def test_what_falls_together_is_told_together(broker: MemoryBroker, ear: Ear) -> None:
    held = Held(broker, "w1", 7)
    one, two, three = await deliveries(broker, 3)
    await held.tell()
    held.take(one)
    held.take(two)
    await held.tell()
    await held.tell()
    held.drop(one)
    held.take(three)
    await held.tell()
    await until(lambda: len(ear.told) == 2)
    assert ear.told == [
        Told(started_ms=7, number=1, take=((1, 1, one.receipt), (2, 1, two.receipt))),
        Told(started_ms=7, number=2, take=((3, 1, three.receipt),), drop=((1, 1),)),
    ]
    assert held.number == 2


async def test_the_roster_is_all_that_is_held(broker: MemoryBroker, ear: Ear) -> None:
    held = Held(broker, "w1", 7)
    one, two = await deliveries(broker, 2)
    held.take(one)
    held.take(two)
    held.drop(one)
    await held.tell_all()
    await held.tell()
    await until(lambda: ear.told)
    assert ear.told == [Told(started_ms=7, number=1, full=True, take=((2, 1, two.receipt),))]


async def test_without_the_broker_it_is_told_later(broker: MemoryBroker, ear: Ear) -> None:
    away = broker.client()
    held = Held(away, "w1", 7)
    (one,) = await deliveries(broker, 1)
    held.take(one)
    away.disconnect()
    await held.tell()
    away.reconnect()
    await held.tell()
    await until(lambda: ear.told)
    assert [told.number for told in ear.told] == [1]


async def test_what_could_not_be_told_leaves_its_number_out(
    broker: MemoryBroker, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(broker, "w1", 7)
    one, two = await deliveries(broker, 2)

    async def fails(*_: Any) -> None:
        raise errors.Unavailable("full")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "publish", fails)
        held.take(one)
        await held.tell()
    held.take(two)
    await held.tell()
    await until(lambda: ear.told)
    assert [told.number for told in ear.told] == [2]


async def hold(scope: Scope, receive: Receive, send: Send) -> None:
    await start_response(send)
    await gone(receive)


async def test_a_worker_tells_what_it_takes_and_lets_go_of(broker: MemoryBroker, ear: Ear) -> None:
    beats: list[Heartbeat] = []
    await broker.subscribe(
        subjects.heartbeat("w1"), lambda m: beats.append(Heartbeat.model_validate_json(m.data))
    )
    async with calling(broker.client()) as caller, serving(broker.client(), WaxEngine(hold)):
        calls = [await caller.submit() for _ in range(2)]
        await until(lambda: sum(len(told.take) for told in ear.told) == 2)
        await until(lambda: beats[-1].told == ear.told[-1].number)
        await calls[0].cancel()
        await until(lambda: any(told.drop for told in ear.told))
        await until(lambda: beats[-1].told == ear.told[-1].number)
        await broker.publish(subjects.roster("w1"))
        full = await until(lambda: next((told for told in ear.told if told.full), None))
        assert [seq for seq, _, _ in full.take] == [calls[1].stored.seq]
        assert full.started_ms == beats[-1].started_ms
        assert _drops(ear) == [(calls[0].stored.seq, 1)]
        await calls[1].cancel()
        await calls[1].end()
    # Its goodbye comes after all that it had to tell.
    await until(lambda: beats[-1].state == "gone")
    assert sorted(_drops(ear)) == [(call.stored.seq, 1) for call in calls]
    assert beats[-1].told == ear.told[-1].number


def _drops(ear: Ear) -> list[tuple[int, int]]:
    return [drop for told in ear.told for drop in told.drop]


async def test_a_message_that_came_again_is_held_by_its_new_name(broker: MemoryBroker, ear: Ear) -> None:
    """The ack wait passed while its worker ran it, and the same worker was given it again."""
    async with calling(broker.client()) as caller, serving(broker.client(), WaxEngine(hold)):
        call = await caller.submit()
        await until(lambda: ear.told)
        await broker.hand_on(ear.told[0].take[0][2])
        await until(lambda: [attempt for told in ear.told[1:] for _, attempt, _ in told.take] == [2])
        await call.cancel()
        await until(lambda: (call.stored.seq, 2) in _drops(ear))
        await asyncio.wait_for(call.end(), LIMIT)
