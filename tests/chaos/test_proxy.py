"""The network between a worker and the broker, stalled and cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.chaos.proxy import Proxy
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
    writer.write(b"hello")
    assert await said(reader, 5) == b"hello"
    writer.close()


async def test_stalled_it_holds_everything_back_and_loses_nothing(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    writer.write(b"one")
    assert await said(reader, 3) == b"one"
    proxy.stall()
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)
    proxy.mend()
    assert await said(reader, 3) == b"two"
    writer.close()


async def test_cut_it_breaks_connections_and_takes_none(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.ports[0])
    writer.write(b"one")
    assert await said(reader, 3) == b"one"
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
    writer.write(b"two")
    assert await said(reader, 3) == b"two"
    writer.close()
