"""The connection's shortcuts through nats-py, where the way is not smooth."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker import base, client, errors, subjects
from broker.base import Message
from broker.client import NatsBroker
from broker.config import BrokerConfig
from broker.server import NatsServer
from tests.waiting import until

SMALL = 16 * 1024
"""The server's `max_payload`: less than what the shortcut takes without a look."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path / "nats", sync_always=False, max_payload=SMALL) as started:
        yield started


@pytest.fixture
async def broker(server: NatsServer) -> AsyncIterator[NatsBroker]:
    async with await client.connect(BrokerConfig(url=server.url), "under test") as connected:
        yield connected


@pytest.fixture
async def reader(server: NatsServer) -> AsyncIterator[NatsBroker]:
    async with await client.connect(BrokerConfig(url=server.url), "reader") as connected:
        yield connected


@pytest.fixture
async def raised() -> AsyncIterator[list[dict[str, Any]]]:
    """What callbacks of the event loop raised, which nobody else would see."""
    found: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: found.append(context))
    yield found
    loop.set_exception_handler(None)


async def test_its_clock_is_followed_as_soon_as_it_tells_the_time(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3600)
    config = BrokerConfig(url=server.url)
    async with await client.connect(config, "first", make_streams=False) as first:
        assert abs(first.now_ms() / 1000 - time.time()) < 60  # nobody knows better yet
        async with await client.connect(config, "second") as second:
            assert abs(second.now_ms() / 1000 - right()) < 60
            await until(lambda: abs(first.now_ms() - second.now_ms()) < 60_000)
        following = first._following
    assert following is not None
    await until(following.cancelled)


async def test_its_clock_is_asked_again_by_who_reconnects(
    server: NatsServer, broker: NatsBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    api = broker._api

    async def spy(call: str, *rest: Any) -> dict[str, Any]:
        asked.append(call)
        return await api(call, *rest)

    monkeypatch.setattr(broker, "_api", spy)
    await server.stop()
    await until(lambda: not broker.connected)
    await server.start()
    await until(lambda: "STREAM.INFO.REQUESTS" in asked)


async def hearing(reader: NatsBroker, subject: str) -> list[int]:
    """The numbers published under `subject` from now on."""
    heard: list[int] = []
    await reader.subscribe(subject, lambda message: heard.append(int(message.data.split()[0])))
    await reader.last(subjects.REPLIES, "out.a.b.c")  # the server knows of the subscription
    return heard


async def works(broker: NatsBroker, reader: NatsBroker) -> None:
    heard = await hearing(reader, "fleet.works")

    async def comes() -> bool:
        if broker.connected:
            await broker.publish("fleet.works", b"1")
        return bool(heard)

    await until(comes)


async def test_a_message_too_large_is_refused_beside_others_too(
    broker: NatsBroker, reader: NatsBroker
) -> None:
    heard = await hearing(reader, "fleet.*")
    await broker.publish("fleet.a", b"1")
    with pytest.raises(errors.TooLarge):
        await broker.publish("fleet.a", b"x" * (SMALL + 1))
    await broker.publish("fleet.a", b"2")
    await until(lambda: heard == [1, 2])


async def test_a_line_that_the_server_refuses_costs_one_connection_not_all(
    broker: NatsBroker, reader: NatsBroker
) -> None:
    await broker.publish("fleet." + "x" * 5000, b"1")
    await until(lambda: broker._nc.stats["reconnects"] == 1)
    await works(broker, reader)


async def test_bytes_that_are_no_protocol_cost_one_connection(broker: NatsBroker, reader: NatsBroker) -> None:
    stream = broker._nc._transport._io_reader  # type: ignore[union-attr]
    broker._nc._on_bytes(stream, b"MSG what is this\r\nand this\r\n")
    await until(lambda: broker._nc.stats["reconnects"] == 1)
    await works(broker, reader)


async def test_a_server_that_reads_nothing_gets_it_all_in_order_when_it_does(
    server: NatsServer, broker: NatsBroker, reader: NatsBroker
) -> None:
    heard = await hearing(reader, "fleet.*")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        for number in range(4000):
            await broker.publish("fleet.a", b"%d " % number + b"x" * 2000)
            await asyncio.sleep(0)
        assert broker._nc._socket().get_write_buffer_size() + broker._nc._pending_data_size > 2**20
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await until(lambda: len(heard) == 4000)
    assert heard == list(range(4000))


async def test_who_publishes_to_a_server_that_reads_nothing_waits(
    server: NatsServer, broker: NatsBroker, reader: NatsBroker
) -> None:
    limit, size, count = 16 * 2**20, 8000, 4000
    heard = await hearing(reader, "fleet.*")
    published: list[int] = []

    def unsent() -> int:
        return broker._nc._socket().get_write_buffer_size() + broker._nc._pending_data_size

    async def publish() -> None:
        for number in range(count):
            await broker.publish("fleet.a", b"%d " % number + b"x" * size)
            published.append(unsent())
            await asyncio.sleep(0)

    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        publishing = asyncio.create_task(publish())
        await until(lambda: unsent() > limit)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(published) < count
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await publishing
    await until(lambda: len(heard) == count)
    assert heard == list(range(count))
    assert max(published) < 2 * limit


async def test_a_reply_that_is_being_repeated_is_not_begun_again(broker: NatsBroker) -> None:
    await broker.publish("out.a.b.c", b"frame")
    asked = Message("again.a.c", b"{}")
    for _ in range(2):
        for _ in range(100):
            broker._on_again(asked)
        assert len(broker._repeats) == 1
        await until(lambda: not broker._repeats)


async def test_what_was_published_right_before_the_close_arrives(
    server: NatsServer, reader: NatsBroker
) -> None:
    heard = await hearing(reader, "fleet.*")
    async with await client.connect(BrokerConfig(url=server.url), "short") as broker:
        for number in range(100):
            await broker.publish("fleet.a", b"%d" % number)
    await until(lambda: heard == list(range(100)))


async def test_a_restart_under_load_raises_nowhere_and_keeps_the_order(
    server: NatsServer, broker: NatsBroker, raised: list[dict[str, Any]]
) -> None:
    """What was on the wire when the server went is lost; what waited for the next one is not."""
    heard: list[int] = []

    def note(message: Message) -> None:
        heard.append(int(message.data))

    await broker.subscribe("fleet.*", note)
    published = 0

    async def publish() -> None:
        nonlocal published
        while True:
            await broker.publish("fleet.a", b"%d" % published)
            published += 1
            await asyncio.sleep(0)

    publishing = asyncio.create_task(publish())
    for _ in range(3):
        await until(lambda: broker.connected and len(heard) > 100)
        await server.stop()
        await until(lambda: not broker.connected)
        await server.start()
        await until(lambda: broker.connected)
        seen = len(heard)
        await until(lambda seen=seen: len(heard) > seen + 100)  # type: ignore[misc]
    publishing.cancel()
    await until(lambda: heard[-1] == published - 1)
    assert heard == sorted(set(heard))
    assert raised == []


async def test_what_a_reader_heard_is_published_again_for_who_asks(
    broker: NatsBroker, reader: NatsBroker
) -> None:
    """Its writer may be gone, and the journal may lack it."""
    subject = subjects.reply("acme", "box", "r1")
    with pytest.raises(errors.Unavailable):
        await broker.ask(subjects.again(subject), timeout=0.05)
    reader.heard(subject, b"1")
    reader.heard(subject, b"2")
    await broker.ask(subjects.again(subject))

    async def stored() -> bool:
        return [record.data for record in await broker.read(subjects.REPLIES, subject)] == [b"1", b"2"]

    await until(stored)


async def test_a_watch_finds_a_change_that_was_being_stored_when_it_began(
    broker: NatsBroker, reader: NatsBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither told live nor read: the server routes a change before its stream has it."""
    await broker.put(subjects.KV_MODELS, "ada", b"1")
    read, looks = reader.read, 0

    async def too_early(*arguments: Any, **more: Any) -> list[base.Record]:
        nonlocal looks
        looks += 1
        return [] if looks == 1 else await read(*arguments, **more)

    monkeypatch.setattr(reader, "read", too_early)
    state: dict[str, bytes | None] = {}
    watch = await reader.watch(subjects.KV_MODELS, state.__setitem__)
    assert state == {}
    await until(lambda: state == {"ada": b"1"})
    await watch.close()


async def test_a_watch_is_not_told_an_older_state_after_a_change(
    broker: NatsBroker, reader: NatsBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.put(subjects.KV_MODELS, "ada", b"1")
    read = reader.read
    told: list[tuple[str, bytes | None]] = []

    async def overtaken(*arguments: Any, **more: Any) -> list[base.Record]:
        found = await read(*arguments, **more)
        if not told:
            await broker.put(subjects.KV_MODELS, "ada", b"2")
            await until(lambda: told)
        return found

    monkeypatch.setattr(reader, "read", overtaken)
    watch = await reader.watch(subjects.KV_MODELS, lambda key, value: told.append((key, value)))
    assert told == [("ada", b"2")]
    await watch.close()
