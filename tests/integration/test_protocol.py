"""uvicorn's protocol and ours, before a client on a bare socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from uvicorn.server import ServerState

from ingress.http import Receive, Scope, Send, answer, disconnected
from ingress.protocol import Protocol, was_cut
from tests.waiting import until

LARGE = 32 * 2**20
"""Bytes: more than the sockets of one connection hold."""


class Server:
    """One app behind `Protocol`; `made` has each connection."""

    def __init__(self) -> None:
        self.made: list[Protocol] = []
        self.cut: list[bool] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/whole":
            await answer(send, 200, [], bytes(LARGE))
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(LARGE // 2**20):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        await disconnected(receive)
        self.cut.append(was_cut(scope))

    @contextlib.asynccontextmanager
    async def serving(self, write_timeout: float, keep_alive: int = 75) -> AsyncIterator[socket.socket]:
        """A client's end of a new connection."""
        config = uvicorn.Config(self.app, lifespan="off", log_config=None, timeout_keep_alive=keep_alive)
        config.load()

        def make() -> Protocol:
            state = ServerState()
            self.made.append(
                Protocol(config=config, server_state=state, app_state={}, write_timeout=write_timeout)
            )
            return self.made[-1]

        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        with contextlib.closing(socket.socket()) as client:
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, server.sockets[0].getsockname())
            yield client
        server.close()


@pytest.fixture
def server(anyio_backend: object) -> Server:
    return Server()


async def ask(client: socket.socket, path: str) -> None:
    await asyncio.get_running_loop().sock_sendall(client, b"GET %s HTTP/1.1\r\n\r\n" % path.encode())


async def read(client: socket.socket, size: int = LARGE) -> bytes:
    """Up to `size` bytes, or what comes before the connection's end."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while len(found) < size and (part := await asyncio.get_running_loop().sock_recv(client, 2**20)):
            found += part
    return found


@pytest.mark.parametrize("path", ["/whole", "/stream"])
async def test_what_nobody_takes_is_thrown_away_with_its_connection(server: Server, path: str) -> None:
    async with server.serving(write_timeout=0.05) as client:
        await ask(client, path)
        await until(lambda: server.made and server.made[0].cut)
        assert 0 < len(await read(client)) < LARGE
        assert server.made[0].transport.get_write_buffer_size() == 0
    if path == "/stream":
        await until(lambda: server.cut == [True])


async def test_who_reads_a_little_now_and_then_is_not_cut(server: Server) -> None:
    async with server.serving(write_timeout=0.2) as client:
        await ask(client, "/stream")
        (connection,) = await until(lambda: server.made)
        rounds = 0
        looked = connection._look

        def look(unsent: int) -> None:
            nonlocal rounds
            looked(unsent)
            rounds += 1

        connection._look = look  # type: ignore[method-assign]
        while rounds < 3 and not connection.cut:
            await read(client, 1)
            await asyncio.sleep(0)
        assert not connection.cut
        await read(client)
    await until(lambda: server.cut == [False])


async def test_a_client_that_goes_was_not_cut(server: Server) -> None:
    async with server.serving(write_timeout=30.0) as client:
        await ask(client, "/stream")
        await read(client, 1)
    await until(lambda: server.cut == [False])


async def test_a_head_without_end_is_refused(server: Server) -> None:
    async with server.serving(write_timeout=30.0) as client:
        sending = asyncio.get_running_loop().sock_sendall(client, b"GET / HTTP/1.1\r\nX: " + b"x" * 2**20)
        with contextlib.suppress(ConnectionError):
            await sending
        assert (await read(client, 1)).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nX: "])
async def test_who_says_nothing_more_is_disconnected(server: Server, said: bytes) -> None:
    async with server.serving(write_timeout=30.0, keep_alive=0) as client:
        await asyncio.get_running_loop().sock_sendall(client, said)
        assert await read(client) == b""
