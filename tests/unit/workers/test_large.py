"""A worker and requests whose bodies lie in the object store: when they are fetched, and when they go."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import orjson
import pytest

from broker import bodies, errors, replies, subjects
from broker.base import Message
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import FrameKind, Heartbeat, Request, ServiceClass
from tests.waiting import until
from tests.workbench import FAST, Caller, Clock, WaxEngine, calling, gone, serving, start_response
from workers.engines import sim
from workers.engines.base import Receive, Scope, Send

LARGE = "x" * 20_000

ROOMY = FAST.model_copy(update={"context_tokens": 8192, "kv_blocks": 1024})


@pytest.fixture
def clock(anyio_backend: object) -> Clock:
    return Clock()


@pytest.fixture
def broker(clock: Clock) -> MemoryBroker:
    """Whose messages hold 4 KiB of a body."""
    return MemoryBroker(BrokerConfig(), clock, max_payload=8192)


@pytest.fixture
async def caller(broker: MemoryBroker) -> AsyncIterator[Caller]:
    async with calling(broker.client()) as made:
        yield made


async def hold(scope: Scope, receive: Receive, send: Send) -> None:
    await gone(receive)


async def test_it_runs_with_its_body_which_goes_after_the_ack(broker: MemoryBroker, caller: Caller) -> None:
    engine = await sim.start(ROOMY)
    call = await caller.submit(prompt=LARGE)
    assert (call.request.body, call.request.body_object[:5]) == (b"", "acme.")
    async with serving(broker, engine):
        end = await call.finishes()
        assert end.extra["usage"]["prompt_tokens"] == 5000
        await caller.cleared()
    await engine.close()


async def test_the_body_stays_while_it_runs_and_when_it_is_handed_back(
    broker: MemoryBroker, caller: Caller
) -> None:
    engine = WaxEngine(hold)
    async with serving(broker, engine, drain_timeout=0.0) as first:
        call = await caller.submit(prompt=LARGE)
        await until(lambda: engine.running)
        assert orjson.loads(engine.seen[0])["prompt"] == LARGE
        assert await caller.kept() == 4
        first.stop.set()
        await first.task
    assert (await caller.queued(), await caller.kept()) == (1, 4)
    second = await sim.start(ROOMY)
    async with serving(broker, second, "w2"):
        await call.finishes()
        await caller.cleared()
    await second.close()


async def test_its_length_counts_against_the_credit(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before it is known: a worker must not take in many of them at once."""
    free: list[int] = []
    load, known = bodies.load, asyncio.Event()

    async def slow(*given: object) -> Request:
        await known.wait()
        return await load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(bodies, "load", slow)

    def heard(message: Message) -> None:
        free.append(Heartbeat.model_validate_json(message.data).credit.prefill_tokens_free)

    await broker.subscribe(subjects.ALL_HEARTBEATS, heard)
    engine = WaxEngine(hold)
    async with serving(broker, engine, prefill_steps=2.0):
        await until(lambda: 8192 in free)
        call = await caller.submit(prompt=LARGE)
        await until(lambda: free[-1] == 8192 - bodies.room(broker) // 4)
        known.set()
        await until(lambda: engine.running)
        free.clear()
        await until(lambda: free)
        assert free[-1] == 8192 - len(engine.seen[0]) // 4
        await call.cancel()
        await call.fails("cancelled")
        free.clear()
        await until(lambda: 8192 in free)  # all of it is given back
        await caller.cleared()


@pytest.mark.parametrize("how", ["it was never stored", "it is not whole", "it is too large"])
async def test_a_body_that_can_not_be_had_is_told_and_never_run(
    broker: MemoryBroker, caller: Caller, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = await caller.submit(prompt=LARGE)
    stream = subjects.objects(subjects.PAYLOADS)
    (chunks,) = await broker.counts(stream, f"$O.{subjects.PAYLOADS}.C.*")
    if how == "it was never stored":
        await bodies.discard(broker, call.request)
    elif how == "it is not whole":
        await broker.purge(stream, chunks)
    else:
        monkeypatch.setattr(bodies, "MAX_BODY", 9999)
    engine = WaxEngine(hold)
    async with serving(broker, engine):
        await call.fails("request_too_large" if how == "it is too large" else "body_lost")
        await caller.cleared()
    assert engine.seen == []
    assert [event.outcome for event in await caller.usage(1)] == ["failed"]


async def test_a_store_that_does_not_answer_leaves_the_request_to_the_broker(
    broker: MemoryBroker, caller: Caller, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, tries = bodies.load, []

    async def failing(*given: object) -> Request:
        tries.append(given)
        if len(tries) == 1:
            raise errors.Unavailable("not now")
        return await load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(bodies, "load", failing)
    engine = await sim.start(ROOMY)
    async with serving(broker, engine):
        call = await caller.submit(prompt=LARGE)
        await until(lambda: tries)
        assert (await caller.queued(), await caller.kept()) == (1, 4)
        clock.now += broker.ack_wait + 1
        broker.expire()
        await call.finishes()
        assert call.frames[-1].epoch == 2
        await caller.cleared()
    await engine.close()


async def test_the_body_of_a_request_that_was_answered_before_goes_too(
    broker: MemoryBroker, caller: Caller
) -> None:
    """Its worker died between the last frame and the ack."""
    call = await caller.submit(prompt=LARGE)
    taken: list[int] = []
    puller = await broker.pull("sim", ServiceClass.STANDARD, lambda d: taken.append(d.seq), lambda: None)
    await puller.ask(1)
    await until(lambda: taken)
    writer = replies.Writer(broker, call.request.reply_to, 1)
    await writer.head(200, {}, "dead", b"yes", [])
    await writer.end({"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1})
    await puller.close()
    broker.hub.nak(broker.hub.queue("sim", "standard"), taken[0])
    engine = WaxEngine(hold)
    async with serving(broker, engine):
        await caller.cleared()
    assert engine.seen == []


@pytest.mark.parametrize("same_body", [True, False])
async def test_a_second_message_under_the_id_of_one_that_runs_takes_its_own_body_along(
    broker: MemoryBroker, caller: Caller, clock: Clock, same_body: bool
) -> None:
    engine = WaxEngine(hold)
    call = await caller.submit(prompt=LARGE)
    running = call.request
    async with serving(broker, engine):
        await until(lambda: engine.running)
        clock.now += broker.hub.config.dedup_window + 1
        body = orjson.dumps({"model": "sim", "prompt": LARGE})
        other = await bodies.stow(broker, dataclasses.replace(running, body=body, body_object=""))
        again = running if same_body else other
        await (await broker.enqueue(str(again.subject), again.body, again.headers()))

        async def one_left() -> bool:
            return await caller.queued() == 1

        await until(one_left)
        assert (await bodies.load(broker, running)).body
        if not same_body:
            await until(lambda: missing(broker, other))
        await call.cancel()
        await call.fails("cancelled")


async def missing(broker: MemoryBroker, request: Request) -> bool:
    try:
        await bodies.load(broker, request)
    except errors.BodyLost:
        return True
    return False


async def test_a_malformed_message_keeps_its_body_for_who_reads_the_dead_letter(
    broker: MemoryBroker, caller: Caller
) -> None:
    stored = await bodies.stow(
        broker, Request(subjects.RequestSubject("sim", "standard", "acme", "sim"), "raw", "", "", b"x" * 9999)
    )
    headers = {"Reply-To": "out.acme.box.raw", "Body-Object": stored.body_object}
    async with serving(broker, WaxEngine(start_response)):  # type: ignore[arg-type]
        stream = await caller.publish(headers, b"")
        (frame,) = await stream.next(10)
        assert (frame.kind, frame.extra["code"]) == (FrameKind.ERROR, "malformed_message")
        await caller.drained()
    (letter,) = await broker.read(subjects.DEAD, subjects.ALL_DEAD)
    assert orjson.loads(letter.data)["headers"]["Body-Object"] == stored.body_object
    assert (await bodies.load(broker, stored)).body == b"x" * 9999
