"""A worker that is told to sleep and to wake, over the fake broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from broker import base, errors, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Answer, Command, Heartbeat
from tests.waiting import until
from tests.workbench import FAST, Caller, WaxEngine, calling, gone, serving, start_response
from workers.engines import sim
from workers.engines.base import Receive, Scope, Send

SLEEPER = FAST.model_copy(update={"sleep": True, "wake_ms": 1})


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker(BrokerConfig())


@pytest.fixture
async def caller(broker: MemoryBroker) -> AsyncIterator[Caller]:
    async with calling(broker.client()) as made:
        yield made


@pytest.fixture
async def states(broker: MemoryBroker) -> list[str]:
    """The states that the worker's heartbeats tell, as they change."""
    seen: list[str] = []

    def heard(message: base.Message) -> None:
        state = Heartbeat.model_validate_json(message.data).state
        if seen[-1:] != [state]:
            seen.append(state)

    await broker.client().subscribe(subjects.ALL_HEARTBEATS, heard)
    return seen


async def tell(broker: base.Broker, do: str) -> Answer:
    command = Command.model_validate({"do": do, "model": "sim"})
    data = await broker.ask(subjects.ctl("w1"), command.model_dump_json().encode())
    return Answer.model_validate_json(data)


async def heartbeats(broker: base.Broker, n: int) -> None:
    """Until the worker has gone through its loop `n` times more."""
    seen: list[base.Message] = []
    subscription = await broker.subscribe(subjects.heartbeat("w1"), seen.append)
    await until(lambda: len(seen) >= n)
    await subscription.close()


async def test_one_that_sleeps_takes_nothing_until_it_is_woken(
    broker: MemoryBroker, caller: Caller, states: list[str]
) -> None:
    engine = await sim.start(SLEEPER)
    async with serving(broker.client(), engine):
        await (await caller.submit()).finishes()
        assert (await tell(caller.broker, "sleep")).ok
        await until(lambda: states[-1] == "asleep")
        waiting = await caller.submit()
        await heartbeats(caller.broker, 3)
        assert await caller.queued() == 1
        assert (await tell(caller.broker, "wake")).ok
        await waiting.finishes()
        await (await caller.submit()).finishes()
    assert states == ["serving", "draining", "asleep", "serving", "draining", "gone"]
    await engine.close()


async def test_what_runs_is_finished_before_it_sleeps(
    broker: MemoryBroker, caller: Caller, states: list[str]
) -> None:
    engine = await sim.start(SLEEPER.model_copy(update={"itl_ms": 5.0}))
    async with serving(broker.client(), engine):
        call = await caller.submit(20)
        call.frames += await call.stream.next(1.0)
        await tell(caller.broker, "sleep")
        await call.finishes()
        await until(lambda: states[-1] == "asleep")
    await engine.close()


async def test_one_that_is_woken_while_it_falls_asleep_serves_on(
    broker: MemoryBroker, caller: Caller, states: list[str]
) -> None:
    engine = await sim.start(SLEEPER)
    async with serving(broker.client(), engine):
        for do in ("sleep", "wake", "sleep", "wake"):
            assert (await tell(caller.broker, do)).ok
        await (await caller.submit()).finishes()
        assert states[-1] == "serving"
    await engine.close()


async def test_one_that_sleeps_ends_at_once(broker: MemoryBroker, states: list[str]) -> None:
    engine = await sim.start(SLEEPER)
    async with serving(broker.client(), engine):
        await tell(broker.client(), "sleep")
        await until(lambda: states[-1:] == ["asleep"])
    assert states[-1] == "gone"
    await engine.close()


async def test_an_engine_that_can_not_sleep_is_left_alone(broker: MemoryBroker, caller: Caller) -> None:
    engine = await sim.start(FAST)
    async with serving(broker.client(), engine):
        refused = await tell(caller.broker, "sleep")
        assert not refused.ok
        assert "can't sleep" in refused.message
        await (await caller.submit()).finishes()
    await engine.close()


class Insomniac(WaxEngine):
    """It says that it can sleep, and breaks when it shall."""

    can_sleep = True

    async def sleep(self) -> None:
        raise errors.EngineFailed("it never slept")


async def test_an_engine_that_breaks_as_it_falls_asleep_ends_its_worker(broker: MemoryBroker) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send)
        await gone(receive)

    with pytest.raises(errors.EngineFailed, match="never slept"):  # noqa: PT012
        async with serving(broker.client(), Insomniac(app)) as worker:
            await tell(broker.client(), "sleep")
            await until(worker.task.done)
