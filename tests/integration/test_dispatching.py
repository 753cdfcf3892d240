"""Dispatching: schedulers that hand requests out and workers that take them, on a real nats-server."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from broker import client, subjects
from broker.base import Broker, Message
from broker.config import BrokerConfig
from broker.messages import Cached, Credit, Dispatch, FrameKind, News, Sent
from broker.server import NatsServer
from kvstate import prefix
from kvstate.blocks import Blocks
from kvstate.index import PrefixIndex
from scheduler import dispatching, ledger
from scheduler.config import SchedulerConfig
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.dispatcher import Dispatcher
from scheduler.dispatch.types import Item
from scheduler.service import Scheduler
from tests.integration import command
from tests.integration.fleet import Fleet
from tests.pushing import push
from tests.waiting import LIMIT, until
from tests.workbench import FAST, STUCK, Caller, Serving, calling, metric, serving
from workers.engines import sim

CONFIG = BrokerConfig(ack_wait=300.0)
"""Nothing is served by the ack wait alone."""

ONE = FAST.model_copy(update={"max_num_seqs": 1})


@pytest.fixture
async def server(nats_server: NatsServer) -> NatsServer:
    return nats_server


@pytest.fixture
async def broker(server: NatsServer) -> AsyncIterator[Broker]:
    async with await client.connect(CONFIG.model_copy(update={"url": server.url}), "test") as made:
        yield made


@pytest.fixture
async def caller(broker: Broker) -> AsyncIterator[Caller]:
    async with calling(broker) as made:
        yield made


class Desk:
    """A scheduler that can be stopped, and killed: its connection then breaks without a word."""

    def __init__(self, url: str, name: str, settings: dict[str, float], **dispatch: Any) -> None:
        self._config = CONFIG.model_copy(update={"url": url})
        settings = {"lost_after": 0.3, "sweep": 0.05, "orphan_after": 0.0} | settings
        self._settings = SchedulerConfig(name=name, **settings)
        self._dispatch = DispatchConfig(**dispatch)
        self._stop = asyncio.Event()

    async def start(self) -> None:
        self.broker = await client.connect(self._config, "scheduler")
        self.scheduler = Scheduler(self._settings, self.broker, self._dispatch)
        self.task = asyncio.create_task(self.scheduler.run(self._stop))

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.wait_for(self.task, LIMIT)
        await self.broker.close()

    async def kill(self) -> None:
        transport: Any = self.broker
        transport._nc._transport._io_writer.transport.abort()
        transport._nc.options["allow_reconnect"] = False
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.broker.close()


@asynccontextmanager
async def desk(
    url: str, name: str = "s1", settings: dict[str, float] | None = None, **dispatch: Any
) -> AsyncIterator[Desk]:
    made = Desk(url, name, settings or {}, **dispatch)
    await made.start()
    try:
        yield made
    finally:
        if not made.task.done():
            await made.stop()


class Wire:
    """What is said between scheduler and workers."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Sent]] = []
        self.dispatched: list[Dispatch] = []
        self.news: list[News] = []

    def on_run(self, message: Message) -> None:
        sent = Sent.model_validate_json((message.headers or {})[subjects.SENT])
        self.sent.append((message.subject.partition(".")[2], sent))

    async def listen(self, broker: Broker) -> None:
        await broker.subscribe("run.*", self.on_run)
        await broker.subscribe(
            subjects.DISPATCH, lambda m: self.dispatched.append(Dispatch.model_validate_json(m.data))
        )
        await broker.subscribe(
            subjects.ALL_CREDITS, lambda m: self.news.append(News.model_validate_json(m.data))
        )


@pytest.fixture
async def wire(broker: Broker) -> Wire:
    made = Wire()
    await made.listen(broker)
    return made


def dispatcher(of: Desk) -> Dispatcher:
    """What it decides with, once it leads."""
    return of.scheduler._dispatching._queues["sim"].dispatcher


class Told:
    """What the dispatcher of a desk is told from now on."""

    def __init__(self, of: Desk) -> None:
        self.dispatcher = dispatcher(of)
        self.arrived: list[Item] = []
        self.finished: list[int] = []
        arrive, finish = self.dispatcher.arrive, self.dispatcher.finish

        def on_arrive(item: Item, now: float) -> None:
            self.arrived.append(item)
            arrive(item, now)

        def on_finish(
            key: int, now: float, prompt_tokens: int, cached_tokens: int | None, output_tokens: int
        ) -> None:
            self.finished.append(output_tokens)
            finish(key, now, prompt_tokens, cached_tokens, output_tokens)

        self.dispatcher.arrive, self.dispatcher.finish = on_arrive, on_finish  # type: ignore[method-assign]


async def led(at: Serving) -> None:
    """Until the worker pulls nothing itself."""
    await until(lambda: at.worker._dispatched.active and not at.worker._pullers)


def index(at: Desk) -> PrefixIndex | None:
    """What the scheduler thinks that workers cache."""
    queue = at.scheduler._dispatching._queues.get("sim")
    return queue.dispatcher._index if queue is not None else None


async def pulls(at: Serving) -> None:
    """Until it pulls again."""
    await until(lambda: not at.worker._dispatched.active and at.worker._pullers)


async def test_who_dispatches_knows_what_a_worker_says_that_it_caches(
    server: NatsServer, broker: Broker
) -> None:
    engine = await sim.start(FAST)
    told = engine.blocks = Blocks()

    def take(name: int) -> None:
        told.stored([name], None, [name], 1, [()])
        told.ran([name], [name], prefix.BLOCK)

    def knows(at: Desk, *names: int) -> bool:
        found = index(at)
        if found is None or found.told(engine_at.worker.name) != told.number:
            return False
        return [name for name in range(9) if found.depths([name])] == list(names)

    async with serving(broker, engine) as engine_at:
        take(1)
        take(2)
        await until(lambda: told.number)  # told to nobody
        async with desk(server.url, "s1") as first:
            await until(lambda: knows(first, 1, 2))
            told.removed([1])
            take(3)
            await until(lambda: knows(first, 2, 3))
            told.number += 1  # a message that got lost
            take(4)
            await until(lambda: knows(first, 2, 3, 4))
            async with desk(server.url, "s2") as second:
                await first.kill()
                await until(lambda: knows(second, 2, 3, 4))
                told.cleared()
                await until(lambda: knows(second))
                take(5)
                await until(lambda: knows(second, 5))
                worker = engine_at.worker
                lie = Cached(worker=worker.name, started_ms=worker._started_ms, number=10**30, whole=True)
                await broker.publish(subjects.cached(worker.name), lie.model_dump_json().encode())
                take(6)
                await until(lambda: knows(second, 5, 6))
                told.lose()
                await until(lambda: knows(second, 5, 6))  # no more than a guess


async def test_requests_are_handed_out_while_a_scheduler_leads(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(FAST.model_copy(update={"block_size": 32}))
    async with serving(broker, engine) as at:
        await (await caller.submit(4)).finishes()
        assert not wire.sent
        async with desk(server.url) as lead:
            await led(at)
            calls = [
                await caller.submit(4, service_class=each) for each in ("interactive", "standard", "batch")
            ]
            for call in calls:
                await call.finishes()
            await caller.drained()
            assert [(to, each.number) for to, each in wire.sent] == [("w1", 1), ("w1", 2), ("w1", 3)]
            await until(lambda: sum(len(each.done) for each in wire.news) == 3)
            assert sum(len(each.first) for each in wire.news) == 3
            (account,) = dispatcher(lead)._running._accounts.values()
            assert (account.total, account.block_size) == (FAST.kv_blocks * 32, 32)
        await pulls(at)
        await (await caller.submit(4)).finishes()
        assert len(wire.sent) == 3
    assert len({each.request_id for each in await caller.usage(5)}) == 5
    await engine.close()


async def test_what_waits_goes_back_when_the_scheduler_stops(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(ONE)
    async with serving(broker, engine) as at:
        async with desk(server.url):
            await led(at)
            calls = [await caller.submit(50) for _ in range(6)]
            await calls[0].reach(FrameKind.HEAD)
        for call in calls:
            await call.finishes()
        await caller.drained()
    assert len(await caller.usage(6)) == 6
    await engine.close()


async def test_what_a_killed_scheduler_had_is_found_by_the_next(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(ONE)
    async with serving(broker, engine) as at, desk(server.url, "s1") as first:
        await led(at)
        async with desk(server.url, "s2"):
            calls = [await caller.submit(100) for _ in range(6)]
            await calls[0].reach(FrameKind.HEAD)
            await first.kill()
            for call in calls:
                await call.finishes()
            await caller.drained()
            assert {each.scheduler for each in wire.dispatched} == {"s1", "s2"}
            assert len({each.epoch for _, each in wire.sent}) == 2
    assert len(await caller.usage(6)) == 6
    await engine.close()


async def test_who_leads_next_knows_what_tenants_were_served_and_how_far_requests_have_come(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    """Of what runs when the leader dies, and is handed on once another leads."""
    engines = [await sim.start(FAST.model_copy(update={"beta0": 5})) for _ in range(2)]
    async with serving(broker, engines[0], "w2") as other, desk(server.url, "s1") as first:
        await led(other)
        await (await caller.submit(300)).finishes()

        async def noted() -> bool:  # it fades by a tenth a second
            return (await ledger.read(broker, "sim")).served.get("standard", {}).get("acme", 0.0) > 100

        await until(noted)
        async with serving(broker, engines[1], "w1", drain_timeout=0.0) as one:
            await led(one)
            other.worker._told_to_drain.set()
            await until(lambda: other.task.done())
            call = await caller.submit(600)
            await call.reach(FrameKind.DATA)
            async with desk(server.url, "s2") as second:
                await first.kill()
                await until(lambda: "sim" in second.scheduler._dispatching._queues)
                told = Told(second)
                assert told.dispatcher.served(time.monotonic())["standard"]["acme"] > 10
                one.stop.set()
                await until(lambda: one.task.done())
                async with serving(broker, engines[0], "w3"):
                    await call.finishes()
                    await until(lambda: told.finished)
                    (item,), (output,) = told.arrived, told.finished
                    assert item.done_tokens > 0
                    assert item.done_tokens + output == 600
    for engine in engines:
        await engine.close()


async def test_a_lease_that_lapses_and_that_nobody_takes_costs_the_dispatcher_nothing_that_it_knows(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await sim.start(ONE)
    async with serving(broker, engine) as at, desk(server.url) as lead:
        await led(at)
        known = lead.scheduler._dispatching._queues["sim"]
        calls = [await caller.submit(100) for _ in range(4)]
        await calls[0].reach(FrameKind.HEAD)

        async def idles(*_: object) -> bool:
            return False

        with monkeypatch.context() as lapse:
            lapse.setattr(lead.scheduler._leader, "confirm", idles)
            await until(lambda: not lead.scheduler.leads)
            calls += [await caller.submit(20) for _ in range(4)]
            await pulls(at)
        await led(at)
        for call in calls:
            await call.finishes()
        await caller.drained()
        assert lead.scheduler._dispatching._queues["sim"] is known
        assert len({each.epoch for each in wire.dispatched}) == 1
    assert len(await caller.usage(8)) == 8
    await engine.close()


async def test_a_request_that_waits_is_cancelled(server: NatsServer, broker: Broker, caller: Caller) -> None:
    engine = await sim.start(STUCK.model_copy(update={"max_num_seqs": 1}))
    async with serving(broker, engine, drain_timeout=0.0) as at, desk(server.url):
        await led(at)
        running = await caller.submit()
        await until(lambda: engine.stats().running)
        queued = await caller.submit()
        await queued.cancel()
        await queued.fails("cancelled")
        await running.cancel()
        await running.fails("cancelled")
        await caller.drained()
    assert {each.request_id: each.outcome for each in await caller.usage(2)} == dict.fromkeys(
        ("r1", "r2"), "cancelled"
    )
    await engine.close()


async def test_large_bodies_and_what_is_no_request_come_through(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(FAST)
    async with serving(broker, engine) as at, desk(server.url):
        await led(at)
        for size in (40_000, broker.max_payload - 8000, broker.max_payload + 8000):
            await (await caller.submit(3, user="x" * size)).finishes()
        stream = await caller.publish({"Nats-Msg-Id": "acme:raw", "Reply-To": "out.acme.box.raw"})
        (frame,) = await stream.next(LIMIT)
        assert frame.extra["code"] == "malformed_message"
        await caller.cleared()
        assert len(wire.sent) == 4
    await engine.close()


async def test_a_queue_of_large_bodies_does_not_cut_its_dispatcher_off(
    server: NatsServer, broker: Broker, caller: Caller
) -> None:
    """A server ends the connection of who is sent more than 64 MiB faster than it reads."""
    calls = [await caller.submit(3, user="x" * (broker.max_payload - 8000)) for _ in range(20)]
    engine = await sim.start(ONE)
    async with desk(server.url) as lead:
        await until(lambda: lead.scheduler.leads)
        disturbed = lead.broker.disturbed
        async with serving(broker, engine) as at:
            await led(at)
            for call in calls:
                await call.finishes()
        assert lead.broker.disturbed == disturbed
    await engine.close()


async def test_no_body_is_taken_for_a_longer_prompt_than_its_model_reads(
    server: NatsServer, broker: Broker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture has many more bytes than tokens."""
    items: list[Item] = []
    arrive = Dispatcher.arrive

    def noted(dispatcher: Dispatcher, item: Item, now: float) -> None:
        items.append(item)
        arrive(dispatcher, item, now)

    monkeypatch.setattr(Dispatcher, "arrive", noted)
    engine = await sim.start(FAST.model_copy(update={"context_tokens": 2048}))
    async with serving(broker, engine) as at, desk(server.url):
        await led(at)
        await (await caller.submit(3, user="x" * 40_000)).finishes()
        await (await caller.submit(3)).finishes()
    assert [item.prompt_tokens for item in items] == [2048, items[1].prompt_tokens]
    assert items[1].prompt_tokens < 200
    await engine.close()


async def test_one_prompt_goes_where_it_went_before(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engines = [await sim.start(FAST) for _ in range(2)]
    async with serving(broker, engines[0], "w1") as one, serving(broker, engines[1], "w2") as two:
        async with desk(server.url):
            await led(one)
            await led(two)
            for text in ("alpha ", "beta "):
                for number in range(4):
                    call = await caller.submit(3, prompt=text * 400 + str(number), shared=text * 400)
                    await call.finishes()
                    await until(lambda: sum(len(each.done) for each in wire.news) == len(wire.sent))
        to = [worker for worker, _ in wire.sent]
        assert len(set(to[:4])) == len(set(to[4:])) == 1
        assert [each.hit_tokens > 0 for _, each in wire.sent] == [False, True, True, True] * 2
    for engine in engines:
        await engine.close()


async def test_a_running_request_is_taken_back_with_its_progress(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(FAST)
    async with serving(broker, engine) as at, desk(server.url):
        await led(at)
        call = await caller.submit(400, service_class="batch")
        await call.reach(FrameKind.HEAD)
        asked = orjson.dumps({"do": "preempt", "request": call.request.key})
        assert orjson.loads(await broker.ask(subjects.ctl("w1"), asked))["ok"]
        await call.finishes()  # every token once
        assert [each.number for _, each in wire.sent] == [1, 2]
        await until(lambda: not at.worker._jobs)  # its end is told before it is acked
        assert not orjson.loads(await broker.ask(subjects.ctl("w1"), asked))["ok"]
    await engine.close()


async def test_a_worker_that_dies_with_what_it_was_sent_is_no_loss(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message got lost on its way, or its worker did before it told of it."""
    engine = await sim.start(FAST)
    async with serving(broker, engine) as at, desk(server.url) as lead:
        await led(at)
        relay = lead.broker.relay

        async def lost(*_: object) -> None:
            monkeypatch.setattr(lead.broker, "relay", relay)

        monkeypatch.setattr(lead.broker, "relay", lost)
        await (await caller.submit(3, prompt="word " * 1500)).finishes()  # it takes all there is room for
        assert [each.number for _, each in wire.sent] == [2]
    await engine.close()


async def test_what_a_lost_worker_ran_is_sent_to_another_once(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await sim.start(FAST.model_copy(update={"beta0": 50.0})), await sim.start(FAST)
    own = await client.connect(CONFIG.model_copy(update={"url": server.url}), "w1")
    async with own, desk(server.url), serving(own, first, "w1") as at:
        await led(at)
        calls = [await caller.submit(200) for _ in range(4)]
        for call in calls:
            await call.reach(FrameKind.HEAD)
        assert {worker for worker, _ in wire.sent} == {"w1"}
        publish = own.publish

        async def silent(*_: object, **__: object) -> None:
            """Nobody hears of it any more."""

        monkeypatch.setattr(own, "publish", silent)
        async with serving(broker, second, "w2"):
            ends = [await call.finishes() for call in calls]
            monkeypatch.setattr(own, "publish", publish)
        assert [worker for worker, _ in wire.sent] == ["w1"] * 4 + ["w2"] * 4
        assert [end.epoch for end in ends] == [2] * 4
    await first.close()
    await second.close()


async def test_a_request_is_explained(server: NatsServer, broker: Broker, caller: Caller) -> None:
    engine = await sim.start(FAST)
    async with serving(broker, engine) as at, desk(server.url):
        await led(at)
        await (await caller.submit(3, request_id="chat/1")).finishes()
        for tenant in ((), ("--tenant", "acme")):
            status, out, err = await command.run("explain", server.url, "chat/1", *tenant)
            assert status == 0, err
            assert "chat/1 of acme, standard, for sim\nsent to w1 after " in out
            assert "\nbecause " in out
            assert out.splitlines()[-1].split()[0] == "w1"
        status, out, _ = await command.run("explain", server.url, "chat/1", "--json")
        told = orjson.loads(out)
        assert (told["worker"], told["tenant"], told["candidates"][0]["worker"]) == ("w1", "acme", "w1")
        status, _, err = await command.run("explain", server.url, "other")
        assert status == 1
        assert "knows no request 'other'" in err
    status, _, err = await command.run("explain", server.url, "chat/1")
    assert status == 1
    assert "no scheduler answered" in err
    await engine.close()


async def test_without_dispatching_workers_pull(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(FAST)
    async with serving(broker, engine), desk(server.url, enabled=False) as lead:
        await until(lambda: lead.scheduler.leads)
        await (await caller.submit(3)).finishes()
        assert metric("headrace_leader") == 1
    assert not wire.sent
    assert not wire.dispatched
    await engine.close()


async def test_lies_and_garbage_cost_no_request(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(FAST)
    garbage = (b"", b"[]", b"\xff{", b'{"worker": "w1"}', b"9" * 10_000)
    async with serving(broker, engine) as at, desk(server.url) as lead:
        await led(at)
        beat = lead.scheduler._dispatching._beats["w1"]
        lies = [
            News(worker="w1", credit=Credit(slots_free=10**30, step_tokens=-5), dispatched=(1, 10**30)),
            News(worker="w1", credit=Credit(held=-(10**30), kv_tokens_free=10**40), dispatched=(-1, -1)),
            News(worker="w1", credit=Credit(kv_tokens_total=9, kv_block_tokens=-5), dispatched=(0, 0)),
            News(worker="nobody", credit=Credit(), dispatched=(0, 0), done=((1, 2, 3, 4),)),
            News(worker="w1", credit=Credit(), dispatched=(0, 0), first=((9, -3),), done=((9, -1, 9, -7),)),
        ]
        for data in (*garbage, *(each.model_dump_json().encode() for each in lies)):
            for subject in ("credit.w1", "dispatch", "run.w1", "explain", "held.w1"):
                await broker.publish(subject, data)
        await broker.publish(
            "fleet.w1", beat.model_copy(update={"credit": lies[0].credit}).model_dump_json().encode()
        )
        await broker.publish("run.w1", b"{}", {subjects.SENT: Sent(epoch=1, number=1).model_dump_json()})
        for _ in range(3):
            await (await caller.submit(3)).finishes()
        await caller.drained()
        # However much room it claims, and however little: what it has no slot for comes back.
        calls = [await caller.submit(20) for _ in range(30)]
        for call in calls:
            await call.finishes()
    assert len(await caller.usage(33)) == 33
    await engine.close()


async def test_a_defect_of_the_dispatcher_leaves_the_workers_to_pull(
    server: NatsServer, broker: Broker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await sim.start(ONE)
    async with serving(broker, engine) as at, desk(server.url) as lead:
        await led(at)
        calls = [await caller.submit(60) for _ in range(4)]
        await calls[0].reach(FrameKind.HEAD)

        def breaks(*_: object) -> None:
            raise ZeroDivisionError

        dispatcher = lead.scheduler._dispatching._queues["sim"].dispatcher
        monkeypatch.setattr(dispatcher, "decide", breaks)
        for call in calls:
            await call.finishes()
        await pulls(at)
    assert len(await caller.usage(4)) == 4
    await engine.close()


async def test_a_batch_request_gives_way_and_goes_on_later(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(ONE.model_copy(update={"beta0": 10}))
    async with serving(broker, engine) as at, desk(server.url, budget={"interactive": 0.1}) as lead:
        await led(at)
        told = Told(lead)
        long = await caller.submit(200, service_class="batch")
        await long.reach(FrameKind.DATA)
        urgent = await caller.submit(3, service_class="interactive")
        await urgent.finishes()
        assert not long.stream.finished
        await long.finishes()  # every token once
        assert [each.epoch for each in long.frames][-1] == 2
        assert len(wire.sent) == 3
        await until(lambda: len(told.finished) == 2)
        assert [each.done_tokens > 0 for each in told.arrived] == [False, False, True]
        assert told.arrived[-1].done_tokens + told.finished[-1] == 200
        _, out, _ = await command.run("explain", server.url, long.request.request_id)
        assert f"\ntaken back from w1: request {urgent.stored.seq}, interactive, needs its room\n" in out
        assert (
            f"\na step of its class's workers takes at most {FAST.max_num_batched_tokens} prompt tokens"
            in out
        )
    await engine.close()


async def test_what_can_not_be_continued_is_not_taken_back(
    server: NatsServer, broker: Broker, caller: Caller, wire: Wire
) -> None:
    engine = await sim.start(ONE.model_copy(update={"beta0": 10}))
    engine.continues = False
    async with serving(broker, engine) as at, desk(server.url, budget={"interactive": 0.1}):
        await led(at)
        long = await caller.submit(100, service_class="batch")
        await long.reach(FrameKind.DATA)
        urgent = await caller.submit(3, service_class="interactive")
        await long.finishes()
        await urgent.finishes()
        assert [each.epoch for each in long.frames][-1] == 1
    await engine.close()


async def test_an_adapter_has_its_turn_where_others_are_always_busy(
    server: NatsServer, broker: Broker, caller: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dispatching, "_TURN", 0.2)
    engine = await sim.start(FAST.model_copy(update={"adapter_slots": 1, "adapters_in_memory": 1}))
    for name in ("ada", "bob"):
        await push(broker, name)
    async with serving(broker, engine, adapter_cache=str(tmp_path)) as at, desk(server.url):
        await led(at)
        await (await caller.submit(3, model="ada@1")).finishes()
        over = asyncio.Event()

        async def busy() -> None:
            while not over.is_set():
                await (await caller.submit(30, model="ada@1")).finishes()

        others = [asyncio.create_task(busy()) for _ in range(3)]
        try:
            await (await caller.submit(3, model="bob@1")).finishes()
        finally:
            over.set()
            await asyncio.gather(*others)
    await engine.close()


async def test_headers_that_can_not_be_written_again_hold_nobody_up(
    server: NatsServer, broker: Broker, caller: Caller
) -> None:
    engine = await sim.start(FAST)
    async with serving(broker, engine) as at, desk(server.url):
        await led(at)
        head = b"NATS/1.0\r\nNats-Msg-Id: acme:raw\r\nReply-To: out.acme.box.raw\r\nPath: /v1/completions\r\n"
        head += b"K(x): 1\r\n\r\n"
        body = b'{"model": "sim", "prompt": "x", "max_tokens": 3}'
        stream = caller.mailbox.open("acme", "raw")
        address = urlsplit(server.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b'CONNECT {"headers": true, "verbose": false}\r\n')
        writer.write(b"HPUB req.sim.standard.acme.sim %d %d\r\n" % (len(head), len(head) + len(body)))
        writer.write(head + body + b"\r\n")
        await writer.drain()
        beside = await caller.submit(3)
        frames = []
        while not stream.finished:
            frames += await stream.next(LIMIT)
        assert frames[-1].kind is FrameKind.END
        await beside.finishes()
        writer.close()
    await engine.close()


async def test_requests_pass_a_leader_that_hangs(tmp_path: Path) -> None:
    """Its pulls stand, and what comes to them is handed on."""
    async with Fleet(tmp_path) as fleet:
        config = CONFIG.model_copy(update={"url": fleet.nats.url})
        async with await client.connect(config, "test") as broker, calling(broker) as caller:
            wire = Wire()
            await wire.listen(broker)
            settings = {"broker__ack_wait": 300.0}
            desks = {
                name: await fleet.start("scheduler", scheduler__name=name, **settings)
                for name in ("s1", "s2")
            }
            await fleet.start("worker", worker__name="w1", **settings)
            await until(lambda: wire.dispatched and wire.dispatched[-1].bases)
            await (await caller.submit(3)).finishes()
            for _ in desks:  # the second in turn had to hand on for the first, and must have left off
                await until(lambda: _leads(wire))
                leads = _leads(wire)
                hung = desks[leads].process
                hung.send_signal(signal.SIGSTOP)
                try:
                    for call in [await caller.submit(3) for _ in range(20)]:
                        await call.finishes()
                    await until(lambda: _leads(wire) not in ("", leads))  # noqa: B023
                finally:
                    hung.send_signal(signal.SIGCONT)
                await until(lambda: _left(wire, leads))  # noqa: B023
                for call in [await caller.submit(3) for _ in range(5)]:
                    await call.finishes()
            await caller.drained()
            assert len(await caller.usage(51)) == 51


async def test_a_leader_that_hung_for_longer_than_the_ack_wait_sends_nothing_that_it_had(
    tmp_path: Path,
) -> None:
    """Nobody else led: the broker gave its requests to workers, which have answered."""
    async with Fleet(tmp_path) as fleet:
        config = CONFIG.model_copy(update={"url": fleet.nats.url})
        async with await client.connect(config, "test") as broker, calling(broker) as caller:
            wire = Wire()
            await wire.listen(broker)
            settings = {"broker__ack_wait": 1.0}
            desk = await fleet.start("scheduler", scheduler__name="s1", **settings)
            await fleet.start("worker", worker__name="w1", sim__max_num_seqs=1, sim__itl_ms=20, **settings)
            await until(lambda: wire.dispatched and wire.dispatched[-1].bases)
            calls = [await caller.submit(50) for _ in range(4)]
            await calls[0].reach(FrameKind.HEAD)
            desk.process.send_signal(signal.SIGSTOP)
            try:
                for call in calls:
                    await call.finishes()
                await caller.drained()
                sent, said = len(wire.sent), len(wire.dispatched)
            finally:
                desk.process.send_signal(signal.SIGCONT)
            await until(lambda: len(wire.dispatched) > said + 5)
            assert len(wire.sent) == sent


async def test_a_scheduler_that_has_just_come_takes_nothing_from_those_it_has_not_heard(
    server: NatsServer, broker: Broker, caller: Caller
) -> None:
    engine = await sim.start(FAST.model_copy(update={"beta0": 20.0}))
    async with serving(broker, engine, heartbeat=0.5):
        calls = [await caller.submit(200) for _ in range(4)]
        for call in calls:
            await call.reach(FrameKind.HEAD)
        async with desk(server.url, settings={"lost_after": 1.5, "orphan_after": 60.0}):
            ends = [await call.finishes() for call in calls]
    assert [end.epoch for end in ends] == [1] * 4
    await engine.close()


def _leads(wire: Wire) -> str:
    last = wire.dispatched[-1]
    return last.scheduler if last.bases else ""


def _left(wire: Wire, scheduler: str) -> bool:
    """Whether its last word was that it dispatches no longer."""
    return not next(told for told in reversed(wire.dispatched) if told.scheduler == scheduler).bases
