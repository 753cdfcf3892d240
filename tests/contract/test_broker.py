"""What `broker.base` promises, held against the real broker and the fake.

Nothing here sleeps: the real server's time passes while a test awaits what it expects, the fake's is
moved by hand (`Fleet.pass_time`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson
import pytest

from broker import client, errors, objects, subjects
from broker.base import Broker, Delivery, Message, Parcel, Puller
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import ServiceClass
from broker.server import NatsServer
from tests.waiting import LIMIT, until

T = TypeVar("T")

SUBJECT = "req.llama.standard.acme.llama"
REPLY = "out.acme.box.r1"


class Box(Generic[T]):
    """A handler that keeps what it is given."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[T] = asyncio.Queue()

    def __call__(self, item: T) -> None:
        self._items.put_nowait(item)

    async def next(self, limit: float = LIMIT) -> T:
        return await asyncio.wait_for(self._items.get(), limit)

    async def take(self, n: int) -> list[T]:
        return [await self.next() for _ in range(n)]

    def __len__(self) -> int:
        return self._items.qsize()


class Fleet:
    """A broker and its clients, whose settings the first `connect` decides."""

    async def connect(self, **settings: Any) -> Broker:
        raise NotImplementedError

    def pass_time(self, seconds: float) -> None:
        """Let time go by where it is ours to move."""

    async def stop(self) -> None:
        """The broker goes away from every client."""
        raise NotImplementedError

    async def start(self) -> None:
        """It comes back with what it had on disk."""
        raise NotImplementedError


class MemoryFleet(Fleet):
    def __init__(self) -> None:
        self.now = time.time()
        self.clients: list[MemoryBroker] = []

    async def connect(self, **settings: Any) -> Broker:
        if self.clients:
            self.clients.append(self.clients[0].client())
        else:
            self.clients.append(MemoryBroker(BrokerConfig(**settings), clock=lambda: self.now))
        return self.clients[-1]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.clients[0].expire()

    async def stop(self) -> None:
        for broker in self.clients:
            broker.disconnect()

    async def start(self) -> None:
        for broker in self.clients:
            broker.reconnect()


class NatsFleet(Fleet):
    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self.config: BrokerConfig | None = None
        self.clients: list[Broker] = []

    async def connect(self, **settings: Any) -> Broker:
        if self.config is None:
            self.config = BrokerConfig(**{"url": self.server.url, "timeout": 10.0, **settings})
        broker = await client.connect(self.config, f"client-{len(self.clients)}")
        self.clients.append(broker)
        return broker

    async def stop(self) -> None:
        await self.server.stop()

    async def start(self) -> None:
        await self.server.start()


@pytest.fixture(params=["memory", "nats"])
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        made: MemoryFleet | NatsFleet = MemoryFleet()
        if request.param == "nats":
            made = NatsFleet(await stack.enter_async_context(NatsServer(tmp_path / "nats")))
        try:
            yield made
        finally:
            for broker in made.clients:
                await broker.close()


@pytest.fixture
async def broker(fleet: Fleet) -> Broker:
    return await fleet.connect()


def nothing() -> None:
    """A `lapsed` that isn't looked at."""


async def pull(
    broker: Broker, base: str = "llama", service_class: str = "standard"
) -> tuple[Puller, Box[Delivery]]:
    box: Box[Delivery] = Box()
    return await broker.pull(base, ServiceClass(service_class), box, nothing), box


async def enqueue(broker: Broker, *bodies: bytes, subject: str = SUBJECT) -> list[int]:
    """Their sequences."""
    return [(await (await broker.enqueue(subject, body))).seq for body in bodies]


async def queued(broker: Broker) -> int:
    return sum((await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).values())


# Core messages


async def test_a_message_arrives_as_it_was_sent(broker: Broker) -> None:
    box: Box[Message] = Box()
    await broker.subscribe("fleet.w1", box)
    await broker.publish("fleet.w1", b"\x00 \xff\r\n", {"traceparent": "00-ab", "Path": "/v1"}, "out.x")
    got = await box.next()
    assert (got.subject, got.data, got.reply) == ("fleet.w1", b"\x00 \xff\r\n", "out.x")
    assert got.headers == {"traceparent": "00-ab", "Path": "/v1"}


async def test_wildcards(broker: Broker) -> None:
    one: Box[Message] = Box()
    many: Box[Message] = Box()
    await broker.subscribe("cancel.*.r1", one)
    await broker.subscribe("cancel.>", many)
    for subject in (
        "cancel",
        "cancel.r1",
        "cancel.acme.r1",
        "cancel.acme.r1.x",
        "cancel.other.r1",
        "cancel.end",
    ):
        await broker.publish(subject)
    assert [(await many.next()).subject for _ in range(5)] == [
        "cancel.r1",
        "cancel.acme.r1",
        "cancel.acme.r1.x",
        "cancel.other.r1",
        "cancel.end",
    ]
    assert [message.subject for message in await one.take(2)] == ["cancel.acme.r1", "cancel.other.r1"]
    assert len(one) == 0


async def test_messages_keep_their_order_between_clients(fleet: Fleet) -> None:
    writer, reader = await fleet.connect(), await fleet.connect()
    box: Box[Message] = Box()
    await reader.subscribe("out.*.box.*", box)
    await until(lambda: _heard(writer, box, "out.acme.box.first"))
    for number in range(500):
        await writer.publish(REPLY, b"%d" % number)
    rest = [got.data for got in await _after(box, "out.acme.box.first", 500)]
    assert rest == [b"%d" % number for number in range(500)]


async def _heard(writer: Broker, box: Box[Message], subject: str) -> bool:
    """Publish until the other side's subscription is known to the server."""
    await writer.publish(subject)
    await asyncio.sleep(0)
    return len(box) > 0


async def _after(box: Box[Message], first: str, n: int) -> list[Message]:
    found: list[Message] = []
    while len(found) < n:
        message = await box.next()
        if message.subject != first:
            found.append(message)
    return found


async def test_a_closed_subscription_hears_no_more(broker: Broker) -> None:
    closed: Box[Message] = Box()
    open_: Box[Message] = Box()
    subscription = await broker.subscribe("fleet.*", closed)
    await broker.subscribe("fleet.*", open_)
    await subscription.close()
    await subscription.close()
    await broker.publish("fleet.w1")
    await open_.next()
    assert len(closed) == 0


async def test_what_a_handler_raises_is_logged_and_the_next_message_comes(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    box: Box[Message] = Box()

    def handler(message: Message) -> None:
        box(message)
        raise ZeroDivisionError("a handler's own fault")

    await broker.subscribe("fleet.*", handler)
    await broker.publish("fleet.w1")
    await broker.publish("fleet.w2")
    assert [message.subject for message in await box.take(2)] == ["fleet.w1", "fleet.w2"]
    await until(lambda: "a handler's own fault" in caplog.text)


async def test_max_payload_counts_headers(broker: Broker) -> None:
    headers = {"Path": "/v1/completions"}
    box: Box[Message] = Box()
    await broker.subscribe("fleet.*", box)
    await broker.publish("fleet.full", b"x" * broker.max_payload)
    for subject in ("fleet.over", SUBJECT):
        with pytest.raises(errors.TooLarge):
            await broker.publish(subject, b"x" * broker.max_payload, headers)
        with pytest.raises(errors.TooLarge):
            await broker.enqueue(subject, b"x" * broker.max_payload, headers)
        with pytest.raises(errors.TooLarge):
            await broker.publish(subject, b"x" * (broker.max_payload + 1))
    await broker.publish("fleet.after")
    assert [got.subject for got in await box.take(2)] == ["fleet.full", "fleet.after"]
    assert broker.connected


# The durable queue


async def test_enqueue_is_acknowledged_with_the_sequence(broker: Broker) -> None:
    first, second = await enqueue(broker, b"a", b"b")
    assert second == first + 1
    assert [record.data for record in await broker.read(subjects.REQUESTS, SUBJECT)] == [b"a", b"b"]


async def test_a_repeated_id_is_stored_once(fleet: Fleet) -> None:
    one, other = await fleet.connect(), await fleet.connect()
    head = {subjects.MSG_ID: "acme:r1"}
    first = await (await one.enqueue(SUBJECT, b"a", head))
    again = await (await other.enqueue(SUBJECT, b"a", head))
    different = await (await other.enqueue(SUBJECT, b"a", {subjects.MSG_ID: "else:r1"}))
    assert (first.duplicate, again.duplicate, different.duplicate) == (False, True, False)
    assert again.seq == first.seq
    assert different.seq == first.seq + 1
    assert await queued(one) == 2


async def test_a_repeated_id_is_still_known_when_the_first_is_done(broker: Broker) -> None:
    head = {subjects.MSG_ID: "acme:r1"}
    first = await (await broker.enqueue(SUBJECT, b"a", head))
    assert await broker.delete(subjects.REQUESTS, first.seq)
    assert (await (await broker.enqueue(SUBJECT, b"a", head))).duplicate


async def test_a_dead_letter_is_kept_once(broker: Broker) -> None:
    head = {subjects.MSG_ID: subjects.letter_id(7)}
    await (await broker.enqueue(subjects.dead("poisoned"), b"a", head))
    assert (await (await broker.enqueue(subjects.dead("worker_lost"), b"b", head))).duplicate
    assert [record.data for record in await broker.read(subjects.DEAD, subjects.ALL_DEAD)] == [b"a"]


async def test_an_id_is_free_again_after_the_dedup_window(fleet: Fleet) -> None:
    broker = await fleet.connect(dedup_window=0.2)
    head = {subjects.MSG_ID: "acme:r1"}
    first = await (await broker.enqueue(SUBJECT, b"a", head))
    later = first
    async with asyncio.timeout(LIMIT):
        while later.seq == first.seq:
            fleet.pass_time(0.1)
            later = await (await broker.enqueue(SUBJECT, b"a", head))
    assert not later.duplicate


async def test_the_journal_acknowledges_a_frame_of_which_its_writer_wants_to_know(broker: Broker) -> None:
    await (await broker.enqueue(REPLY, b"the last"))
    assert [record.data for record in await broker.read(subjects.REPLIES, REPLY)] == [b"the last"]


async def test_enqueue_where_no_stream_listens_is_unavailable(broker: Broker) -> None:
    with pytest.raises(errors.Unavailable):
        await (await broker.enqueue("nowhere.at.all", b""))


async def test_a_full_queue_refuses_and_an_ack_makes_room(fleet: Fleet) -> None:
    broker = await fleet.connect(max_queued=2)
    await enqueue(broker, b"a", b"b")
    with pytest.raises(errors.Overloaded):
        await (await broker.enqueue(SUBJECT, b"c"))
    puller, box = await pull(broker)
    await puller.ask(1)
    await (await box.next()).ack()
    await until(lambda: _is_queued(broker, 1))
    await enqueue(broker, b"c")
    assert [record.data for record in await broker.read(subjects.REQUESTS, SUBJECT)] == [b"b", b"c"]


async def _is_queued(broker: Broker, n: int) -> bool:
    return await queued(broker) == n


async def test_a_queue_full_by_bytes_refuses(fleet: Fleet) -> None:
    broker = await fleet.connect(max_queued_bytes=2**20)
    await enqueue(broker, b"x" * 600_000)
    with pytest.raises(errors.Overloaded):
        await (await broker.enqueue(SUBJECT, b"x" * 600_000))


async def test_a_delivery_tells_what_it_is(broker: Broker) -> None:
    before = time.time() * 1000
    head = {subjects.MSG_ID: "acme:r1", subjects.PATH: "/v1/completions"}
    stored = await (await broker.enqueue(SUBJECT, b"body", head))
    await enqueue(broker, b"behind", b"behind", b"behind")
    puller, box = await pull(broker)
    await puller.ask(2)
    first, second = await box.take(2)
    assert (first.subject, first.data, first.seq) == (SUBJECT, b"body", stored.seq)
    assert dict(first.headers or {}) == head
    assert (first.attempt, first.pending, second.pending) == (1, 3, 2)
    # The fake's clock stands still; the real one's is the same machine's.
    assert before - 60_000 < first.enqueued_ms < time.time() * 1000 + 1000
    assert not second.headers


async def test_its_clock_is_the_brokers_whatever_this_machines_shows(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time
    first = await fleet.connect()
    monkeypatch.setattr(time, "time", lambda: right() + 3600)
    broker = await fleet.connect()
    assert abs(broker.now_ms() - first.now_ms()) < 60_000
    await enqueue(broker, b"a")
    puller, box = await pull(broker)
    await puller.ask(1)
    (delivery,) = await box.take(1)
    assert abs(broker.now_ms() - delivery.enqueued_ms) < 60_000
    record = await broker.record(subjects.REQUESTS, delivery.seq)
    assert record is not None
    assert abs(broker.now_ms() - record.stored_ms) < 60_000


async def test_what_was_queued_before_the_first_pull_is_delivered_in_order(broker: Broker) -> None:
    await enqueue(broker, b"a", b"b", b"c")
    puller, box = await pull(broker)
    await puller.ask(3)
    assert [got.data for got in await box.take(3)] == [b"a", b"b", b"c"]


async def test_a_pull_stands_until_messages_come(broker: Broker) -> None:
    puller, box = await pull(broker)
    assert puller.outstanding == 0
    await puller.ask(2)
    await puller.ask(1)
    assert puller.outstanding == 3
    await enqueue(broker, b"a", b"b")
    assert [got.data for got in await box.take(2)] == [b"a", b"b"]
    assert puller.outstanding == 1
    await enqueue(broker, b"c")
    assert (await box.next()).data == b"c"
    assert puller.outstanding == 0


async def test_nobody_gets_more_than_asked(fleet: Fleet) -> None:
    modest, greedy = await fleet.connect(), await fleet.connect()
    small, few = await pull(modest)
    large, rest = await pull(greedy)
    await enqueue(modest, *(b"%d" % number for number in range(7)))
    await small.ask(2)
    assert [got.data for got in await few.take(2)] == [b"0", b"1"]
    # Had the first been given more than two, these five would not come.
    await large.ask(5)
    assert [got.data for got in await rest.take(5)] == [b"%d" % number for number in range(2, 7)]
    assert len(few) == 0


async def test_two_workers_share_a_queue_and_nothing_comes_twice(fleet: Fleet) -> None:
    total = 200
    asking, *workers = [await fleet.connect() for _ in range(3)]
    taken: list[tuple[int, bytes]] = []
    done = asyncio.Event()

    async def work(name: int, worker: Broker) -> None:
        puller, box = await pull(worker)
        await puller.ask(4)
        while True:
            delivery = await box.next()
            taken.append((name, delivery.data))
            await delivery.ack()
            if len(taken) == total:
                done.set()
            await puller.ask(1)

    tasks = [asyncio.create_task(work(name, worker)) for name, worker in enumerate(workers)]
    try:
        await enqueue(asking, *(b"%d" % number for number in range(total)))
        await asyncio.wait_for(done.wait(), LIMIT)
        await until(lambda: _is_queued(asking, 0))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(int(body) for _, body in taken) == list(range(total))
    assert {name for name, _ in taken} == {0, 1}


async def test_an_acked_message_leaves_the_queue(broker: Broker) -> None:
    await enqueue(broker, b"a")
    puller, box = await pull(broker)
    await puller.ask(1)
    delivery = await box.next()
    assert await queued(broker) == 1
    await delivery.ack()
    await until(lambda: _is_queued(broker, 0))


async def test_a_nak_comes_again_to_whoever_asks(fleet: Fleet) -> None:
    holder, other = await fleet.connect(ack_wait=3600), await fleet.connect()
    puller, box = await pull(holder)
    await puller.ask(1)
    await enqueue(holder, b"a", b"b")
    first = await box.next()
    taking, taken = await pull(other)
    await first.nak()
    await until(lambda: _came_again(taking, taken, b"a"))


async def _came_again(puller: Puller, box: Box[Delivery], data: bytes) -> bool:
    """A pull right after the nak may reach the server first: then it gets the message behind."""
    await puller.ask(1)
    delivery = await box.next()
    if delivery.data == data:
        assert delivery.attempt == 2
        return True
    await delivery.nak()
    return False


async def test_a_nak_reaches_a_standing_pull(fleet: Fleet) -> None:
    holder, other = await fleet.connect(ack_wait=3600), await fleet.connect()
    puller, box = await pull(holder)
    await puller.ask(1)
    seqs = await enqueue(holder, b"a")
    first = await box.next()
    taking, taken = await pull(other)
    await taking.ask(1)
    await first.nak()
    again = await taken.next()
    assert (again.data, [again.seq], again.attempt) == (b"a", seqs, 2)


async def test_what_is_handed_back_for_a_while_lets_others_pass(fleet: Fleet) -> None:
    broker = await fleet.connect(ack_wait=3600)
    puller, box = await pull(broker)
    await puller.ask(1)
    await enqueue(broker, b"a", b"b")
    first = await box.next()
    await broker.hand_back(first, 0.2)
    await puller.ask(2)
    behind, again = await box.next(), await box.next()
    assert (behind.data, again.data, again.attempt) == (b"b", b"a", 2)


async def test_a_third_party_hands_a_message_on(fleet: Fleet) -> None:
    holder, other, third = [await fleet.connect(ack_wait=3600) for _ in range(3)]
    puller, box = await pull(holder)
    await puller.ask(1)
    seqs = await enqueue(holder, b"a")
    receipt = (await box.next()).receipt
    await holder.close()
    taking, taken = await pull(other)
    await taking.ask(1)
    await third.hand_on(receipt)
    again = await taken.next()
    assert ([again.seq], again.attempt) == (seqs, 2)


async def test_a_receipt_names_its_message_whoever_has_it_now(fleet: Fleet) -> None:
    """Why a receipt may be used only while nobody runs the message: an earlier delivery's does the same
    as the newest one's."""
    broker = await fleet.connect(ack_wait=3600)
    puller, box = await pull(broker)
    await puller.ask(3)
    await enqueue(broker, b"a")
    first = await box.next()
    await first.nak()
    second = await box.next()
    await broker.hand_on(first.receipt)
    third = await box.next()
    assert (second.attempt, third.attempt) == (2, 3)
    await first.ack()
    await until(lambda: _is_queued(broker, 0))


async def test_a_receipt_of_a_message_that_was_acked_changes_nothing(fleet: Fleet) -> None:
    broker = await fleet.connect(ack_wait=3600)
    puller, box = await pull(broker)
    await puller.ask(2)
    await enqueue(broker, b"a")
    held = await box.next()
    await held.ack()
    await until(lambda: _is_queued(broker, 0))
    await broker.hand_on(held.receipt)
    await enqueue(broker, b"b")
    got = await box.next()
    assert (got.data, got.attempt) == (b"b", 1)


async def _relayed(taker: Broker, heard: Box[Message]) -> Delivery:
    delivery = await taker.relayed(await heard.next())
    assert delivery is not None
    return delivery


@pytest.mark.parametrize("along", [True, False])
async def test_a_delivery_is_passed_on_and_acked_by_who_has_it(fleet: Fleet, along: bool) -> None:
    giver, taker = [await fleet.connect(ack_wait=3600) for _ in range(2)]
    heard: Box[Message] = Box()
    await taker.subscribe("run.w1", heard)
    await taker.sync()
    puller, box = await pull(giver)
    await puller.ask(1)
    seqs = await enqueue(giver, b"a")
    given = await box.next()
    parcel = Parcel(given.subject, given.headers or {}, given.data if along else None, given.receipt)
    await giver.relay("run.w1", parcel, "a note")
    message = await heard.next()
    assert (message.headers or {})[subjects.SENT] == "a note"
    taken = await taker.relayed(message)
    assert taken is not None
    assert (taken.subject, taken.data, taken.headers) == (given.subject, b"a", given.headers or {})
    assert ([taken.seq], taken.attempt, taken.receipt) == (seqs, 1, given.receipt)
    assert taken.enqueued_ms == pytest.approx(given.enqueued_ms, abs=1)
    await taken.ack()
    await until(lambda: _is_queued(giver, 0))


async def test_a_body_without_room_beside_its_headers_is_read_from_the_queue(fleet: Fleet) -> None:
    giver, taker = [await fleet.connect() for _ in range(2)]
    heard: Box[Message] = Box()
    await taker.subscribe("run.w1", heard)
    await taker.sync()
    puller, box = await pull(giver)
    await puller.ask(1)
    large = b"x" * (giver.max_payload - 200)
    await enqueue(giver, large)
    given = await box.next()
    await giver.relay("run.w1", Parcel(given.subject, given.headers or {}, large, given.receipt), "n" * 300)
    assert (await _relayed(taker, heard)).data == large


async def test_what_left_the_queue_on_its_way_is_no_delivery(fleet: Fleet) -> None:
    giver, taker = [await fleet.connect() for _ in range(2)]
    heard: Box[Message] = Box()
    await taker.subscribe("run.w1", heard)
    await taker.sync()
    puller, box = await pull(giver)
    await puller.ask(1)
    await enqueue(giver, b"a")
    given = await box.next()
    await given.ack()
    await until(lambda: _is_queued(giver, 0))
    await giver.relay("run.w1", Parcel(given.subject, given.headers or {}, None, given.receipt), "")
    assert await taker.relayed(await heard.next()) is None


@pytest.mark.parametrize("receipt", ["", "req.a.b.c.d", "$JS.ACK.REQUESTS.x", "$JS.ACK.a b"])
async def test_a_message_that_nobody_relayed_is_no_delivery(broker: Broker, receipt: str) -> None:
    with pytest.raises(errors.MalformedMessage):
        await broker.relayed(
            Message("run.w1", b"", {subjects.SUBJECT: "req.a.b.c.d", subjects.RECEIPT: receipt})
        )
    with pytest.raises(errors.MalformedMessage):
        await broker.prolong(receipt.replace(".x", ".*"))


@pytest.mark.parametrize("receipt", ["", "req.a.b.c.d", "$JS.ACK.REQUESTS.>", "$JS.ACK.a b", "$JS.API.INFO"])
async def test_what_names_no_delivery_is_no_receipt(broker: Broker, receipt: str) -> None:
    heard: Box[Message] = Box()
    await broker.subscribe(">", heard)
    with pytest.raises(errors.MalformedMessage):
        await broker.hand_on(receipt)
    await broker.publish("fleet.after")
    assert (await heard.next()).subject == "fleet.after"


async def test_what_comes_to_the_pulls_of_a_client_that_hangs_is_handed_on(fleet: Fleet) -> None:
    hung, other, third = [await fleet.connect(ack_wait=3600) for _ in range(3)]
    puller, swallowed = await pull(hung)
    await puller.ask(2)
    bounced = await third.bounce(hung.inbox)
    await third.counts(subjects.REQUESTS, SUBJECT)  # answered after the server has heard of that
    await enqueue(hung, b"a", b"b")
    taking, taken = await pull(other)
    await taking.ask(2)
    again = await taken.take(2)
    assert {got.data for got in again} == {b"a", b"b"}
    assert max(got.attempt for got in again) > 1
    await bounced.close()
    await bounced.close()
    await swallowed.take(2)
    await puller.ask(1)
    (seq,) = await enqueue(hung, b"c")
    kept = await swallowed.next()
    await taking.ask(1)
    await enqueue(hung, b"d")
    assert ((kept.seq, kept.attempt), (await taken.next()).data) == ((seq, 1), b"d")


async def test_what_was_delivered_can_be_handed_on_whoever_has_it(fleet: Fleet) -> None:
    broker, other = await fleet.connect(ack_wait=3600), await fleet.connect()
    assert await other.delivered("llama", ServiceClass.STANDARD) == {}
    puller, box = await pull(broker)
    await puller.ask(300)
    acked, *seqs = await enqueue(broker, *(b"%d" % number for number in range(300)))
    deliveries = await box.take(300)
    await deliveries[0].ack()
    await until(lambda: _is_queued(broker, 299))
    waiting = await enqueue(broker, b"not delivered")
    found = await other.delivered("llama", ServiceClass.STANDARD)
    assert [*found] == seqs
    assert acked not in found
    taking, taken = await pull(other)
    await other.hand_on(found[seqs[7]])
    await other.hand_on(found[seqs[200]])
    await taking.ask(3)
    got = await taken.take(3)
    assert {(d.seq, d.attempt) for d in got} >= {(seqs[7], 2), (seqs[200], 2)}
    assert waiting[0] in {d.seq for d in got}


@pytest.mark.parametrize("inbox", ["", "req.a.b.c.d", "_INBOX.>", "_INBOX.a b"])
async def test_what_is_no_inbox_is_not_listened_to(broker: Broker, inbox: str) -> None:
    with pytest.raises(errors.MalformedMessage):
        await broker.bounce(inbox)


async def test_whether_anyone_listens(fleet: Fleet) -> None:
    asking, listening = await fleet.connect(), await fleet.connect()
    assert not await asking.listens("roster.w1")
    subscription = await listening.subscribe("roster.*", Box[Message]())
    await until(lambda: asking.listens("roster.w1"))
    await subscription.close()

    async def nobody() -> bool:
        return not await asking.listens("roster.w1")

    await until(nobody)


async def test_what_is_not_acked_in_time_comes_again(fleet: Fleet) -> None:
    silent, other = await fleet.connect(ack_wait=0.5), await fleet.connect()
    assert silent.ack_wait == 0.5
    puller, box = await pull(silent)
    await puller.ask(1)
    await enqueue(silent, b"a")
    assert (await box.next()).attempt == 1
    await silent.close()
    taking, taken = await pull(other)
    await taking.ask(1)
    fleet.pass_time(0.5)
    again = await taken.next()
    assert (again.data, again.attempt) == (b"a", 2)


@pytest.mark.parametrize("by", ["its holder", "a third party"])
async def test_in_progress_holds_the_ack_wait_off(fleet: Fleet, by: str) -> None:
    broker, third = [await fleet.connect(ack_wait=0.5) for _ in range(2)]
    puller, box = await pull(broker)
    await puller.ask(4)
    await enqueue(broker, b"kept", b"dropped")
    kept, _ = await box.take(2)
    again: Delivery | None = None
    async with asyncio.timeout(LIMIT):
        while again is None:
            await (kept.in_progress() if by == "its holder" else third.prolong(kept.receipt))
            fleet.pass_time(0.1)
            with contextlib.suppress(TimeoutError):
                again = await box.next(0.1)
    assert (again.data, again.attempt) == (b"dropped", 2)


async def test_queues_are_apart_by_base_and_class_with_any_name(broker: Broker) -> None:
    odd = "org/Löwe v1.5:*>"
    plain = str(subjects.RequestSubject("llama", "standard", "acme", "llama"))
    encoded = str(subjects.RequestSubject(odd, "standard", "a.b c", "αβ.lora"))
    batch = str(subjects.RequestSubject(odd, "batch", "a.b c", "αβ.lora"))
    for subject in (plain, encoded, batch):
        await enqueue(broker, subject.encode(), subject=subject)
    for base, service_class, subject in (
        (odd, "batch", batch),
        ("llama", "standard", plain),
        (odd, "standard", encoded),
    ):
        puller, box = await pull(broker, base, service_class)
        await puller.ask(1)
        got = await box.next()
        assert (got.subject, got.data, got.pending) == (subject, subject.encode(), 0)
        assert subjects.parse_request(got.subject).base == base


async def test_deleting_a_queued_message(broker: Broker) -> None:
    first, _ = await enqueue(broker, b"a", b"b")
    assert await broker.delete(subjects.REQUESTS, first) is True
    assert await broker.delete(subjects.REQUESTS, first) is False
    assert await broker.delete(subjects.REQUESTS, 10_000) is False
    puller, box = await pull(broker)
    await puller.ask(1)
    assert (await box.next()).data == b"b"


async def test_deleting_behind_an_open_consumer(broker: Broker) -> None:
    puller, box = await pull(broker)
    first, _ = await enqueue(broker, b"a", b"b")
    assert await broker.delete(subjects.REQUESTS, first)
    await puller.ask(1)
    got = await box.next()
    assert (got.data, got.pending) == (b"b", 0)


async def test_a_deleted_message_is_not_redelivered(broker: Broker) -> None:
    puller, box = await pull(broker)
    (seq,) = await enqueue(broker, b"a")
    await puller.ask(1)
    held = await box.next()
    assert await broker.delete(subjects.REQUESTS, seq)
    await held.nak()
    await puller.ask(1)
    await enqueue(broker, b"b")
    got = await box.next()
    assert (got.data, got.attempt) == (b"b", 1)
    await held.ack()
    assert await queued(broker) == 1


async def test_a_closed_puller_hands_back_what_still_comes(fleet: Fleet) -> None:
    leaving, staying = await fleet.connect(ack_wait=3600), await fleet.connect()
    puller, box = await pull(leaving)
    await puller.ask(1)
    await puller.close()
    await puller.close()
    await enqueue(leaving, b"a")
    taking, taken = await pull(staying)
    await taking.ask(1)
    assert (await taken.next()).data == b"a"
    assert len(box) == 0


async def test_a_pull_that_the_server_gives_up_lapses(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real broker alone: the fake's pulls stand for ever."""
    monkeypatch.setattr(client, "_PULL_EXPIRES", 0.3)
    lapsed = asyncio.Event()
    box: Box[Delivery] = Box()
    async with await client.connect(BrokerConfig(url=nats_url), "client") as broker:
        puller = await broker.pull("llama", ServiceClass.STANDARD, box, lapsed.set)
        await puller.ask(2)
        await enqueue(broker, b"a")
        await box.next()
        assert puller.outstanding == 1
        await asyncio.wait_for(lapsed.wait(), LIMIT)
        assert puller.outstanding == 0
        await puller.ask(1)
        await enqueue(broker, b"b")
        assert (await box.next()).data == b"b"


# Objects

BUCKET = subjects.PAYLOADS
OBJECTS = subjects.objects(BUCKET)


async def stored(broker: Broker) -> int:
    """Messages in the bucket."""
    return sum((await broker.counts(OBJECTS, subjects.all_objects(BUCKET))).values())


async def test_a_purge_removes_what_is_under_one_subject(broker: Broker) -> None:
    other = "req.llama.standard.acme.other"
    await enqueue(broker, b"a", b"b")
    await enqueue(broker, b"c", subject=other)
    await broker.purge(subjects.REQUESTS, SUBJECT)
    await broker.purge(subjects.REQUESTS, SUBJECT)
    assert await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {other: 1}


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 3 * 2**20 + 1])
async def test_an_object_comes_back_whole_and_leaves_nothing(fleet: Fleet, size: int) -> None:
    one, other = await fleet.connect(), await fleet.connect()
    data = bytes(range(251)) * (size // 251) + b"x" * (size % 251)
    await objects.put(one, BUCKET, "acme.1", data)
    await objects.put(one, BUCKET, "acme.2", b"stays")
    assert await objects.get(other, BUCKET, "acme.1", size) == data
    assert await objects.get(other, BUCKET, "acme.1", size) == data  # reading takes nothing away
    await objects.remove(other, BUCKET, "acme.1")
    await objects.remove(other, BUCKET, "acme.1")
    with pytest.raises(objects.Missing, match=r"no object 'acme\.1'"):
        await objects.get(one, BUCKET, "acme.1", size)
    assert await objects.get(one, BUCKET, "acme.2", 5) == b"stays"
    assert await stored(one) == 2


async def test_an_object_larger_than_wanted_is_not_read(broker: Broker) -> None:
    await objects.put(broker, BUCKET, "acme.1", b"x" * 1001)
    with pytest.raises(errors.TooLarge, match=r"1,001 bytes, more than the 1,000"):
        await objects.get(broker, BUCKET, "acme.1", 1000)


async def test_a_full_bucket_refuses_and_keeps_nothing_of_it(fleet: Fleet) -> None:
    broker = await fleet.connect(payload_bytes=2**20)
    await objects.put(broker, BUCKET, "acme.1", b"x" * 600_000)
    before = await stored(broker)
    with pytest.raises(errors.Overloaded):
        await objects.put(broker, BUCKET, "acme.2", b"x" * 600_000)
    assert await stored(broker) == before
    await objects.remove(broker, BUCKET, "acme.1")
    await objects.put(broker, BUCKET, "acme.2", b"x" * 600_000)
    assert await objects.get(broker, BUCKET, "acme.2", 2**20) == b"x" * 600_000


async def test_an_object_goes_by_its_age(fleet: Fleet) -> None:
    broker = await fleet.connect(payload_age=0.5)
    await objects.put(broker, BUCKET, "acme.1", b"x")

    async def gone() -> bool:
        fleet.pass_time(0.2)
        return not await stored(broker)

    await until(gone)


async def test_objects_are_unavailable_without_the_broker(fleet: Fleet) -> None:
    broker = await fleet.connect(timeout=0.5)
    await fleet.stop()
    await until(lambda: not broker.connected)
    with pytest.raises(errors.Unavailable):
        await objects.put(broker, BUCKET, "acme.1", b"x")
    with pytest.raises(errors.Unavailable):
        await objects.get(broker, BUCKET, "acme.1", 1)
    with pytest.raises(errors.Unavailable):
        await objects.remove(broker, BUCKET, "acme.1")


async def describe(broker: Broker, **changes: Any) -> None:
    """What describes object `acme.1`, as somebody else may write it."""
    subject = subjects.object_meta(BUCKET, "acme.1")
    record = await broker.last(OBJECTS, subject)
    assert record is not None
    meta = orjson.dumps(orjson.loads(record.data) | changes)
    await (await broker.enqueue(subject, meta, {subjects.ROLLUP: "sub"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "SHA-256=" + "A" * 43 + "="},
        {"size": 4},
        {"size": 6},
        {"chunks": 0},
        {"nuid": "*"},
        {"nuid": ">"},
        {"nuid": ""},
        {"nuid": "elsewhere"},
        {"deleted": True},
        {"size": "many"},
    ],
)
async def test_an_object_that_is_not_what_its_description_says_is_missing(
    broker: Broker, changes: dict[str, Any]
) -> None:
    await objects.put(broker, BUCKET, "acme.1", b"12345")
    await objects.put(broker, BUCKET, "acme.2", b"other")
    await describe(broker, **changes)
    with pytest.raises(objects.Missing):
        await objects.get(broker, BUCKET, "acme.1", 1000)
    await objects.remove(broker, BUCKET, "acme.1")  # which takes no other object with it
    assert await objects.get(broker, BUCKET, "acme.2", 1000) == b"other"


# Reading streams


async def test_the_journal_is_read_in_order_from_a_sequence(broker: Broker) -> None:
    for number in range(600):
        await broker.publish(REPLY, b"%d" % number)
        if number % 100 == 0:
            await broker.publish("out.acme.box.other", b"other")
    await until(lambda: _last_is(broker, REPLY, b"599"))
    records = await broker.read(subjects.REPLIES, REPLY)
    assert [record.data for record in records] == [b"%d" % number for number in range(600)]
    assert {record.subject for record in records} == {REPLY}
    seqs = [record.seq for record in records]
    assert seqs == sorted(set(seqs))
    part = await broker.read(subjects.REPLIES, REPLY, start=seqs[300], limit=270)
    assert [record.data for record in part] == [b"%d" % number for number in range(300, 570)]
    assert await broker.read(subjects.REPLIES, REPLY, start=seqs[-1] + 1) == []
    assert await broker.read(subjects.REPLIES, "out.acme.box.nobody") == []
    assert len(await broker.read(subjects.REPLIES, "out.*.box.*")) == 606


async def _last_is(broker: Broker, subject: str, data: bytes) -> bool:
    record = await broker.last(subjects.REPLIES, subject)
    return record is not None and record.data == data


async def test_the_journal_keeps_headers(broker: Broker) -> None:
    await broker.publish(REPLY, b"x", {"traceparent": "00-ab"})
    await until(lambda: _last_is(broker, REPLY, b"x"))
    (record,) = await broker.read(subjects.REPLIES, REPLY)
    assert (record.headers or {})["traceparent"] == "00-ab"


async def test_the_newest_message_of_a_subject(broker: Broker) -> None:
    assert await broker.last(subjects.REPLIES, REPLY) is None
    await broker.publish(REPLY, b"a")
    await broker.publish(REPLY, b"b")
    await broker.publish("out.acme.box.r2", b"c")
    await until(lambda: _last_is(broker, "out.acme.box.r2", b"c"))
    record = await broker.last(subjects.REPLIES, REPLY)
    assert record is not None
    assert (record.subject, record.data) == (REPLY, b"b")
    for leader in (False, True):
        record = await broker.last(subjects.REPLIES, "out.acme.*.r2", leader=leader)
        assert record is not None
        assert (record.subject, record.data) == ("out.acme.box.r2", b"c")
        assert await broker.last(subjects.REPLIES, "out.acme.*.nobody", leader=leader) is None


async def test_one_message_by_its_sequence(broker: Broker) -> None:
    head = {subjects.MSG_ID: "acme:1", subjects.REPLY_TO: REPLY}
    stored = await (await broker.enqueue(SUBJECT, b"body", head))
    record = await broker.record(subjects.REQUESTS, stored.seq)
    assert record is not None
    assert (record.seq, record.subject, record.data) == (stored.seq, SUBJECT, b"body")
    assert (record.headers or {})[subjects.REPLY_TO] == REPLY
    assert abs(record.stored_ms / 1000 - time.time()) < LIMIT
    await broker.delete(subjects.REQUESTS, stored.seq)
    assert await broker.record(subjects.REQUESTS, stored.seq) is None
    assert await broker.record(subjects.REQUESTS, stored.seq + 1) is None
    assert not await broker.delete(subjects.REQUESTS, stored.seq)  # the stream is empty, and remembers it


async def test_counts_by_subject(broker: Broker) -> None:
    assert await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}
    other = "req.qwen.batch.acme.qwen"
    await enqueue(broker, b"a", b"b")
    await enqueue(broker, b"c", subject=other)
    assert await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {SUBJECT: 2, other: 1}
    assert await broker.counts(subjects.REQUESTS, "req.*.batch.>") == {other: 1}
    assert await broker.counts(subjects.REQUESTS, "req.none.>") == {}


@pytest.mark.parametrize(
    ("stream", "subject"), [(subjects.USAGE, "usage.acme.llama"), (subjects.DEAD, "dead.malformed")]
)
async def test_what_is_published_for_later_is_kept(broker: Broker, stream: str, subject: str) -> None:
    await broker.publish(subject, b"{}")

    async def kept() -> bool:
        return [record.data for record in await broker.read(stream, subject)] == [b"{}"]

    await until(kept)


async def test_a_full_journal_forgets_the_oldest(fleet: Fleet) -> None:
    broker = await fleet.connect(journal_bytes=2**20)
    for number in range(8):
        await broker.publish(REPLY, bytes([number]) * 300_000)
    await until(lambda: _last_is(broker, REPLY, bytes([7]) * 300_000))
    kept = [record.data[0] for record in await broker.read(subjects.REPLIES, REPLY)]
    assert kept == [5, 6, 7]


async def test_a_stream_that_is_not_there_is_unavailable(broker: Broker) -> None:
    for call in (
        lambda: broker.read("NONE", "none.>"),
        lambda: broker.last("NONE", "none.x"),
        lambda: broker.last("NONE", "none.x", leader=True),
        lambda: broker.record("NONE", 1),
        lambda: broker.counts("NONE", "none.>"),
        lambda: broker.delete("NONE", 1),
    ):
        with pytest.raises(errors.Unavailable):
            await call()


async def test_headers_that_look_like_the_brokers_own_change_nothing(broker: Broker) -> None:
    """A publisher may set any."""
    forged = {"Status": "404", "Nats-Sequence": "77", "Nats-Subject": "x", "Nats-Num-Pending": "0"}
    for name in ("one", "two"):
        await (await broker.enqueue(SUBJECT, name.encode(), {subjects.MSG_ID: name, **forged}))
    records = await broker.read(subjects.REQUESTS, SUBJECT)
    assert [(r.seq, r.subject, r.data) for r in records] == [(1, SUBJECT, b"one"), (2, SUBJECT, b"two")]
    last = await broker.last(subjects.REQUESTS, SUBJECT)
    assert last is not None
    assert last.data == b"two"


async def test_a_usage_event_told_twice_is_kept_once(broker: Broker) -> None:
    for data in (b"first", b"again"):
        await broker.publish("usage.acme.llama", data, {subjects.MSG_ID: "acme:r1:1"})
    await broker.publish("usage.acme.llama", b"other", {subjects.MSG_ID: "acme:r1:2"})

    async def kept() -> list[bytes]:
        return [record.data for record in await broker.read(subjects.USAGE, subjects.ALL_USAGE)]

    async def all_here() -> bool:
        return (await kept())[-1:] == [b"other"]

    await until(all_here)
    assert await kept() == [b"first", b"other"]


# Key-value buckets


async def test_a_watch_gives_the_state_and_then_the_changes(fleet: Fleet) -> None:
    writer, reader = await fleet.connect(), await fleet.connect()
    key = subjects.token("org/llama v1.5")
    await writer.put(subjects.KV_MODELS, key, b"1")
    await writer.put(subjects.KV_MODELS, "gone", b"1")
    await writer.remove(subjects.KV_MODELS, "gone")
    state: dict[str, bytes | None] = {}
    watch = await reader.watch(subjects.KV_MODELS, state.__setitem__)
    assert {name: value for name, value in state.items() if value is not None} == {key: b"1"}
    await writer.put(subjects.KV_MODELS, key, b"2")
    await writer.put(subjects.KV_MODELS, "new", b"")
    await until(lambda: (state[key], state.get("new")) == (b"2", b""))
    await writer.remove(subjects.KV_MODELS, key)
    await until(lambda: state[key] is None)
    await watch.close()
    await watch.close()
    await writer.put(subjects.KV_MODELS, key, b"3")
    final: dict[str, bytes | None] = {}
    await reader.watch(subjects.KV_MODELS, final.__setitem__)
    assert final[key] == b"3"
    assert state[key] is None


async def test_a_value_has_a_revision(broker: Broker) -> None:
    assert await broker.get(subjects.KV_LEASES, "org%2Fx") == (None, 0)
    await broker.put(subjects.KV_LEASES, "org%2Fx", b"\x00\xff")
    data, first = await broker.get(subjects.KV_LEASES, "org%2Fx")
    assert data == b"\x00\xff"
    await broker.put(subjects.KV_LEASES, "other", b"")
    assert await broker.get(subjects.KV_LEASES, "org%2Fx") == (data, first)
    data, other = await broker.get(subjects.KV_LEASES, "other")
    assert (data, other > 0) == (b"", True)
    await broker.remove(subjects.KV_LEASES, "org%2Fx")
    data, removed = await broker.get(subjects.KV_LEASES, "org%2Fx")
    assert (data, removed > first) == (None, True)


async def test_a_value_is_swapped_by_its_revision_alone(fleet: Fleet) -> None:
    one, other = await fleet.connect(), await fleet.connect()
    first = await one.swap(subjects.KV_LEASES, "leader", b"one", 0)
    assert await one.get(subjects.KV_LEASES, "leader") == (b"one", first)
    assert first is not None
    assert await other.swap(subjects.KV_LEASES, "leader", b"other", 0) is None
    assert await other.swap(subjects.KV_LEASES, "leader", b"other", first + 1) is None
    assert await other.get(subjects.KV_LEASES, "leader") == (b"one", first)
    second = await other.swap(subjects.KV_LEASES, "leader", b"other", first)
    assert second is not None
    assert await one.swap(subjects.KV_LEASES, "leader", b"one", first) is None
    assert await one.get(subjects.KV_LEASES, "leader") == (b"other", second)
    await one.remove(subjects.KV_LEASES, "leader")
    _, removed = await one.get(subjects.KV_LEASES, "leader")
    assert await one.swap(subjects.KV_LEASES, "leader", b"one", 0) is None
    assert await one.swap(subjects.KV_LEASES, "leader", b"one", removed) is not None


async def test_one_of_many_that_swap_at_once_succeeds(fleet: Fleet) -> None:
    clients = [await fleet.connect() for _ in range(5)]
    swaps = (
        client.swap(subjects.KV_LEASES, "leader", b"%d" % number, 0) for number, client in enumerate(clients)
    )
    done = await asyncio.gather(*swaps)
    ((winner, revision),) = [(n, revision) for n, revision in enumerate(done) if revision is not None]
    assert await clients[0].get(subjects.KV_LEASES, "leader") == (b"%d" % winner, revision)


async def test_a_bucket_that_is_not_there_is_unavailable(broker: Broker) -> None:
    for call in (lambda: broker.get("none", "x"), lambda: broker.swap("none", "x", b"", 0)):
        with pytest.raises(errors.Unavailable):
            await call()


# Outages


async def test_nothing_hangs_while_the_broker_is_away(fleet: Fleet) -> None:
    broker = await fleet.connect(timeout=0.5)
    puller, _ = await pull(broker)
    assert broker.connected
    await fleet.stop()
    await until(lambda: not broker.connected)
    for call in (
        lambda: broker.enqueue(SUBJECT, b""),
        lambda: broker.pull("llama", ServiceClass.BATCH, Box[Delivery](), nothing),
        lambda: puller.ask(1),
        lambda: broker.delete(subjects.REQUESTS, 1),
        lambda: broker.read(subjects.REPLIES, REPLY),
        lambda: broker.last(subjects.REPLIES, REPLY),
        lambda: broker.last(subjects.REPLIES, REPLY, leader=True),
        lambda: broker.record(subjects.REQUESTS, 1),
        lambda: broker.counts(subjects.REQUESTS, SUBJECT),
        lambda: broker.put(subjects.KV_MODELS, "llama", b""),
        lambda: broker.listens("roster.w1"),
        lambda: broker.delivered("llama", ServiceClass.BATCH),
        lambda: broker.get(subjects.KV_LEASES, "leader"),
        lambda: broker.swap(subjects.KV_LEASES, "leader", b"", 0),
        lambda: broker.remove(subjects.KV_MODELS, "llama"),
        lambda: broker.watch(subjects.KV_MODELS, lambda *_: None),
    ):
        with pytest.raises(errors.Unavailable):
            await asyncio.wait_for(call(), 3.0)


async def test_everything_goes_on_when_the_broker_is_back(fleet: Fleet) -> None:
    broker, other = await fleet.connect(ack_wait=3600, timeout=1.0), await fleet.connect()
    heard: Box[Message] = Box()
    taken: Box[Delivery] = Box()
    state: dict[str, bytes | None] = {}
    lapsed = asyncio.Event()
    await broker.subscribe("fleet.*", heard)
    await broker.watch(subjects.KV_MODELS, state.__setitem__)
    puller = await broker.pull("llama", ServiceClass.STANDARD, taken, lapsed.set)
    await puller.ask(3)
    await enqueue(other, b"held")
    held = await taken.next()

    await fleet.stop()
    await until(lambda: not broker.connected and not other.connected)
    with pytest.raises(errors.Unavailable):
        await broker.hand_on(held.receipt)
    await held.ack()
    early: Box[Message] = Box()
    await broker.subscribe("fleet.early", early)
    await broker.publish("fleet.early", b"said while away")
    await fleet.start()

    await until(lambda: broker.connected and other.connected)
    await asyncio.wait_for(lapsed.wait(), LIMIT)
    assert puller.outstanding == 0
    assert (await early.next()).data == b"said while away"
    await until(lambda: _is_queued(other, 0))
    await until(lambda: _heard(other, heard, "fleet.w1"))
    await other.put(subjects.KV_MODELS, "llama", b"1")
    await until(lambda: state.get("llama") == b"1")
    await enqueue(other, b"next")
    await puller.ask(1)
    assert (await taken.next()).data == b"next"


async def test_closing_twice_and_calling_after(broker: Broker) -> None:
    await broker.close()
    await broker.close()
    assert not broker.connected
    for call in (
        lambda: broker.publish("fleet.w1"),
        lambda: broker.enqueue(SUBJECT, b""),
        lambda: broker.read(subjects.REPLIES, REPLY),
    ):
        with pytest.raises(errors.Unavailable):
            await asyncio.wait_for(call(), 3.0)


async def test_an_outage_is_logged_once(nats_server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    refused: list[Exception] = []

    class Counting(client.NatsBroker):
        async def _on_error(self, exc: Exception) -> None:
            if isinstance(exc, ConnectionRefusedError):
                refused.append(exc)
            await super()._on_error(exc)

    broker = Counting(BrokerConfig(url=nats_server.url), "one")
    async with broker:
        await broker.open()
        for _ in range(2):
            refused.clear()
            caplog.clear()
            await nats_server.stop()
            await until(lambda: len(refused) >= 3)
            kinds = [vars(record).get("error") for record in caplog.records]
            assert kinds.count("ConnectionRefusedError") == 1
            await nats_server.start()
            await until(lambda: broker.connected and not broker._outage)  # it has been told


async def test_connecting_to_no_server_says_where_and_why(unused_port: int) -> None:
    address = f"127.0.0.1:{unused_port}"
    config = BrokerConfig(url=f"nats://me:p@ss@{address},nats://{address}", timeout=0.5)
    with pytest.raises(errors.Unavailable) as raised:
        await asyncio.wait_for(client.connect(config, "nobody"), 5.0)
    assert raised.value.message == (
        f"no broker at nats://{address},nats://{address}: the broker did not answer: TimeoutError"
    )


async def test_a_question_has_the_first_answer(fleet: Fleet) -> None:
    asking, answering = await fleet.connect(), await fleet.connect()
    with pytest.raises(errors.Unavailable):
        await asking.ask("ctl.w1", b"?", timeout=5)

    tasks = set()

    def on_question(message: Message) -> None:
        tasks.add(asyncio.ensure_future(answering.publish(message.reply, message.data + b"!")))

    subscription = await answering.subscribe("ctl.w1", on_question)
    await until(lambda: asking.listens("ctl.w1"))
    assert await asking.ask("ctl.w1", b"so") == b"so!"
    await subscription.close()
    silent = await answering.subscribe("ctl.w2", Box[Message]())
    await until(lambda: asking.listens("ctl.w2"))
    with pytest.raises(errors.Unavailable):
        await asking.ask("ctl.w2", timeout=0.05)
    await silent.close()
