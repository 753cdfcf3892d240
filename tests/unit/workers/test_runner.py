"""A worker over the fake broker: what happens to a request from its delivery to its ack."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest

from broker import base, codec, errors, letters, replies, subjects, usage
from broker.base import Delivery, Record
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import TERMINAL, DeadLetter, Frame, FrameKind, Heartbeat, ServiceClass
from tests.waiting import until
from tests.workbench import (
    FAST,
    PATH,
    STUCK,
    Call,
    Caller,
    Clock,
    Serving,
    WaxEngine,
    calling,
    gone,
    idle,
    metric,
    serving,
    soon,
    start_response,
)
from workers import quarantine, screening
from workers.config import SimConfig
from workers.engines import sim
from workers.engines.base import Engine, Receive, Refused, Scope, Send
from workers.engines.sim_pace import StepPacer
from workers.engines.step_model import IntegrityError
from workers.job import Touch


@pytest.fixture
def clock(anyio_backend: object) -> Clock:
    return Clock()


@pytest.fixture
def broker(clock: Clock) -> MemoryBroker:
    return MemoryBroker(BrokerConfig(), clock)


@pytest.fixture
async def caller(broker: MemoryBroker) -> AsyncIterator[Caller]:
    async with calling(broker.client()) as made:
        yield made


@asynccontextmanager
async def simulated(config: SimConfig = FAST) -> AsyncIterator[sim.SimEngine]:
    engine = await sim.start(config)
    yield engine
    await engine.close()


async def hold(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one chunk and wait until the caller goes."""
    await start_response(send)
    await gone(receive)


class Gate:
    """An app that answers when it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send)
        await self.open.wait()
        await send({"type": "http.response.body", "body": b"end", "more_body": False})


# Running


async def test_a_request_runs_to_its_end(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated() as engine, serving(broker, engine):
        call = await caller.submit(20)
        end = await call.finishes()
        await caller.drained()
        (event,) = await caller.usage(1)
        assert idle(engine)
    kinds = [f.kind for f in call.frames]
    assert kinds[0] is FrameKind.HEAD
    assert [f.seq for f in call.frames] == list(range(len(kinds)))
    assert {f.epoch for f in call.frames} == {1}
    assert call.frames[0].extra["status"] == 200
    assert call.frames[0].extra["worker"] == "w1"
    assert call.payload.endswith(b"data: [DONE]\n\n")
    prompt = len(sim.tokenize(call.prompt))
    assert end.extra["usage"] == {"prompt_tokens": prompt, "cached_tokens": 0, "completion_tokens": 20}
    assert (event.outcome, event.worker, event.model, event.tenant) == ("finished", "w1", "sim", "acme")
    assert (event.prompt_tokens, event.completion_tokens, event.request_id) == (prompt, 20, "r1")


async def test_many_at_once_each_get_their_own_answer(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated() as engine, serving(broker, engine):
        calls = [await caller.submit(1 + n % 7, stream=n % 2 == 0) for n in range(40)]
        for call in calls:
            await call.finishes()
        await caller.drained()
        events = await caller.usage(40)
        assert sorted(e.request_id for e in events) == sorted(c.request.request_id for c in calls)
        assert sum(e.completion_tokens for e in events) == sum(c.tokens for c in calls)
        assert idle(engine)


async def test_frames_of_several_choices_number_each(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated() as engine, serving(broker, engine):
        call = await caller.submit(6, n=3)
        await call.finishes()
        for choice in (1, 2):
            found = [c for f in call.frames for c in f.choices if c[0] == choice]
            ids = [token for _, _, some in found for token in some]
            assert ids == sim.expected_tokens(sim.tokenize(call.prompt), 6, choice)


# Refusing


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"path": "/v1/embeddings"}, "invalid_request", "does not serve /v1/embeddings; it serves /v1/"),
        ({"path": "/metrics"}, "invalid_request", "does not serve /metrics"),
        ({"model": "ada v2.1"}, "model_not_found", "do not serve 'ada v2.1'; they serve sim"),
        ({"deadline_ms": 1}, "deadline_exceeded", "passed in the queue"),
    ],
)
async def test_what_can_not_run_is_refused_and_never_run(
    broker: MemoryBroker, caller: Caller, asked: dict[str, object], code: str, says: str
) -> None:
    engine = WaxEngine(hold)
    async with serving(broker, engine):
        call = await caller.submit(**asked)  # type: ignore[arg-type]
        frame = await call.fails(code)
        assert says in orjson.loads(frame.payload)["error"]["message"]
        await caller.drained()
        (event,) = await caller.usage(1)
        assert (event.outcome, event.code, event.completion_tokens) == ("failed", code, 0)
    assert engine.seen == []


@pytest.mark.parametrize("body", [b"", b"not json", b"[1]", b"\x00", b"[" * 5000, b'{"prompt": 3}'])
async def test_a_bad_body_is_the_engines_400(broker: MemoryBroker, caller: Caller, body: bytes) -> None:
    async with simulated() as engine, serving(broker, engine):
        call = await caller.submit(body=body)
        assert (await call.end()).kind is FrameKind.END
        head = await call.reach(FrameKind.HEAD)
        assert head.extra["status"] == 400
        assert b"BadRequestError" in head.payload
        await caller.drained()
        (event,) = await caller.usage(1)
        assert (event.outcome, event.status) == ("failed", 400)


GOOD = {"Nats-Msg-Id": "acme:raw", "Reply-To": "out.acme.box.raw", "Path": PATH}


@pytest.mark.parametrize(
    ("change", "answered"),
    [
        ({"Nats-Msg-Id": None}, True),
        ({"Path": None}, True),
        ({"Path": "completions"}, True),
        ({"Path": "x" * 300_000}, True),
        ({"Deadline": "tomorrow"}, True),
        ({"Deadline": "-1"}, True),
        ({"Deadline": "9" * 5000}, True),
        ({"Reply-To": None}, False),
        ({"Reply-To": "nowhere"}, False),
        ({"Reply-To": "out.acme.*.raw"}, False),
        ({"Reply-To": "out.mallory.box.raw"}, False),
        (dict.fromkeys(GOOD), False),
    ],
)
async def test_malformed_messages_leave_the_queue_and_disturb_nobody(
    broker: MemoryBroker, caller: Caller, change: dict[str, str | None], answered: bool
) -> None:
    headers = {key: value for key, value in (GOOD | change).items() if value is not None}
    async with simulated() as engine, serving(broker, engine):
        running = await caller.submit(30)
        stream = await caller.publish(headers)
        await running.finishes()
        await caller.drained()
        (record,) = await caller.broker.read(subjects.DEAD, subjects.ALL_DEAD)
        letter = DeadLetter.model_validate_json(record.data)
        assert (letter.reason, letter.headers) == ("malformed_message", headers)
        said = [codec.decode(r.data) for r in await caller.broker.read(subjects.REPLIES, stream.subject)]
        assert [f.extra["code"] for f in said] == ["malformed_message"] * answered
        assert await caller.broker.counts(subjects.REPLIES, "out.mallory.>") == {}


# Cancelling


async def check_cancelled(caller: Caller, call: Call, engine: sim.SimEngine) -> None:
    await call.fails("cancelled")
    await caller.drained()
    (event,) = await caller.usage(1)
    assert (event.outcome, event.status) == ("cancelled", 499)
    await until(lambda: idle(engine))


async def test_cancel_of_a_running_request_frees_the_engine(broker: MemoryBroker, caller: Caller) -> None:
    before = metric("headrace_abort_seconds_count")
    async with simulated() as engine, serving(broker, engine):
        call = await caller.submit(2000)
        await call.reach(FrameKind.DATA)
        assert not idle(engine)
        await call.cancel()
        await check_cancelled(caller, call, engine)
        assert 0 < (await caller.usage(1))[0].completion_tokens < 2000
    assert metric("headrace_abort_seconds_count") - before == 1


async def test_cancel_in_the_middle_of_prefill(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated(STUCK) as engine, serving(broker, engine):
        call = await caller.submit(5)
        await until(lambda: engine.stats().running)
        await call.cancel()
        await check_cancelled(caller, call, engine)
        assert [f.kind for f in call.frames] == [FrameKind.ERROR]


async def test_a_full_worker_keeps_what_it_runs_when_that_is_delivered_again(
    broker: MemoryBroker, caller: Caller
) -> None:
    """Its `in_progress` came too late: handed to another worker, the live stream would be broken."""
    gate = Gate()
    engine = WaxEngine(gate, slots=1)
    async with serving(broker, engine) as worker:
        call = await caller.submit()
        await call.reach(FrameKind.HEAD)
        (job,) = worker.worker._jobs.values()
        again = SimpleNamespace(
            subject=job.delivery.subject,
            headers=job.delivery.headers,
            data=job.delivery.data,
            seq=job.delivery.seq,
            pending=0,
            attempt=2,
            receipt="again",
        )
        worker.worker._take(1, again)
        assert job.delivery is again
        job.delivery = SimpleNamespace(**vars(again), ack=_nothing, enqueued_ms=0.0)
        gate.open.set()
        assert (await call.end()).kind is FrameKind.END


async def test_a_request_that_comes_back_from_another_worker_is_no_longer_the_run_that_it_was(
    broker: MemoryBroker, caller: Caller
) -> None:
    """Out of touch, a worker missed that another one had it in between; its frames are nobody's now."""
    async with serving(broker, WaxEngine(Gate())) as worker:
        call = await caller.submit()
        await call.reach(FrameKind.HEAD)
        (job,) = worker.worker._jobs.values()
        await replies.Writer(broker, call.request.reply_to, 2).beat("w2")
        again = SimpleNamespace(**{name: getattr(job.delivery, name) for name in DELIVERED}, attempt=3)
        returned = asyncio.Event()

        async def nak() -> None:
            returned.set()

        again.nak = nak
        worker.worker._take(1, again)
        assert job.delivery is again
        await job.doubt()
        await until(lambda: not worker.worker._jobs)
        assert returned.is_set(), "nobody else has it: it would lie there until the ack wait"
        assert await caller.queued() == 1
        assert not any(frame.kind in TERMINAL for frame in await journal(broker, call))


DELIVERED = ("subject", "headers", "data", "seq", "pending", "receipt", "enqueued_ms", "ack", "nak")


async def journal(broker: MemoryBroker, call: Call) -> list[Frame]:
    return await replies.journal(broker, call.request.reply_to, 0.0)


async def _nothing() -> None:
    return None


async def test_cancel_of_a_request_that_waits_for_a_busy_worker(broker: MemoryBroker, caller: Caller) -> None:
    gate = Gate()
    engine = WaxEngine(gate, slots=1)
    async with serving(broker, engine):
        first = await caller.submit()
        await first.reach(FrameKind.HEAD)
        second = await caller.submit()
        await second.cancel()
        gate.open.set()
        await second.fails("cancelled")
        assert (await first.end()).kind is FrameKind.END
        await caller.drained()
        events = await caller.usage(2)
        assert {e.request_id: e.outcome for e in events} == {"r1": "finished", "r2": "cancelled"}
    assert len(engine.seen) == 1


@pytest.mark.parametrize("spelled", ["cancel.acme.a%2Eb%3Ac", "cancel.acme.a%2eb:c"])
async def test_cancel_before_the_request_arrives(broker: MemoryBroker, caller: Caller, spelled: str) -> None:
    engine = WaxEngine(hold)
    async with serving(broker, engine):
        await caller.broker.publish(spelled)
        call = await caller.submit(request_id="a.b:c")
        await call.fails("cancelled")
        await caller.drained()
    assert engine.seen == []


async def test_cancels_that_name_nobody_are_nothing(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated() as engine, serving(broker, engine):
        for subject in ("cancel.acme.%FF", "cancel.acme.other", "cancel.mallory.r1"):
            await caller.broker.publish(subject, b"\xff")
        await (await caller.submit()).finishes()


async def test_the_deadline_of_a_running_request(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated(STUCK) as engine, serving(broker, engine):
        call = await caller.submit(deadline_ms=soon(0.5))
        await until(lambda: engine.stats().running)
        await call.fails("deadline_exceeded")
        await until(lambda: idle(engine))
        assert [e.code for e in await caller.usage(1)] == ["deadline_exceeded"]


# Credit


async def test_never_more_at_once_than_the_engine_has_slots(broker: MemoryBroker, caller: Caller) -> None:
    gate = Gate()
    engine = WaxEngine(gate, slots=3)
    async with serving(broker, engine):
        calls = [await caller.submit() for _ in range(12)]
        for call in calls[:3]:
            await call.reach(FrameKind.HEAD)
        assert len(engine.seen) == 3
        gate.open.set()
        for call in calls:
            await call.end()
    assert engine.most == 3
    assert len(engine.seen) == len(set(engine.seen)) == 12


async def test_what_comes_beyond_the_credit_goes_to_another_worker(
    broker: MemoryBroker, caller: Caller
) -> None:
    """A pull stands on every class, so three requests may meet one slot."""
    gate = Gate()
    one, two = WaxEngine(gate, slots=1), WaxEngine(gate, slots=2)
    before = metric("headrace_returned_total", reason="no_credit")
    async with serving(broker, one, "w1"):
        calls = [await caller.submit(service_class=c) for c in ServiceClass]
        await until(lambda: len(one.seen) == 1)
        async with serving(broker.client(), two, "w2"):
            for call in calls:
                await call.reach(FrameKind.HEAD)
            assert (one.running, two.running) == (1, 2)
            gate.open.set()
            for call in calls:
                assert (await call.end()).kind is FrameKind.END
    assert metric("headrace_returned_total", reason="no_credit") > before
    assert len(set(one.seen + two.seen)) == len(one.seen + two.seen) == 3


async def test_the_urgent_go_first_and_the_others_still_go(broker: MemoryBroker, caller: Caller) -> None:
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        order.append(engine.seen[-1].decode())
        await start_response(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    engine = WaxEngine(app, slots=1)
    calls = [
        await caller.submit(service_class=c, body=c.encode())
        for c in reversed(ServiceClass)
        for _ in range(20)
    ]
    async with serving(broker, engine):
        for call in calls:
            await call.end()
    assert order[:30].count("interactive") > 15
    assert {"standard", "batch"} <= set(order[:45])
    assert len(order) == 60


async def test_a_second_message_under_a_running_id(broker: MemoryBroker, caller: Caller) -> None:
    gate = Gate()
    engine = WaxEngine(gate)
    async with serving(broker, engine), replies.Mailbox(caller.broker, "other") as mailbox:
        call = await caller.submit(request_id="same")
        await call.reach(FrameKind.HEAD)
        elsewhere = mailbox.open("acme", "same")
        for number, reply_to in enumerate((call.request.reply_to, elsewhere.subject)):
            headers = call.request.headers() | {"Nats-Msg-Id": f"acme:{number}", "Reply-To": reply_to}
            await (await caller.broker.enqueue(str(call.request.subject), b"{}", headers))
        (frame,) = await elsewhere.next(5)
        assert frame.extra["code"] == "duplicate_request"
        gate.open.set()
        assert (await call.end()).kind is FrameKind.END
        await caller.drained()
    assert len(engine.seen) == 1


# Redelivery


async def deliver_once(broker: MemoryBroker) -> Delivery:
    """The next request, in the hands of a worker that will die."""
    taken: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    puller = await broker.pull("sim", ServiceClass.STANDARD, taken.set_result, lambda: None)
    await puller.ask(1)
    return await taken


async def test_a_request_whose_worker_died_before_any_output_runs_again(
    broker: MemoryBroker, caller: Caller
) -> None:
    call = await caller.submit(8)
    delivery = await deliver_once(broker)
    await replies.Writer(broker, call.request.reply_to, 1).beat("dead")
    await delivery.nak()
    async with simulated() as engine, serving(broker, engine):
        await call.finishes()
        assert call.frames[-1].epoch == 2
        assert [e.epoch for e in await caller.usage(1)] == [2]


SSE = {"content-type": "text/event-stream"}


async def test_an_engine_that_continues_no_answer_tells_the_caller(
    broker: MemoryBroker, caller: Caller
) -> None:
    call = await caller.submit()
    delivery = await deliver_once(broker)
    writer = replies.Writer(broker, call.request.reply_to, 1)
    await writer.head(200, SSE, "dead", b"half", [(0, [1])])
    await delivery.nak()
    engine = WaxEngine(hold)
    async with serving(broker, engine):
        frame = await call.fails("worker_lost")
        assert (frame.epoch, len(call.frames)) == (2, 2)
        await writer.data(b"zombie", [(0, [2])])
        assert await call.stream.next(0.01) == []
        await caller.drained()
        await caller.usage(1)
    assert engine.seen == []


async def test_an_engine_that_fails_to_go_on_with_an_answer_tells_the_caller(
    broker: MemoryBroker, caller: Caller
) -> None:
    """And the request is done with: it would fail again, and is no killer."""
    call = await caller.submit()
    delivery = await deliver_once(broker)
    await replies.Writer(broker, call.request.reply_to, 1).head(200, SSE, "dead", b"half", [(0, [1])])
    await delivery.nak()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send, b"{}", 500)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    engine = WaxEngine(app)
    engine.continues = True
    async with serving(broker, engine):
        frame = await call.fails("worker_lost")
        assert (frame.epoch, len(engine.seen)) == (2, 1)
        await caller.drained()
        await caller.usage(1)


@asynccontextmanager
async def undisturbed(call: Call, **more: Any) -> AsyncIterator[bytes]:
    """What the caller would get of a worker that lives."""
    other = MemoryBroker(BrokerConfig())
    async with simulated() as engine, calling(other) as caller, serving(other, engine):
        same = await caller.submit(
            call.tokens, prompt=call.prompt, request_id=call.request.request_id, **more
        )
        await same.end()
        yield same.payload


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("died_after", [1, 2, 7, 10, 11])
async def test_a_request_whose_worker_died_in_mid_stream_goes_on_at_the_next_token(
    broker: MemoryBroker, caller: Caller, clock: Clock, path: str, died_after: int
) -> None:
    """The worker's connection is cut after so many frames, and what else it says reaches nobody."""
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "go on"}],
        "input": "go on",
        "max_output_tokens": 11,
    }
    first = broker.client()
    call = await caller.submit(11, path=path, stream_options={"include_usage": True}, **asked)
    published = 0

    async def publish(subject: str, *args: Any, **more: Any) -> None:
        nonlocal published
        if subject == call.request.reply_to:
            published += 1
            if published > died_after:
                raise errors.Unavailable("cut off")
        await MemoryBroker.publish(first, subject, *args, **more)

    first.publish = publish  # type: ignore[method-assign]
    async with simulated() as dying, serving(first, dying, "dying"):
        await until(lambda: published > died_after)
    clock.now += 60
    broker.expire()
    async with simulated() as engine, serving(broker.client(), engine, "w2"):
        end = await call.end()
        assert end.kind is FrameKind.END
        await caller.drained()
        (event,) = await caller.usage(1)
    assert len(call.ids) == 11
    assert end.epoch > 1
    assert end.extra["usage"]["completion_tokens"] == event.completion_tokens == 11
    assert [frame.kind for frame in call.frames].count(FrameKind.HEAD) == 1
    async with undisturbed(call, path=path, stream_options={"include_usage": True}, **asked) as whole:
        assert named_alike(call.payload) == named_alike(whole)


async def test_a_request_is_not_done_before_the_journal_has_its_end(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has no leader. Its caller has the answer, and the next request the slot."""
    monkeypatch.setattr(replies, "_LOOK_AGAIN", 0.005)
    worker = MemoryBroker(hub=broker.hub)
    lost: list[base.Message] = []

    async def publish(
        subject: str, data: bytes = b"", headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        if subjects.is_reply(subject):
            lost.append(base.Message(subject, data))
            broker.hub.route(base.Message(subject, data, headers))
        else:
            await MemoryBroker.publish(worker, subject, data, headers, reply)

    monkeypatch.setattr(worker, "publish", publish)
    gate = Gate()
    gate.open.set()
    async with serving(worker, WaxEngine(gate, slots=1), "w1"):
        for _ in range(2):
            call = await caller.submit()
            assert (await call.end()).kind is FrameKind.END
        assert await caller.queued() == 2
        for message in lost:
            await broker.publish(message.subject, message.data)
        await caller.drained()
        assert len(await caller.usage(2)) == 2


def named_alike(payload: bytes) -> bytes:
    """With one name and one date for all that has one; raises when there are several."""
    for key in (b"id", b"item_id", b"created", b"created_at"):
        found = set(re.findall(rb'"%s":("\w+"|"\w+-\w+"|\d+)' % key, payload))
        kinds = {re.sub(rb"[0-9a-f]{32}", b"", name) if b'"' in name else b"" for name in found}
        assert len(found) == len(kinds), f"{key!r} changed in mid-stream: {found}"
    payload = re.sub(rb"[0-9a-f]{32}", b"NAME", payload)
    return re.sub(rb'("created(?:_at)?"):\d+', rb"\1:0", payload)


async def test_a_zombie_neither_ends_a_request_nor_acks_it(
    broker: MemoryBroker, caller: Caller, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests were given to another while it was cut off; then it comes back."""
    monkeypatch.setattr(Touch, "lost", True)
    gate = Gate()
    zombie, frozen = WaxEngine(gate), broker.client()
    async with serving(frozen, zombie, "zombie") as stopped:
        call = await caller.submit(6)
        await call.reach(FrameKind.HEAD)
        frozen.disconnect()
        clock.now += 60
        broker.expire()
        async with serving(broker.client(), WaxEngine(hold), "w2"):
            frame = await call.fails("worker_lost")
            await caller.drained()
        gate.open.set()
        frozen.reconnect()
        await until(lambda: not stopped.worker._jobs)
    assert frame.epoch == 2
    records = await caller.broker.read(subjects.REPLIES, call.request.reply_to)
    frames = [codec.decode(record.data) for record in records]
    assert [frame.epoch for frame in frames if frame.kind in TERMINAL] == [2]
    assert [event.worker for event in await caller.usage(1)] == ["w2"]
    assert (frames[-1].epoch, frames[-1].extra["left"]) == (1, "was taken for lost"), "it is no death"


async def test_a_worker_hears_that_another_took_its_request_over(
    broker: MemoryBroker, caller: Caller
) -> None:
    engine = WaxEngine(hold)
    async with serving(broker, engine) as first:
        call = await caller.submit(6)
        await call.reach(FrameKind.HEAD)
        await caller.broker.publish(subjects.taken(call.request.key), b"1")
        await caller.broker.publish(subjects.taken(call.request.key), b"no number")
        await asyncio.sleep(0)
        assert len(first.worker._jobs) == 1
        await caller.broker.publish(subjects.taken(call.request.key), b"2")
        await until(lambda: not first.worker._jobs)
    assert await caller.queued() == 1, "acking it is the other's business"
    assert not call.stream.finished


async def test_what_comes_after_it_was_taken_over_is_not_begun(
    broker: MemoryBroker, caller: Caller, clock: Clock
) -> None:
    """It lay in the socket of a worker that stood still, whose requests others have by now."""
    async with simulated() as engine, serving(broker, engine) as first:
        clock.now += 60  # as that of who heard it is, when it comes to it
        await caller.broker.publish(subjects.taken("acme.r1"), b"2")
        clock.now -= 60
        call = await caller.submit(6)
        assert call.request.key == "acme.r1"
        queue = broker.hub.queue("sim", "standard")
        await until(lambda: queue.unacked)
        assert not first.worker._jobs
        (seq,) = queue.unacked
        broker.hub.nak(queue, seq)  # the second attempt is this one's to run
        assert (await call.finishes()).epoch == 2


def test_takes_are_remembered_for_a_while() -> None:
    takes = screening.Takes(limit=2)
    takes.note("a", 2, 0.5)
    assert takes.later("a", 1, 0.0)
    assert not takes.later("a", 2, 0.0)
    assert not takes.later("a", 1, 1.0), "it is another one of that id"
    takes.note("b", 2, 1.0)
    takes.note("a", 3, 1.0)
    takes.note("c", 2, 1.0)
    assert [takes.later(key, 1, 1.0) for key in "abc"] == [True, False, True]


async def test_a_worker_that_dies_before_it_acks_what_it_buried_leaves_one_letter(
    broker: MemoryBroker, caller: Caller
) -> None:
    call = await caller.submit(8)
    for attempt in range(1, 4):
        delivery = await deliver_once(broker)
        await replies.Writer(broker, call.request.reply_to, attempt).beat(f"w{attempt}")
        await delivery.nak()
    delivery = await deliver_once(broker)
    await screening.bury(broker, delivery, ())
    await delivery.nak()
    async with serving(broker, WaxEngine(hold), max_deaths=3):
        await call.fails("poisoned")
        await caller.drained()
    assert await broker.counts(subjects.DEAD, subjects.ALL_DEAD) == {subjects.dead("poisoned"): 1}


async def test_a_worker_that_dies_before_it_acks_what_is_no_request_leaves_one_letter(
    broker: MemoryBroker, caller: Caller
) -> None:
    await caller.publish({"Path": PATH})
    delivery = await deliver_once(broker)
    await letters.dead_letter(
        broker,
        delivery.subject,
        delivery.headers,
        delivery.data,
        errors.MalformedMessage("no id"),
        seq=delivery.seq,
    )
    await delivery.nak()
    async with serving(broker, WaxEngine(hold)):
        await caller.drained()
    assert await broker.counts(subjects.DEAD, subjects.ALL_DEAD) == {subjects.dead("malformed_message"): 1}


async def test_a_request_that_its_workers_die_of_is_buried(broker: MemoryBroker, caller: Caller) -> None:
    call = await caller.submit(8)
    for attempt in range(1, 4):
        delivery = await deliver_once(broker)
        await replies.Writer(broker, call.request.reply_to, attempt).beat(f"w{attempt}")
        await delivery.nak()
    engine = WaxEngine(hold)
    async with serving(broker, engine, max_deaths=3):
        frame = await call.fails("poisoned")
        await caller.drained()
    assert (frame.epoch, engine.seen) == (4, [])
    (record,) = await caller.broker.read(subjects.DEAD, subjects.dead("poisoned"))
    letter = DeadLetter.model_validate_json(record.data)
    assert [(a.epoch, a.worker, a.what) for a in letter.history] == [(n, f"w{n}", "died") for n in (1, 2, 3)]
    assert base64.b64decode(letter.body) == call.request.body


@pytest.mark.parametrize("at_once", [False, True])
async def test_what_ran_beside_a_request_that_kills_is_not_buried_with_it(
    broker: MemoryBroker, caller: Caller, at_once: bool
) -> None:
    """`at_once`: the first time it kills before it has left a trace, unlike those beside it."""
    calls = [
        await caller.submit(3, prompt=f"{'poison' if n == 3 else 'fine'} {n}", stream=False) for n in range(6)
    ]
    for delivery in [await deliver_once(broker) for _ in calls] if at_once else ():
        call = next(each for each in calls if each.stored.seq == delivery.seq)
        if "poison" not in str(call.prompt):
            await replies.Writer(broker, call.request.reply_to, 1, delivery.seq).beat("w0")
        await delivery.nak()
    engines: list[WaxEngine] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        engine = engines[-1]
        if b"poison" in engine.seen[-1]:
            await asyncio.wait({engine.died}, timeout=0.03)  # others begin beside it
            engine.died.set_exception(errors.EngineFailed("crash"))
        else:
            await asyncio.wait({engine.died}, timeout=0.05)
        if engine.died.done():
            await gone(receive)
        else:
            await start_response(send, b"{}")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    while await caller.queued():
        assert len(engines) < 20
        engines.append(WaxEngine(app))
        with contextlib.suppress(errors.EngineFailed):
            async with serving(broker.client(), engines[-1], f"w{len(engines)}"):
                await asyncio.wait({engines[-1].died}, timeout=0.5)
    ends = [(await call.end()).extra.get("code", "end") for call in calls]
    assert ends == ["end"] * 3 + ["poisoned"] + ["end"] * 2


async def suspects(broker: MemoryBroker, caller: Caller, *deadlines: int) -> list[Call]:
    """Requests under which two workers died."""
    calls = [await caller.submit(deadline_ms=deadline) for deadline in deadlines]
    for call in calls:
        for attempt in (1, 2):
            await replies.Writer(broker, call.request.reply_to, attempt, call.stored.seq).beat(f"w{attempt}")
    for _ in (1, 2):
        for delivery in [await deliver_once(broker) for _ in calls]:
            await delivery.nak()
    return calls


async def test_a_suspect_that_waits_for_its_turn_hears_its_cancel(
    broker: MemoryBroker, caller: Caller
) -> None:
    gate = Gate()
    engine = WaxEngine(gate)
    first, second = await suspects(broker, caller, 0, 0)
    async with serving(broker, engine, max_deaths=3):
        await until(lambda: engine.seen)
        await second.cancel()
        await second.fails("cancelled")
        assert engine.running == 1
        gate.open.set()
        assert (await first.end()).kind is FrameKind.END
        await caller.drained()
    assert len(engine.seen) == 1


async def test_a_suspect_that_waits_for_its_turn_keeps_its_deadline(
    broker: MemoryBroker, caller: Caller
) -> None:
    gate = Gate()
    engine = WaxEngine(gate)
    first, second = await suspects(broker, caller, 0, soon(1.0))
    async with serving(broker, engine, max_deaths=3):
        await second.fails("deadline_exceeded")
        assert engine.running == 1
        gate.open.set()
        assert (await first.end()).kind is FrameKind.END
        await caller.drained()
    assert len(engine.seen) == 1


async def test_a_redelivery_waits_for_the_end_of_a_run_that_was_taken_over(
    broker: MemoryBroker, caller: Caller
) -> None:
    """Another had it and gave it back; the old run still stops."""
    stopping, stopped = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send)
        if len(engine.seen) == 1:
            await gone(receive)
            stopping.set()
            await stopped.wait()
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    engine = WaxEngine(app)
    engine.continues = True
    async with serving(broker, engine):
        call = await caller.submit(3, stream=False)
        await until(lambda: engine.seen)
        await caller.broker.publish(subjects.taken(call.request.key), b"2")
        await stopping.wait()
        (queue,) = [q for q in broker.hub.queues.values() if call.stored.seq in q.attempts]
        broker.hub.nak(queue, call.stored.seq)
        await asyncio.sleep(0)
        stopped.set()
        assert (await call.end()).kind is FrameKind.END
    assert len(engine.seen) == 2


async def test_hand_overs_are_no_deaths(broker: MemoryBroker, caller: Caller) -> None:
    call = await caller.submit(8)
    for attempt in range(1, 4):
        delivery = await deliver_once(broker)
        writer = replies.Writer(broker, call.request.reply_to, attempt)
        await writer.beat(f"w{attempt}")
        await writer.beat(f"w{attempt}", left="drained")
        await delivery.nak()
    async with simulated() as engine, serving(broker, engine, max_deaths=1):
        await call.finishes()


async def test_a_journal_that_can_not_be_read_is_no_death(
    broker: MemoryBroker, caller: Caller, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker had said that it has the request; as it leaves it to the broker, it says that too."""
    call = await caller.submit(8)
    delivery = await deliver_once(broker)
    await replies.Writer(broker, call.request.reply_to, 1).beat("w1", left="drained")
    await delivery.nak()
    blind = broker.client()

    read = blind.read

    async def going(*asked: Any) -> list[Record]:
        found = await read(*asked)
        if any(codec.decode(record.data).epoch == 2 for record in found):
            raise errors.Unavailable("no leader")
        return found

    monkeypatch.setattr(blind, "read", lambda *asked, **_: going(*asked))
    async with serving(blind, WaxEngine(hold), "blind", max_deaths=3) as stopped:
        await until(lambda: stopped.worker._held.number and not stopped.worker._jobs)
    frames = await replies.journal(caller.broker, call.request.reply_to, 0)
    assert [frame.extra.get("left") for frame in frames if frame.epoch == 2] == [None, "no leader"]
    clock.now += 60
    broker.expire()
    async with simulated() as engine, serving(broker, engine, max_deaths=1):
        await call.finishes()


async def test_the_end_of_an_attempt_that_was_given_up_is_no_end(
    broker: MemoryBroker, caller: Caller
) -> None:
    """Its readers have more of the next attempt by then, whose worker died: the request runs on."""
    call = await caller.submit(8, stream=False)
    delivery = await deliver_once(broker)
    zombie, second = (replies.Writer(broker, call.request.reply_to, epoch) for epoch in (1, 2))
    await zombie.beat("w1")
    await second.beat("w2")
    await second.head(200, {"content-type": "application/json"}, "w2", b"{", [(0, [1])])
    await zombie.end({"completion_tokens": 8})
    await delivery.nak()
    await (await deliver_once(broker)).nak()
    async with simulated() as engine, serving(broker, engine):
        end = await call.finishes()
        await caller.drained()
    assert end.epoch == 3
    assert [event.epoch for event in await caller.usage(1)] == [3]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_request_that_was_answered_is_counted_once_and_acked(
    broker: MemoryBroker, caller: Caller, cancelled: bool, counted: bool
) -> None:
    """Whether its worker had come to its usage event or not."""
    call = await caller.submit()
    delivery = await deliver_once(broker)
    writer = replies.Writer(broker, call.request.reply_to, 1)
    await writer.head(400, {}, "dead", b"no", [])
    await writer.end({"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 2})
    if counted:
        told = usage.event(call.request, None, "dead", broker.now_ms(), status=400, prompt_tokens=9)
        await usage.publish(broker, told, delivery.seq)
    await delivery.nak()
    engine = WaxEngine(hold)
    async with serving(broker, engine):
        if cancelled:
            await call.cancel()
        await caller.drained()
    assert len(await caller.broker.read(subjects.REPLIES, call.request.reply_to)) == 2
    (event,) = await caller.usage(1)
    assert (event.outcome, event.status, event.worker, event.prompt_tokens) == ("failed", 400, "dead", 9)
    assert (event.cached_tokens, event.completion_tokens) == ((0, 0) if counted else (4, 2))
    assert engine.seen == []


@pytest.mark.parametrize("said", [{}, {"usage": []}, {"usage": {"prompt_tokens": "many"}}])
async def test_an_end_that_tells_no_usage_is_acked_all_the_same(
    broker: MemoryBroker, caller: Caller, said: dict[str, object]
) -> None:
    call = await caller.submit()
    delivery = await deliver_once(broker)
    await caller.broker.publish(call.request.reply_to, codec.encode(Frame(1, 0, FrameKind.END, extra=said)))
    await delivery.nak()
    async with serving(broker, WaxEngine(hold)):
        await caller.drained()


async def test_what_an_engine_refuses_is_run_by_another_worker(broker: MemoryBroker, caller: Caller) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        sick.slots = 0
        raise Refused("its server is away")

    gate = Gate()
    gate.open.set()
    sick, well = WaxEngine(refuse), WaxEngine(gate)
    async with serving(broker, sick, "sick"):
        call = await caller.submit()
        await until(lambda: metric("headrace_credit_requests") == 0 and sick.seen)
        assert await caller.queued() == 1
        async with serving(broker.client(), well, "well"):
            assert (await call.end()).kind is FrameKind.END
            await caller.drained()
            assert [e.worker for e in await caller.usage(1)] == ["well"]
    assert len(sick.seen) == 1


async def test_a_worker_tells_where_its_metrics_are(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with serving(broker, WaxEngine(hold)):
            (record,) = [r for r in caplog.records if r.message == "serving"]
            async with httpx.AsyncClient() as http:
                answer = await http.get(vars(record)["metrics_url"])
    assert vars(record)["worker"] == "w1"
    assert "headrace_queue_wait_seconds" in answer.text


async def test_garbage_where_the_frames_should_be_ends_a_redelivered_request(
    broker: MemoryBroker, caller: Caller
) -> None:
    call = await caller.submit()
    delivery = await deliver_once(broker)
    await caller.broker.publish(call.request.reply_to, b"garbage")
    await delivery.nak()
    async with serving(broker, WaxEngine(hold)):
        await caller.drained()
        assert [e.code for e in await caller.usage(1)] == ["malformed_message"]


async def test_our_own_request_handed_to_us_again_runs_once(
    broker: MemoryBroker, caller: Caller, clock: Clock
) -> None:
    gate = Gate()
    engine = WaxEngine(gate)
    async with serving(broker, engine):
        call = await caller.submit()
        await call.reach(FrameKind.HEAD)
        clock.now += 60
        broker.expire()
        await until(lambda: any(q.attempts.get(call.stored.seq) == 2 for q in broker.hub.queues.values()))
        gate.open.set()
        assert (await call.end()).kind is FrameKind.END
        await caller.drained()
        assert len(await caller.usage(1)) == 1
    assert len(engine.seen) == 1


# Engines that fail


async def test_an_engine_that_fails_request_after_request_gets_no_more(
    broker: MemoryBroker, caller: Caller
) -> None:
    """A failure takes no time, so nobody asks for work as often as who fails it."""

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("out of order")

    bad = WaxEngine(failing, slots=1)
    before = metric("headrace_quarantines_total")
    async with serving(broker, bad, max_failures=3) as worker:
        for _ in range(3):
            await (await caller.submit()).fails("engine_failed")
        await until(lambda: metric("headrace_quarantines_total") == before + 1)
        waiting = [await caller.submit() for _ in range(20)]
        async with simulated() as healthy, serving(broker.client(), healthy, "w2"):
            for call in waiting:
                await call.finishes()
        await caller.drained()
        assert worker.worker._credit() == 0
    assert len(bad.seen) == 3


async def test_it_is_tried_again_and_trusted_again(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "FIRST", 0.05)
    broken = True

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send, status=503 if broken else 200)
        if not broken:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    engine = WaxEngine(app)
    async with serving(broker, engine, max_failures=1) as worker:
        await (await caller.submit()).fails("engine_failed")
        await until(lambda: worker.worker._credit() == 0)
        broken = False
        engine.most = 0
        calls = [await caller.submit() for _ in range(20)]
        for call in calls:
            assert (await call.end()).kind is FrameKind.END
        assert worker.worker._credit() > 1


# The end of an engine


@asynccontextmanager
async def dies_serving(broker: MemoryBroker, engine: Engine, reason: str) -> AsyncIterator[Serving]:
    """A worker whose engine is going to die."""
    with pytest.raises(errors.EngineFailed, match=reason):
        async with serving(broker, engine) as worker:
            yield worker


async def test_a_dead_engine_hands_on_what_it_had_not_begun(broker: MemoryBroker, caller: Caller) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        if b"begun" in dying.seen[-1]:
            await start_response(send)
        await gone(receive)

    dying = WaxEngine(silent)
    async with simulated() as healthy, dies_serving(broker, dying, "out of memory") as worker:
        begun = await caller.submit(prompt="begun")
        waiting = await caller.submit(6)
        await begun.reach(FrameKind.HEAD)
        await until(lambda: dying.running == 2)
        async with serving(broker.client(), healthy, "w2"):
            dying.died.set_exception(errors.EngineFailed("out of memory"))
            await begun.fails("worker_lost")
            await waiting.finishes()
            assert (await waiting.reach(FrameKind.HEAD)).extra["worker"] == "w2"
            await asyncio.wait({worker.task}, timeout=5)
            assert worker.task.done()


async def test_the_death_of_the_simulated_engine(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise IntegrityError("the accounts do not balance")

    slow = FAST.model_copy(update={"beta0": 100.0})
    async with (
        simulated(slow) as dying,
        simulated() as healthy,
        dies_serving(broker, dying, "the simulated engine has failed: IntegrityError"),
    ):
        call = await caller.submit(6)
        await until(lambda: dying.stats().running)
        assert isinstance(dying._pacer, StepPacer)
        monkeypatch.setattr(dying._pacer._model, "finish", broken)
        async with serving(broker.client(), healthy, "w2"):
            await call.finishes()


# Draining


async def test_drain_finishes_what_runs_and_takes_nothing_new(broker: MemoryBroker, caller: Caller) -> None:
    gate = Gate()
    engine = WaxEngine(gate)
    beats: list[Heartbeat] = []
    await caller.broker.subscribe(
        subjects.ALL_HEARTBEATS, lambda m: beats.append(Heartbeat.model_validate_json(m.data))
    )
    async with serving(broker, engine) as worker:
        running = await caller.submit()
        await running.reach(FrameKind.HEAD)
        worker.stop.set()
        await until(lambda: beats and beats[-1].state == "draining")
        late = await caller.submit(6)
        assert not worker.task.done()
        gate.open.set()
        assert (await running.end()).kind is FrameKind.END
        await worker.task
    assert len(engine.seen) == 1
    await until(lambda: beats[-1].state == "gone")
    assert {b.credit.requests for b in beats if b.state != "serving"} == {0}
    async with simulated() as other, serving(broker.client(), other, "w2"):
        await late.finishes()


async def test_drain_hands_back_what_lasts_too_long(broker: MemoryBroker, caller: Caller) -> None:
    async with simulated(STUCK) as engine:
        async with serving(broker, engine, drain_timeout=0.05) as worker:
            call = await caller.submit(6)
            await until(lambda: engine.stats().running)
            worker.stop.set()
            await worker.task
        assert idle(engine)
    assert await caller.usage(0) == []
    async with simulated() as other, serving(broker.client(), other, "w2"):
        await call.finishes()
        # Past 2: what stood of the drained worker's pulls met it first, and gave it back.
        assert call.frames[-1].epoch > 1


async def test_drain_hands_over_what_had_begun_with_its_progress(
    broker: MemoryBroker, caller: Caller
) -> None:
    slow = FAST.model_copy(update={"beta0": 30.0})
    async with simulated(slow) as engine, serving(broker, engine, drain_timeout=0.05) as worker:
        call = await caller.submit(60)
        await call.reach(FrameKind.DATA)
        worker.stop.set()
        await worker.task
        assert idle(engine)
    async with simulated() as other, serving(broker.client(), other, "w2"):
        await call.finishes()
        (event,) = await caller.usage(1)
    assert (event.worker, event.completion_tokens) == ("w2", 60)


async def test_drain_tells_the_caller_of_what_can_not_be_continued(
    broker: MemoryBroker, caller: Caller
) -> None:
    async with serving(broker, WaxEngine(hold), drain_timeout=0.05) as worker:
        call = await caller.submit()
        await call.reach(FrameKind.HEAD)
        worker.stop.set()
        await call.fails("worker_lost")
        await caller.drained()


# The broker away


async def test_the_worker_outlasts_the_broker(broker: MemoryBroker, caller: Caller) -> None:
    gate = Gate()
    engine = WaxEngine(gate)
    async with serving(broker, engine):
        call = await caller.submit()
        await call.reach(FrameKind.HEAD)
        broker.disconnect()
        gate.open.set()
        await until(lambda: engine.running == 0)
        late = await caller.submit()
        broker.reconnect()
        assert (await call.end()).kind is FrameKind.END
        assert (await late.end()).kind is FrameKind.END
        await caller.drained()


async def test_a_name_is_made_up_where_none_is_given(broker: MemoryBroker, caller: Caller) -> None:
    async with serving(broker, WaxEngine(hold), name="") as worker:
        assert worker.worker.name.startswith("wax-")
