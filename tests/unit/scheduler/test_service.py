"""The scheduler over the fake broker: the registry, and the last resort of queued requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest

from broker import base, bodies, codec, errors, replies, subjects, usage
from broker.base import Broker, Delivery
from broker.memory import MemoryBroker
from broker.messages import (
    LAST_EPOCH,
    Credit,
    DeadLetter,
    FrameKind,
    Heartbeat,
    ModelCard,
    Request,
    ServiceClass,
    UsageEvent,
)
from scheduler.config import SchedulerConfig
from scheduler.dispatch.config import DispatchConfig
from scheduler.service import Scheduler
from tests.waiting import LIMIT, until
from tests.workbench import PATH, STUCK, Caller, calling, metric, serving, soon
from workers.engines import sim
from workers.held import Held

CARD = ModelCard(id="sim", base="sim", context_tokens=4096, paths=(PATH,))


class Flaky(MemoryBroker):
    """A broker whose first `refusals` writes to the registry fail."""

    refusals = 0

    async def put(self, bucket: str, key: str, value: bytes) -> None:
        if self.refusals:
            self.refusals -= 1
            raise errors.Unavailable("not now")
        await super().put(bucket, key, value)


@pytest.fixture
def broker(anyio_backend: object) -> Flaky:
    return Flaky()


@pytest.fixture
async def caller(broker: MemoryBroker) -> AsyncIterator[Caller]:
    async with calling(broker.client()) as made:
        yield made


@asynccontextmanager
async def scheduling(broker: MemoryBroker, **settings: Any) -> AsyncIterator[Scheduler]:
    config = SchedulerConfig(**{"lost_after": 0.03, "sweep": 0.01, "orphan_after": 0.0, **settings})
    # The workers here are no workers: they pull for themselves.
    scheduler, stop = Scheduler(config, broker, DispatchConfig(enabled=False)), asyncio.Event()
    task = asyncio.create_task(scheduler.run(stop))
    await until(lambda: scheduler.leads)
    try:
        yield scheduler
    finally:
        stop.set()
        await asyncio.wait_for(task, LIMIT)


async def beat(broker: Broker, worker: str = "w1", **more: Any) -> None:
    told: dict[str, Any] = {
        "worker": worker,
        "engine": "sim",
        "base": "sim",
        "models": (CARD,),
        "started_ms": 1,
        "seq": 0,
        "state": "serving",
        "credit": Credit(),
    }
    data = Heartbeat(**(told | more)).model_dump_json().encode()
    await broker.publish(subjects.heartbeat(worker), data)


@asynccontextmanager
async def beating(broker: Broker, **more: Any) -> AsyncIterator[None]:
    """A worker that lives."""

    async def live() -> None:
        while True:
            await beat(broker, **more)
            await asyncio.sleep(0.005)

    task = asyncio.create_task(live())
    yield
    task.cancel()


async def registry(broker: MemoryBroker) -> dict[str, ModelCard]:
    return {
        subjects.name(key): ModelCard.model_validate_json(value)
        for key, value in broker.hub.bucket(subjects.KV_MODELS).items()
    }


async def remember(broker: MemoryBroker, card: ModelCard = CARD) -> None:
    """As an earlier scheduler left it: the base was served once."""
    await broker.put(subjects.KV_MODELS, subjects.token(card.id), card.model_dump_json().encode())


async def sweeps(broker: MemoryBroker, count: int = 2) -> None:
    """Until the scheduler has looked at the queue so many times from now on."""
    seen = 0
    looked = broker.counts

    async def counting(stream: str, subject: str) -> dict[str, int]:
        nonlocal seen
        seen += 1
        return await looked(stream, subject)

    broker.counts = counting  # type: ignore[method-assign]
    await until(lambda: seen > count)
    broker.counts = looked  # type: ignore[method-assign]


# The registry


async def test_the_registry_holds_what_workers_serve_and_keeps_it(broker: Flaky, caller: Caller) -> None:
    adapter = ModelCard(id="ada v2.1", base="sim")
    async with scheduling(broker):
        await beat(caller.broker, models=(CARD, adapter))
        await until(lambda: len(broker.hub.bucket(subjects.KV_MODELS)) == 2)
        await until(lambda: metric("headrace_workers", base="sim", state="serving") == 0)
    assert await registry(broker) == {"sim": CARD, "ada v2.1": adapter}


async def test_a_card_that_changed_is_written_again(broker: Flaky, caller: Caller) -> None:
    wider = CARD.model_copy(update={"context_tokens": 8192})
    async with scheduling(broker):
        await beat(caller.broker)
        await beat(caller.broker, models=(wider,))

        async def written() -> bool:
            return await registry(broker) == {"sim": wider}

        await until(written)


async def test_workers_that_differ_about_a_model_do_not_write_in_turns(broker: Flaky, caller: Caller) -> None:
    wider = CARD.model_copy(update={"context_tokens": 8192})
    writes: list[str] = []
    await caller.broker.watch(subjects.KV_MODELS, lambda key, value: writes.append(key))
    async with scheduling(broker):
        await beat(caller.broker, "w1")
        await until(lambda: writes)
        for number in range(5):
            await beat(caller.broker, "w1", seq=number)
            await beat(caller.broker, "w2", seq=number, models=(wider,))
        await until(lambda: metric("headrace_workers", base="sim", state="serving") == 2)
        assert await registry(broker) == {"sim": CARD}
        assert writes == ["sim"]
        await beat(caller.broker, "w1", state="gone")
        await beat(caller.broker, "w2", seq=6, models=(wider,))

        async def written() -> bool:
            return await registry(broker) == {"sim": wider}

        await until(written)


async def test_a_registry_that_could_not_be_written_is_written_later(broker: Flaky, caller: Caller) -> None:
    broker.refusals = 2
    async with scheduling(broker):
        await beat(caller.broker)
        await until(lambda: broker.refusals == 1)
        await beat(caller.broker)
        await until(lambda: broker.refusals == 0)
        await beat(caller.broker)
        await until(lambda: broker.hub.bucket(subjects.KV_MODELS))
    assert await registry(broker) == {"sim": CARD}


async def test_garbage_heartbeats_are_logged_and_ignored(
    broker: Flaky, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    async with scheduling(broker):
        with caplog.at_level(logging.WARNING):
            for data in (b"", b"\xff", b"{}", b"[" * 10_000):
                await caller.broker.publish("fleet.w1", data)
            await beat(caller.broker)
            await until(lambda: broker.hub.bucket(subjects.KV_MODELS))
    assert caplog.text.count("fleet.w1 is unreadable") == 4


async def test_workers_are_counted_by_state(broker: Flaky, caller: Caller) -> None:
    lost = metric("headrace_workers_lost_total")
    async with scheduling(broker, lost_after=0.2):
        await beat(caller.broker, "w1")
        await beat(caller.broker, "w2")
        await beat(caller.broker, "w3", state="draining")
        await beat(caller.broker, "w4")
        await beat(caller.broker, "w4", state="gone")
        await until(lambda: metric("headrace_workers", base="sim", state="serving") == 2)
        assert metric("headrace_workers", base="sim", state="draining") == 1
        await until(lambda: metric("headrace_workers_lost_total") == lost + 3)
        await until(lambda: metric("headrace_workers", base="sim", state="serving") == 0)


async def noted(broker: MemoryBroker, model: str = "sim") -> int:
    """When the registry says that a worker last served it."""
    value = broker.hub.bucket(subjects.KV_MODELS).get(model)
    return int(orjson.loads(value).get("served_ms", 0)) if value else 0


async def test_a_model_that_nobody_serves_for_long_is_forgotten(broker: Flaky, caller: Caller) -> None:
    """By what the registry says, so that a new scheduler goes on where the last one ended."""
    async with scheduling(broker):
        await beat(caller.broker)
        await until(lambda: noted(broker))
    async with scheduling(broker):
        await sweeps(broker)
        assert await noted(broker)
    async with scheduling(broker, forget_after=0.05):
        await until(lambda: not broker.hub.bucket(subjects.KV_MODELS))
        call = await caller.submit()
        await call.fails("model_not_found")


async def test_a_model_that_is_served_stays(broker: Flaky, caller: Caller) -> None:
    async with scheduling(broker, lost_after=0.3, forget_after=0.05), beating(caller.broker):
        await until(lambda: noted(broker))
        first = await noted(broker)

        async def noted_again() -> bool:
            return await noted(broker) > first + 100

        await until(noted_again)
        assert await noted(broker)


async def test_it_is_noted_seldom_that_a_model_is_served(broker: Flaky, caller: Caller) -> None:
    writes: list[base.Message] = []
    await caller.broker.subscribe(f"$KV.{subjects.KV_MODELS}.>", writes.append)
    async with scheduling(broker):
        for _ in range(20):
            await beat(caller.broker)
            await asyncio.sleep(0)
        await sweeps(broker)
    assert len(writes) == 1


async def test_an_entry_without_a_date_counts_from_now(broker: Flaky, caller: Caller) -> None:
    await remember(broker)
    async with scheduling(broker):
        await until(lambda: noted(broker))
    assert await registry(broker) == {"sim": CARD}


async def test_garbage_in_the_registry_is_logged_and_left(
    broker: Flaky, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    await broker.put(subjects.KV_MODELS, "%FF", b"{}")
    await broker.put(subjects.KV_MODELS, "bad", b"\xff")
    async with scheduling(broker):
        await beat(caller.broker)
        await until(lambda: noted(broker))
    assert caplog.text.count("is unreadable") == 2


async def test_it_tells_where_its_metrics_are(broker: Flaky, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with scheduling(broker):
            (record,) = [r for r in caplog.records if r.message == "serving"]
            async with httpx.AsyncClient() as http:
                answer = await http.get(vars(record)["metrics_url"])
    assert "headrace_swept_total" in answer.text


# Requests that nobody will pull


async def enqueue(caller: Caller, subject: str) -> replies.Stream:
    headers = {"Nats-Msg-Id": "acme:raw", "Reply-To": "out.acme.box.raw", "Path": PATH}
    return await caller.publish(headers, subject=subject)


async def test_a_request_for_a_base_that_never_was_gets_an_error(broker: Flaky, caller: Caller) -> None:
    await remember(broker)
    stream = await enqueue(caller, "req.typo.standard.acme.typo")
    swept = metric("headrace_swept_total", reason="orphan")
    async with scheduling(broker):
        (frame,) = await stream.next(5)
        assert (frame.kind, frame.extra["status"]) == (FrameKind.ERROR, 404)
        assert b"bases served: sim" in frame.payload
        await caller.drained()
        (event,) = await caller.usage(1)
        assert (event.outcome, event.code, event.base) == ("failed", "model_not_found", "typo")
    assert metric("headrace_swept_total", reason="orphan") - swept == 1


async def test_it_is_given_time_for_a_first_worker(broker: Flaky, caller: Caller) -> None:
    async with scheduling(broker, orphan_after=60.0):
        call = await caller.submit()
        await sweeps(broker)
        assert metric("headrace_queued", base="sim", **{"class": "standard"}) == 1
        await beat(caller.broker)
        await sweeps(broker)
        assert await caller.queued() == 1
        assert await call.stream.next(0.0) == []


@pytest.mark.parametrize(
    ("subject", "answered"),
    [
        ("req.sim.urgent.acme.sim", True),
        ("req.sim.standard.acme.sim.more", True),
        ("req.sim.standard.acme", True),
        ("req.sim.standard.mallory", False),
        ("req.sim.standard.%FF.sim", False),
        ("req.x", False),
    ],
)
async def test_a_subject_that_no_queue_has_goes_to_the_dead_letters(
    broker: Flaky, caller: Caller, subject: str, answered: bool
) -> None:
    await remember(broker)
    stream = await enqueue(caller, subject)
    async with scheduling(broker, orphan_after=60.0):
        await caller.drained()
        await until(lambda: broker.hub.stream(subjects.DEAD).entries)
    (record,) = await caller.broker.read(subjects.DEAD, subjects.ALL_DEAD)
    assert DeadLetter.model_validate_json(record.data).subject == subject
    assert [f.extra["code"] for f in await stream.next(0.01)] == ["malformed_message"] * answered


async def test_a_served_base_is_left_to_its_workers(broker: Flaky, caller: Caller) -> None:
    async with scheduling(broker, lost_after=0.3), beating(caller.broker):
        await until(lambda: broker.hub.bucket(subjects.KV_MODELS))
        await caller.submit(deadline_ms=1)
        await sweeps(broker)
        assert await caller.queued() == 1


async def test_an_expired_request_of_a_base_whose_workers_sleep_ends(broker: Flaky, caller: Caller) -> None:
    async with scheduling(broker, lost_after=0.3), beating(caller.broker, state="asleep"):
        await until(lambda: broker.hub.bucket(subjects.KV_MODELS))
        late = await caller.submit(deadline_ms=1)
        await late.fails("deadline_exceeded")


@pytest.mark.parametrize("epoch", [0, 3])
async def test_an_expired_request_of_a_base_without_workers_ends(
    broker: Flaky, caller: Caller, epoch: int
) -> None:
    """Also one that a worker had begun to run: its reader has left epoch 0 behind."""
    await remember(broker)
    late, in_time, endless = (
        await caller.submit(deadline_ms=1),
        await caller.submit(deadline_ms=soon(60)),
        await caller.submit(),
    )
    if epoch:
        await replies.Writer(broker, late.request.reply_to, epoch).beat("dead")
        await late.reach(FrameKind.BEAT)
    async with scheduling(broker):
        frame = await late.fails("deadline_exceeded")
        assert frame.epoch == LAST_EPOCH
        assert [e.request_id for e in await caller.usage(1)] == ["r1"]
        await sweeps(broker)
    assert await caller.queued() == 2
    assert not in_time.stream.finished
    assert not endless.stream.finished


@pytest.mark.parametrize("deadline", ["9" * 5000, "²"])
async def test_a_deadline_that_is_no_time_goes_to_the_dead_letters(
    broker: Flaky, caller: Caller, deadline: str
) -> None:
    await remember(broker)
    headers = {"Nats-Msg-Id": "acme:raw", "Reply-To": "out.acme.box.raw", "Path": PATH, "Deadline": deadline}
    stream = await caller.publish(headers)
    async with scheduling(broker):
        (frame,) = await stream.next(5)
        assert frame.extra["code"] == "malformed_message"
        await caller.drained()
    (record,) = await caller.broker.read(subjects.DEAD, subjects.ALL_DEAD)
    assert DeadLetter.model_validate_json(record.data).headers["Deadline"] == deadline


async def test_a_message_that_breaks_its_sweep_breaks_no_other(
    broker: Flaky, caller: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = await caller.submit(deadline_ms=1), await caller.submit(deadline_ms=1)
    await remember(broker)
    told = usage.event

    def broken(request: Request, *args: Any, **more: Any) -> UsageEvent:
        if request.request_id == bad.request.request_id:
            raise ZeroDivisionError
        return told(request, *args, **more)

    monkeypatch.setattr(usage, "event", broken)
    async with scheduling(broker):
        await good.fails("deadline_exceeded")
        assert [e.request_id for e in await caller.usage(1)] == ["r2"]
        await sweeps(broker)
    assert f"message {bad.stored.seq} could not be swept" in caplog.text


async def test_every_message_is_looked_at_however_many_there_are(
    broker: Flaky, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some pages a sweep, and the next one goes on from there."""
    monkeypatch.setattr("scheduler.service._SWEEP_PAGE", 2)
    monkeypatch.setattr("scheduler.service._SWEEP_PAGES", 2)
    await remember(broker)
    for _ in range(9):
        await caller.submit()
    late = await caller.submit(deadline_ms=1)
    async with scheduling(broker):
        await late.fails("deadline_exceeded")
        soon_late = await caller.submit(deadline_ms=soon(0.02))
        await soon_late.fails("deadline_exceeded")
    assert await caller.queued() == 9


# Cancels


@pytest.mark.parametrize("reason", ["expired", "orphan", "cancelled"])
async def test_a_request_that_ends_here_takes_its_stored_body_along(
    broker: Flaky, caller: Caller, reason: str
) -> None:
    if reason != "orphan":
        await remember(broker)
    deadline_ms = 1 if reason == "expired" else soon(60)
    call = await caller.submit(prompt="x" * 2 * broker.max_payload, deadline_ms=deadline_ms)
    other = await caller.submit(prompt="y" * 2 * broker.max_payload, model="other", deadline_ms=soon(60))
    broker.hub.remove(subjects.REQUESTS, other.stored.seq)  # it runs elsewhere, say
    both = await caller.kept()
    async with scheduling(broker):
        if reason == "cancelled":
            await call.cancel()
        await call.end()
        await until(lambda: _kept_less(caller, both))
    with pytest.raises(errors.BodyLost):
        await bodies.load(broker, call.request)
    assert len((await bodies.load(broker, other.request)).body) > 2 * broker.max_payload


async def _kept_less(caller: Caller, than: int) -> bool:
    return await caller.kept() <= than / 2


async def test_a_cancel_with_its_sequence_deletes_a_queued_request(broker: Flaky, caller: Caller) -> None:
    await remember(broker)
    async with scheduling(broker):
        other, call = await caller.submit(), await caller.submit(request_id="a.b:c")
        body = orjson.dumps({"seq": call.stored.seq})
        await caller.broker.publish("cancel.acme.a%2eb:c", body)
        await call.fails("cancelled")
        (event,) = await caller.usage(1)
        assert (event.outcome, event.status, event.worker) == ("cancelled", 499, "")
        await caller.broker.publish("cancel.acme.a%2eb:c", body)
        assert await caller.queued() == 1
        await other.cancel()
        await other.fails("cancelled")
        assert len(await caller.usage(2)) == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"seq": "1"}',
        b'{"seq": -1}',
        b'{"seq": true}',
        b'{"seq": 2}',
        b'{"seq": 99}',
    ],
)
async def test_a_cancel_that_names_another_message_deletes_nothing(
    broker: Flaky, caller: Caller, body: bytes
) -> None:
    await remember(broker)
    async with scheduling(broker):
        mine, next_one = await caller.submit(), await caller.submit()
        await caller.broker.publish("cancel.acme.r1", body)
        await caller.broker.publish("cancel.acme.%FF", orjson.dumps({"seq": mine.stored.seq}))
        await caller.broker.publish("cancel.mallory.r1", orjson.dumps({"seq": mine.stored.seq}))
        await next_one.cancel()
        await next_one.fails("cancelled")  # and so the cancels before it have been looked at
        assert await caller.queued() == 1


async def test_a_request_that_a_worker_runs_is_the_workers_to_cancel(broker: Flaky, caller: Caller) -> None:
    taken: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    puller = await broker.pull("sim", ServiceClass.STANDARD, taken.set_result, lambda: None)
    held = Held(broker, "w1", 1)
    async with scheduling(broker, lost_after=5.0), beating(broker):
        await puller.ask(1)
        running = await caller.submit()
        held.take(await taken)
        await held.tell()
        await replies.Writer(broker, running.request.reply_to, 1).beat("w1")
        queued = await caller.submit()
        await running.cancel()
        await queued.cancel()
        await queued.fails("cancelled")
        assert await caller.queued() == 1
    frames = [codec.decode(r.data) for r in await broker.read(subjects.REPLIES, running.request.reply_to)]
    assert [f.kind for f in frames] == [FrameKind.BEAT]
    records = await broker.read(subjects.USAGE, subjects.ALL_USAGE)
    assert [UsageEvent.model_validate_json(r.data).request_id for r in records] == ["r2"]


async def test_a_request_that_waits_for_its_next_worker_is_deleted(broker: Flaky, caller: Caller) -> None:
    """Its first one spoke, and died: the journal tells of a worker, and none has it."""
    taken: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    puller = await broker.pull("sim", ServiceClass.STANDARD, taken.set_result, lambda: None)
    await remember(broker)
    call = await caller.submit()
    await puller.ask(1)
    delivery = await taken
    writer = replies.Writer(broker, call.request.reply_to, delivery.attempt)
    await writer.head(200, {"content-type": "text/event-stream"}, "dead", b"data: 1\n\n", [(0, [1])])
    await delivery.nak()
    async with scheduling(broker):
        await call.cancel()
        await call.fails("cancelled")
        assert await caller.queued() == 0
    (event,) = await caller.usage(1)
    assert event.outcome == "cancelled"


async def test_a_request_that_runs_without_a_word_so_far_is_ended_once(broker: Flaky, caller: Caller) -> None:
    engine = await sim.start(STUCK)
    async with scheduling(broker, lost_after=0.3), serving(broker.client(), engine):
        running = await caller.submit()
        await until(lambda: engine.stats().running)
        await running.cancel()
        await running.fails("cancelled")
        await caller.drained()
    assert [e.worker for e in await caller.usage(1)] == ["w1"]  # what the scheduler had begun has ended
    await engine.close()


async def test_a_broker_away_puts_the_sweep_off(broker: Flaky, caller: Caller) -> None:
    await remember(broker)
    stream = await enqueue(caller, "req.typo.standard.acme.typo")
    async with scheduling(broker, orphan_after=0.05) as scheduler:
        broker.disconnect()
        assert not scheduler.leads
        broker.reconnect()
        (frame,) = await stream.next(5)
        assert frame.extra["code"] == "model_not_found"


async def test_a_sweep_that_fails_is_put_off(
    broker: Flaky, caller: Caller, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remember(broker)
    stream = await enqueue(caller, "req.typo.standard.acme.typo")

    async def fails(stream: str, subject: str) -> dict[str, int]:
        raise errors.Unavailable("not now")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "counts", fails)
        async with scheduling(broker):
            await until(lambda: "no sweep" in caplog.text)
            patch.undo()
            (frame,) = await stream.next(5)
            assert frame.extra["code"] == "model_not_found"
