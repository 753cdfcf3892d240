"""Workers and the simulated engine on a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from broker import client, errors, subjects
from broker.base import Broker
from broker.config import BrokerConfig
from broker.messages import FrameKind, ServiceClass
from broker.server import NatsServer
from tests.waiting import until
from tests.workbench import (
    FAST,
    STUCK,
    Caller,
    WaxEngine,
    calling,
    gone,
    idle,
    serving,
    start_response,
)
from workers.config import SimConfig
from workers.engines import sim
from workers.engines.base import Receive, Scope, Send

ACK_WAIT = 1.0

Connect = Callable[[], Awaitable[Broker]]


@pytest.fixture
async def server(anyio_backend: object, tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path / "nats", sync_always=False) as made:
        yield made


@pytest.fixture
async def stack(anyio_backend: object) -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


@pytest.fixture
async def connect(server: NatsServer, stack: AsyncExitStack) -> Connect:
    async def connected() -> Broker:
        config = BrokerConfig(url=server.url, ack_wait=ACK_WAIT)
        return await stack.enter_async_context(await client.connect(config, "test"))

    return connected


@pytest.fixture
async def caller(connect: Connect, stack: AsyncExitStack) -> Caller:
    return await stack.enter_async_context(calling(await connect()))


@pytest.fixture
async def simulated(stack: AsyncExitStack) -> Callable[[SimConfig], Awaitable[sim.SimEngine]]:
    async def started(config: SimConfig) -> sim.SimEngine:
        engine = await sim.start(config)
        stack.push_async_callback(engine.close)
        return engine

    return started


Simulated = Callable[[SimConfig], Awaitable[sim.SimEngine]]


async def test_requests_run_to_their_ends_and_leave_nothing_behind(
    connect: Connect, caller: Caller, simulated: Simulated
) -> None:
    engine = await simulated(FAST)
    async with serving(await connect(), engine):
        classes = list(ServiceClass)
        calls = [
            await caller.submit(1 + n % 9, stream=n % 3 > 0, service_class=classes[n % 3]) for n in range(60)
        ]
        for call in calls:
            end = await call.finishes()
            assert [f.seq for f in call.frames] == list(range(len(call.frames)))
            assert next(f.kind for f in call.frames if f.kind is not FrameKind.BEAT) is FrameKind.HEAD
            assert end.extra["usage"]["completion_tokens"] == call.tokens
        await caller.drained()
        events = await caller.usage(60)
        assert sorted(e.request_id for e in events) == sorted(c.request.request_id for c in calls)
        assert {e.outcome for e in events} == {"finished"}
        assert idle(engine)


async def test_two_workers_share_the_queue_and_nothing_runs_twice(
    connect: Connect, caller: Caller, simulated: Simulated
) -> None:
    few = FAST.model_copy(update={"max_num_seqs": 2})
    one, two = await simulated(few), await simulated(few)
    async with serving(await connect(), one, "w1"), serving(await connect(), two, "w2"):
        calls = [await caller.submit(20) for _ in range(40)]
        for call in calls:
            await call.finishes()
        await caller.drained()
        events = await caller.usage(40)
        assert len({e.request_id for e in events}) == len(events) == 40
        assert {e.worker for e in events} == {"w1", "w2"}


async def test_a_newcomer_starts_while_others_run(
    connect: Connect, caller: Caller, simulated: Simulated
) -> None:
    async with serving(await connect(), await simulated(FAST)):
        long = await caller.submit(1500)
        await long.reach(FrameKind.DATA)
        for _ in range(3):
            short = await caller.submit(3)
            await short.finishes()
        assert not long.stream.finished
        await long.finishes()


@pytest.mark.parametrize("where", ["in prefill", "while it streams"])
async def test_cancel_frees_the_engine(
    connect: Connect, caller: Caller, simulated: Simulated, where: str
) -> None:
    engine = await simulated(STUCK if where == "in prefill" else FAST)
    async with serving(await connect(), engine):
        call = await caller.submit(2000)
        if where == "in prefill":
            await until(lambda: engine.stats().running)
        else:
            await call.reach(FrameKind.DATA)
        await call.cancel()
        await call.fails("cancelled")
        await until(lambda: idle(engine))
        await caller.drained()
        assert [e.outcome for e in await caller.usage(1)] == ["cancelled"]


async def test_over_credit_goes_to_the_other_worker(connect: Connect, caller: Caller) -> None:
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send)
        await release.wait()
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    one, two = WaxEngine(app, slots=1), WaxEngine(app, slots=2)
    async with serving(await connect(), one, "w1"):
        calls = [await caller.submit(service_class=c) for c in ServiceClass]
        await until(lambda: len(one.seen) == 1)
        async with serving(await connect(), two, "w2"):
            for call in calls:
                await call.reach(FrameKind.HEAD)
            assert (one.running, two.running) == (1, 2)
            release.set()
            for call in calls:
                await call.end()
            await caller.drained()
    assert len(set(one.seen + two.seen)) == len(one.seen + two.seen) == 3


async def test_a_long_request_is_not_redelivered(
    connect: Connect, caller: Caller, simulated: Simulated
) -> None:
    """Longer than the ack wait, with two workers that could take it again."""
    slow = FAST.model_copy(update={"ttft_ms": 1.0, "itl_ms": 1000 * ACK_WAIT})
    async with (
        serving(await connect(), await simulated(slow), "w1"),
        serving(await connect(), await simulated(slow), "w2"),
    ):
        call = await caller.submit(4)
        await call.finishes()
        assert {f.epoch for f in call.frames} == {1}
        await caller.drained()
        assert [e.epoch for e in await caller.usage(1)] == [1]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_worker_that_vanishes(
    connect: Connect, caller: Caller, simulated: Simulated, begun: bool
) -> None:
    """Its connection is gone and with it all it would say; the ack wait gives the request away."""

    slow = FAST.model_copy(update={"beta0": 50.0})
    lost, engine = await connect(), await simulated(slow if begun else STUCK)
    async with serving(lost, engine, drain_timeout=0.0) as worker:
        call = await caller.submit(20)
        await call.reach(FrameKind.DATA if begun else FrameKind.BEAT)
        await lost.close()
        async with serving(await connect(), await simulated(FAST), "w2"):
            await call.finishes()
            assert call.frames[-1].epoch == 2
            await caller.drained()
            assert [e.worker for e in await caller.usage(1)] == ["w2"]
        worker.stop.set()


async def test_a_dead_engine_hands_on_what_it_had_not_begun(
    connect: Connect, caller: Caller, simulated: Simulated
) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await gone(receive)

    dying = WaxEngine(silent)
    with pytest.raises(errors.EngineFailed, match="out of memory"):  # noqa: PT012
        async with serving(await connect(), dying):
            calls = [await caller.submit(6) for _ in range(3)]
            await until(lambda: dying.running == 3)
            async with serving(await connect(), await simulated(FAST), "w2"):
                dying.died.set_exception(errors.EngineFailed("out of memory"))
                for call in calls:
                    await call.finishes()
                await caller.drained()


async def test_drain_finishes_what_runs_and_leaves_the_rest(
    connect: Connect, caller: Caller, simulated: Simulated
) -> None:
    few = FAST.model_copy(update={"max_num_seqs": 2})
    async with serving(await connect(), await simulated(few), "w1", drain_timeout=30.0) as worker:
        running = [await caller.submit(400) for _ in range(2)]
        for call in running:
            await call.reach(FrameKind.DATA)
        waiting = [await caller.submit(5) for _ in range(4)]
        worker.stop.set()
        for call in running:
            await call.finishes()
        await worker.task

        async def rest() -> bool:
            return await caller.queued() == len(waiting)

        await until(rest)
        async with serving(await connect(), await simulated(few), "w2"):
            for call in waiting:
                await call.finishes()


async def test_the_worker_outlasts_a_restart_of_the_broker(
    connect: Connect, caller: Caller, server: NatsServer
) -> None:
    """What it runs goes on, and it takes new work; frames of the time without a broker are in its buffer,
    and reach who is back before they are sent."""
    release = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send, b"before")
        await release.wait()
        await send({"type": "http.response.body", "body": b" after", "more_body": False})

    async def journaled() -> bool:
        try:
            await caller.broker.read(subjects.REPLIES, subjects.ALL_REPLIES)
        except errors.Unavailable:
            return False
        return True

    engine, mine = WaxEngine(app), await connect()
    async with serving(mine, engine):
        running = await caller.submit()
        await running.reach(FrameKind.HEAD)
        await server.stop()
        await until(lambda: not mine.connected and not caller.broker.connected)
        await server.start()
        await until(lambda: mine.connected and caller.broker.connected)
        await until(journaled)
        release.set()
        assert (await running.end()).kind is FrameKind.END
        assert running.payload == b"before after"
        assert (await (await caller.submit()).end()).kind is FrameKind.END
        await caller.drained()
    assert len(engine.seen) == 2
