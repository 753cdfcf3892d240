"""The network between a worker and the broker: stalled, cut, and losing messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.proxy import Messages, Proxy
from tests.waiting import LIMIT

BROKEN = ConnectionResetError, asyncio.IncompleteReadError


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionResetError):
        while data := await reader.read(1024):
            writer.write(data)
    writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Proxy([server.sockets[0].getsockname()[:2]]) as started:
        yield started


async def said(reader: asyncio.StreamReader, count: int) -> bytes:
    return await asyncio.wait_for(reader.readexactly(count), LIMIT)


async def test_it_passes_on(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    writer.write(b"hello\r\n")
    assert await said(reader, 7) == b"hello\r\n"
    writer.close()


async def test_stalled_it_holds_everything_back_and_loses_nothing(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    writer.write(b"one\r\n")
    assert await said(reader, 5) == b"one\r\n"
    proxy.stall()
    writer.write(b"two\r\n")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)
    proxy.mend()
    assert await said(reader, 5) == b"two\r\n"
    writer.close()


async def test_cut_it_breaks_connections_and_takes_none(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    writer.write(b"one\r\n")
    assert await said(reader, 5) == b"one\r\n"
    proxy.cut()
    with pytest.raises(BROKEN):
        await said(reader, 1)
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    with pytest.raises(BROKEN):
        await said(reader, 1)
    writer.close()
    proxy.mend()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    writer.write(b"two\r\n")
    assert await said(reader, 5) == b"two\r\n"
    writer.close()


async def test_what_it_loses_does_not_arrive_and_all_else_does(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    proxy.lose("fleet.")
    writer.write(
        b"PUB fleet.w1 5\r\na\r\nbc\r\nPING\r\nHPUB fleet.w1 r 3 5\r\n12345\r\nPUB out.fleet.w1  2\r\nok\r\n"
    )
    kept = b"PING\r\nPUB out.fleet.w1  2\r\nok\r\n"
    assert await said(reader, len(kept)) == kept
    proxy.mend()
    writer.write(b"PUB fleet.w1 0\r\n\r\n")
    assert await said(reader, 18) == b"PUB fleet.w1 0\r\n\r\n"
    writer.close()


@given(st.lists(st.integers(1, 60)))
def test_messages_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    said = (
        b"CONNECT {}\r\nPUB a.b 4\r\n\r\n\r\n\r\nSUB c 1\r\nHPUB d e 2 6\r\nPUB x \r\nPUB f 0\r\n\r\nPING\r\n"
    )
    messages, found, at = Messages(), list[tuple[bytes, bytes]](), 0
    for cut in [*cuts, len(said)]:
        found += messages.feed(said[at : at + cut])
        at += cut
    assert [subject for subject, _ in found] == [b"", b"a.b", b"", b"d", b"f", b""]
    assert b"".join(whole for _, whole in found) == said
