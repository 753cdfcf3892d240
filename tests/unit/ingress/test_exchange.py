"""One request through the fake broker: what its caller is told, what is left in the queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from broker import base, bodies, codec, errors, messages, replies, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Frame, ModelCard, ServiceClass
from ingress import admit, exchange, resume
from ingress.app import Ingress
from ingress.catalogue import Catalogue
from ingress.config import IngressConfig
from ingress.relay import Relay
from tests.asgi import Call, request

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "stream": True}
LARGE = BODY | {"prompt": "x" * 1_200_000}
SSE = {"content-type": "text/event-stream"}


class Rig:
    def __init__(self, broker: MemoryBroker, app: Ingress) -> None:
        self.broker = broker
        self.app: Any = app
        self.deliveries: asyncio.Queue[base.Delivery] = asyncio.Queue()

    async def take(self) -> tuple[base.Delivery, replies.Writer]:
        """The next queued request, as a worker gets it, and the frames that answer it."""
        puller = await self.broker.client().pull(
            "m", ServiceClass.STANDARD, self.deliveries.put_nowait, lambda: None
        )
        await puller.ask(1)
        delivery = await self.deliveries.get()
        assert delivery.headers is not None
        return delivery, replies.Writer(
            self.broker.client(), delivery.headers[subjects.REPLY_TO], delivery.attempt
        )


@contextlib.asynccontextmanager
async def rig(config: BrokerConfig | None = None, **settings: Any) -> AsyncIterator[Rig]:
    broker = MemoryBroker(config)
    card = ModelCard(id="m", base="m", paths=(CHAT,))
    await broker.put(subjects.KV_MODELS, "m", card.model_dump_json().encode())
    async with replies.Mailbox(broker, "box") as mailbox, Catalogue(broker) as catalogue:
        app = Ingress(IngressConfig(**settings), broker, mailbox, catalogue)
        yield Rig(broker, app)
        await app.drain()
        assert not len(mailbox)


async def stored(broker: MemoryBroker) -> int:
    """Objects in the store of large bodies."""
    stream, described = subjects.objects(subjects.PAYLOADS), f"$O.{subjects.PAYLOADS}.M.*"
    return sum((await broker.counts(stream, described)).values())


async def outcome(call: Call) -> tuple[int, bytes]:
    async with asyncio.timeout(10):
        return call.status, await call.body()


async def test_frames_become_the_answer() -> None:
    async with rig() as at, request(at.app, CHAT, BODY) as call:
        _, writer = await at.take()
        await writer.head(200, SSE, "w", b"data: 1\n\n", [(0, [1])])
        await writer.data(b"data: 2\n\n", [(0, [2])])
        await writer.end({})
        assert (await outcome(call))[1] == b"data: 1\nid: 1-0-0\n\ndata: 2\nid: 1-1-0\n\n"
        assert call.status == 200
        assert call.headers["x-headrace-worker"] == "w"


async def test_what_is_no_frame_ends_the_answer_and_the_run() -> None:
    async with rig() as at, request(at.app, CHAT, BODY) as call:
        cancels: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_CANCELS, cancels.put_nowait)
        delivery, writer = await at.take()
        await writer.head(200, SSE, "w", b"data: 1\n\n", [])
        assert await anext(call.chunks()) == b"data: 1\nid: 1-0-0\n\n"
        assert delivery.headers is not None
        await at.broker.publish(delivery.headers[subjects.REPLY_TO], b"garbage")
        _, body = await outcome(call)
        assert orjson.loads(body.removeprefix(b"data: "))["error"]["code"] == "frames_lost"
        await cancels.get()
        await writer.error(errors.Cancelled("stopped"))


async def test_a_fault_of_our_own_is_a_500_in_the_shape_of_all_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig() as at:
        monkeypatch.setattr(at.broker, "enqueue", None)
        async with request(at.app, CHAT, BODY) as call:
            _, body = await outcome(call)
            assert call.status == 500
            assert orjson.loads(body)["error"]["code"] == "internal_error"
            assert "NoneType" not in body.decode()


async def test_without_a_broker_nothing_is_queued() -> None:
    async with rig() as at:
        at.broker.disconnect()
        async with request(at.app, CHAT, BODY) as call:
            await outcome(call)
            assert (call.status, call.headers["retry-after"]) == (503, "1")
        at.broker.reconnect()
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}


async def test_a_full_queue_refuses_and_nothing_is_cancelled() -> None:
    async with rig(BrokerConfig(max_queued=1)) as at:
        cancels: list[base.Message] = []
        await at.broker.subscribe(subjects.ALL_CANCELS, cancels.append)
        await (await at.broker.enqueue("req.m.standard.t.m", b"", {subjects.MSG_ID: "t:first"}))
        async with request(at.app, CHAT, BODY) as call:
            await outcome(call)
            assert (call.status, call.headers["retry-after"]) == (429, "1")
        await at.app.drain()
        assert not cancels


class Silence(replies.Stream):
    """A mailbox into which nothing comes; each wait moves the clock by as long as it was for."""

    def __init__(self, clock: SimpleNamespace) -> None:
        super().__init__(MemoryBroker(), "out.t.box.r", lambda _: None)
        self._clock = clock

    async def next(self, timeout: float, *, ask_journal: bool = True) -> list[Frame]:
        self._clock.at += timeout
        await asyncio.sleep(0)  # what came meanwhile has come
        return []


async def test_the_first_comment_comes_after_one_keepalive_however_long_the_broker_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(exchange, "time", SimpleNamespace(monotonic=lambda: clock.at))
    broker, comments = MemoryBroker(clock=lambda: clock.at), []

    async def send(message: Any) -> None:
        if message.get("body"):
            comments.append((clock.at - 1000.0, message["body"]))

    async def receive() -> Any:
        return await asyncio.Event().wait()

    asked = messages.Request(
        subjects.RequestSubject("m", "standard", "t", "m"), "r", "out.t.box.r", CHAT, b"", 1012_000
    )
    config = IngressConfig(keepalive=5.0, publish_timeout=2.0)
    relay = Relay(send, CHAT, "r", streaming=True)
    told = exchange.Exchange(config, broker, asked, Silence(clock), relay, lambda model: False)
    await told.publish()
    fault = await told.follow(receive)
    assert isinstance(fault, errors.DeadlineExceeded)
    comment = b": queued, no worker serves m now\n\n"
    assert comments[:2] == [(5.0, comment), (10.0, comment)]


async def test_a_broker_that_hangs_costs_one_publish_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal is not asked: that would be another wait for the same silence."""
    async with rig(publish_timeout=0.05, keepalive=0.01) as at:
        never: asyncio.Future[base.Stored] = asyncio.get_running_loop().create_future()
        asked: list[str] = []

        async def enqueue(*_: Any) -> asyncio.Future[base.Stored]:
            return never

        async def last(stream: str, subject: str) -> None:
            asked.append(subject)

        monkeypatch.setattr(at.broker, "enqueue", enqueue)
        monkeypatch.setattr(at.broker, "last", last)
        async with request(at.app, CHAT, {"model": "m"}) as call:
            await outcome(call)
        assert (call.status, asked) == (503, [])
        never.cancel()


async def test_a_client_that_leaves_the_queue_leaves_nothing_in_it() -> None:
    async with rig() as at:
        usage: asyncio.Queue[base.Message] = asyncio.Queue()
        queued: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_REQUESTS, queued.put_nowait)
        await at.broker.subscribe(subjects.ALL_USAGE, usage.put_nowait)
        async with request(at.app, CHAT, BODY) as call:
            await queued.get()
            call.disconnect()
            await call.ended()
        event = orjson.loads((await usage.get()).data)
        assert (event["outcome"], event["worker"], event["code"]) == ("cancelled", "", "cancelled")
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}
        assert call.status == 0


async def test_a_client_that_leaves_a_run_has_it_stopped() -> None:
    async with rig() as at, request(at.app, CHAT, BODY) as call:
        cancels: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_CANCELS, cancels.put_nowait)
        _, writer = await at.take()
        await writer.head(200, SSE, "w", b"data: 1\n\n", [])
        await anext(call.chunks())
        call.disconnect()
        assert (await cancels.get()).subject.startswith("cancel.anonymous.req_")
        await writer.error(errors.Cancelled("stopped"))
        await call.ended()


async def test_a_request_whose_acceptance_was_never_told_is_taken_out_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The acknowledgement is lost with the connection; the caller is told 503, and nothing runs."""
    async with rig() as at:
        enqueue = at.broker.enqueue
        lost: list[Any] = []

        async def losing(*message: Any) -> asyncio.Future[base.Stored]:
            ack = await enqueue(*message)
            if lost:
                return ack
            await ack
            lost.append(message)
            broken: asyncio.Future[base.Stored] = asyncio.get_running_loop().create_future()
            broken.set_exception(errors.Unconfirmed("the connection broke"))
            return broken

        monkeypatch.setattr(at.broker, "enqueue", losing)
        async with request(at.app, CHAT, {"model": "m"}) as call:
            await outcome(call)
        assert call.status == 503
        await at.app.drain()
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}


async def test_a_cancel_that_nobody_confirms_is_repeated_and_the_message_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its worker died in the prefill: the next must not run it for nobody."""
    monkeypatch.setattr(exchange, "_REPEAT", 0.01)
    monkeypatch.setattr(exchange, "_WORKER_FIRST", 0.01)
    monkeypatch.setattr(exchange, "_CONFIRM_TIMEOUT", 0.1)
    async with rig() as at, request(at.app, CHAT, BODY) as call:
        cancels: asyncio.Queue[base.Message] = asyncio.Queue()
        usage: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_CANCELS, cancels.put_nowait)
        await at.broker.subscribe(subjects.ALL_USAGE, usage.put_nowait)
        _, writer = await at.take()
        await writer.head(200, SSE, "w", b"data: 1\n\n", [])
        await anext(call.chunks())
        call.disconnect()
        await call.ended()
        await at.app.drain()
        assert cancels.qsize() > 1
        assert orjson.loads((await usage.get()).data)["outcome"] == "cancelled"
        assert usage.empty()
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}


async def test_a_message_deleted_under_a_worker_that_then_dies_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker's head comes when the message has gone: who deleted it is the only one to end it."""
    monkeypatch.setattr(exchange, "_REPEAT", 0.01)
    monkeypatch.setattr(exchange, "_WORKER_FIRST", 0.01)
    monkeypatch.setattr(exchange, "_CONFIRM_TIMEOUT", 0.1)
    async with rig() as at, request(at.app, CHAT, LARGE) as call:
        usage: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_USAGE, usage.put_nowait)
        delivery, writer = await at.take()
        delete = at.broker.delete

        async def crossing(stream: str, seq: int) -> bool:
            deleted = await delete(stream, seq)
            if deleted and stream == subjects.REQUESTS:
                await writer.head(200, SSE, "w", b"data: 1\n\n", [])
            return deleted

        monkeypatch.setattr(at.broker, "delete", crossing)
        call.disconnect()
        await call.ended()
        await at.app.drain()
        assert orjson.loads((await asyncio.wait_for(usage.get(), 10)).data)["outcome"] == "cancelled"
        assert usage.empty()
        assert await stored(at.broker) == 0
        frame = await replies.last_frame(at.broker, (delivery.headers or {})[subjects.REPLY_TO], 0)
        assert frame is not None
        assert frame.extra["code"] == "cancelled"


async def test_a_late_cancel_leaves_the_clients_second_try_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first was never accepted; before that is known, its client repeats it at another ingress."""
    async with rig() as at:
        enqueue = at.broker.enqueue
        cancels: list[base.Message] = []
        await at.broker.subscribe(subjects.ALL_CANCELS, cancels.append)

        async def losing(subject: str, body: bytes, headers: dict[str, str]) -> asyncio.Future[base.Stored]:
            monkeypatch.setattr(at.broker, "enqueue", enqueue)
            elsewhere = subjects.reply("anonymous", "another", "mine")
            await (await enqueue(subject, body, headers | {subjects.REPLY_TO: elsewhere}))
            broken: asyncio.Future[base.Stored] = asyncio.get_running_loop().create_future()
            broken.set_exception(errors.Unconfirmed("the connection broke"))
            return broken

        monkeypatch.setattr(at.broker, "enqueue", losing)
        async with request(at.app, CHAT, {"model": "m"}, headers={"X-Request-Id": "mine"}) as call:
            await outcome(call)
        assert call.status == 503
        await at.app.drain()
        assert sum((await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).values()) == 1
        assert not cancels


async def test_a_request_that_waits_is_noted_for_who_asks_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_NOTE_AFTER", 0.01)
    async with rig() as at, request(at.app, CHAT, BODY, headers={"X-Request-Id": "mine"}) as call:
        noted: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_REPLIES, noted.put_nowait)
        note = codec.decode((await noted.get()).data)
        (record,) = await at.broker.read(subjects.REQUESTS, subjects.ALL_REQUESTS)
        assert (note.epoch, note.kind, note.extra["queued"]) == (0, "beat", record.seq)
        async with request(at.app, "/v1/requests/mine/stream", b"", method="GET") as reading:
            _, writer = await at.take()
            await writer.head(200, SSE, "w", b"data: 1\n\n", [(0, [1])])
            await writer.end({})
            assert (await outcome(call))[1] == (await outcome(reading))[1] == b"data: 1\nid: 1-0-0\n\n"


async def test_who_reads_a_request_by_its_id_is_told_that_its_client_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "_NOTE_AFTER", 0.01)
    async with rig() as at, request(at.app, CHAT, BODY, headers={"X-Request-Id": "mine"}) as call:
        noted: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_REPLIES, noted.put_nowait)
        await noted.get()
        async with request(at.app, "/v1/requests/mine/stream", b"", method="GET") as reading:
            call.disconnect()
            _, body = await outcome(reading)
            assert reading.status == 499
            assert orjson.loads(body)["error"]["code"] == "cancelled"


async def test_a_reader_is_told_that_nobody_will_end_what_a_worker_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resume, "_SETTLE", 0.01)
    monkeypatch.setattr(replies, "NO_END_AFTER", 0.02)
    async with rig(keepalive=0.01) as at:
        reply_to = subjects.reply("anonymous", "dead", "mine")
        subject = subjects.RequestSubject("m", "standard", "anonymous", "m")
        queued = messages.Request(subject, "mine", reply_to, CHAT, b"{}")
        stored = await (await at.broker.enqueue(str(subject), b"{}", queued.headers()))
        writer = replies.Writer(at.broker, reply_to, 1, stored.seq)
        await writer.head(200, SSE, "w", b"data: 1\n\n", [(0, [1])])
        async with request(at.app, "/v1/requests/mine/stream", b"", method="GET") as reading:
            await anext(reading.chunks())
            await at.broker.delete(subjects.REQUESTS, stored.seq)
            assert b"frames_lost" in (await outcome(reading))[1]


@pytest.mark.parametrize(("left", "code"), [(True, "frames_lost"), (False, "deadline_exceeded")])
async def test_a_reader_does_not_wait_for_what_will_not_come(
    monkeypatch: pytest.MonkeyPatch, left: bool, code: str
) -> None:
    """It has left the queue without a frame, or nobody looks after its deadline."""
    monkeypatch.setattr(resume, "_SETTLE", 0.01)
    async with rig(keepalive=0.01) as at:
        reply_to = subjects.reply("anonymous", "dead", "mine")
        subject = subjects.RequestSubject("m", "standard", "anonymous", "m")
        queued = messages.Request(subject, "mine", reply_to, CHAT, b"{}", deadline_ms=1)
        stored = await (await at.broker.enqueue(str(subject), b"{}", queued.headers()))
        await replies.note_queued(at.broker, reply_to, stored.seq)
        if left:
            await at.broker.delete(subjects.REQUESTS, stored.seq)
        async with request(at.app, "/v1/requests/mine/stream", b"", method="GET") as reading:
            _, body = await outcome(reading)
        assert orjson.loads(body)["error"]["code"] == code


async def test_a_reply_that_nobody_will_end_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker acked it, and what that said last is nowhere."""
    monkeypatch.setattr(replies, "NO_END_AFTER", 0.02)
    async with rig(keepalive=0.01) as at, request(at.app, CHAT, BODY) as call:
        delivery, writer = await at.take()
        await writer.head(200, SSE, "w", b"data: 1\n\n", [(0, [1])])
        await anext(call.chunks())
        await delivery.ack()
        assert b"frames_lost" in (await outcome(call))[1]


# Bodies too large for a message


async def test_a_large_body_is_stored_before_it_is_queued() -> None:
    async with rig() as at, request(at.app, CHAT, LARGE) as call:
        delivery, writer = await at.take()
        assert delivery.data == b""
        asked = messages.parse_request(delivery.subject, delivery.headers, delivery.data)
        assert orjson.loads((await bodies.load(at.broker, asked)).body) == LARGE
        await writer.head(200, SSE, "w", b"data: 1\n\n", [])
        await writer.end({})
        await outcome(call)
        assert call.status == 200
        await at.app.drain()
        assert await stored(at.broker) == 1  # its worker takes it away, after the ack


async def test_a_full_queue_keeps_no_body() -> None:
    async with rig(BrokerConfig(max_queued=1)) as at:
        await (await at.broker.enqueue("req.m.standard.t.m", b"", {subjects.MSG_ID: "t:first"}))
        async with request(at.app, CHAT, LARGE) as call:
            assert b"overloaded" in (await outcome(call))[1]
        await at.app.drain()
        assert await stored(at.broker) == 0


async def test_a_full_store_refuses_and_its_place_is_free_again() -> None:
    async with rig(BrokerConfig(payload_bytes=2**20), max_large=1, body_timeout=2.0) as at:
        for _ in range(2):
            async with request(at.app, CHAT, LARGE) as call:
                _, body = await outcome(call)
                assert (call.status, call.headers["retry-after"]) == (429, "5")
                assert b"bodies of more than 1,043,456 bytes is full" in body
        stream = subjects.objects(subjects.PAYLOADS)
        assert await at.broker.counts(stream, subjects.all_objects(subjects.PAYLOADS)) == {}
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}


@pytest.mark.parametrize("still_open", [True, False])
async def test_a_repeat_leaves_the_first_ones_body_alone(
    monkeypatch: pytest.MonkeyPatch, still_open: bool
) -> None:
    monkeypatch.setattr(admit, "request_id", lambda headers: "same")
    async with rig() as at, request(at.app, CHAT, LARGE) as call:
        delivery, writer = await at.take()
        if not still_open:
            await writer.head(200, SSE, "w", b"data: 1\n\n", [])
            await writer.end({})
            await outcome(call)
        async with request(at.app, CHAT, LARGE) as again:
            assert b"duplicate_request" in (await outcome(again))[1]
        while at.app._afterwards:
            await asyncio.wait(at.app._afterwards)
        assert await stored(at.broker) == 1
        asked = messages.parse_request(delivery.subject, delivery.headers, delivery.data)
        assert orjson.loads((await bodies.load(at.broker, asked)).body) == LARGE
        if still_open:
            await writer.end({})


async def test_a_large_request_that_leaves_the_queue_takes_its_body_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "_WORKER_FIRST", 0.01)
    async with rig() as at:
        queued: asyncio.Queue[base.Message] = asyncio.Queue()
        await at.broker.subscribe(subjects.ALL_REQUESTS, queued.put_nowait)
        async with request(at.app, CHAT, LARGE) as call:
            await queued.get()
            call.disconnect()
            await call.ended()
        await at.app.drain()
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}
        assert await stored(at.broker) == 0


async def test_a_large_request_whose_acceptance_was_never_told_keeps_its_body_until_it_is_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who knows whether it is queued: only what was deleted needs its body no more."""
    monkeypatch.setattr(exchange, "_WORKER_FIRST", 0.01)
    async with rig() as at:
        enqueue = at.broker.enqueue
        lost: list[int] = []

        async def losing(subject: str, *rest: Any) -> asyncio.Future[base.Stored]:
            ack = await enqueue(subject, *rest)
            if lost or not subject.startswith("req."):
                return ack
            await ack
            lost.append(await stored(at.broker))
            broken: asyncio.Future[base.Stored] = asyncio.get_running_loop().create_future()
            broken.set_exception(errors.Unconfirmed("the connection broke"))
            return broken

        monkeypatch.setattr(at.broker, "enqueue", losing)
        async with request(at.app, CHAT, LARGE) as call:
            await outcome(call)
        assert call.status == 503
        await at.app.drain()
        assert lost == [1]
        assert await at.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}
        assert await stored(at.broker) == 0
