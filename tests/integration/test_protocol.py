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
        config = uvicorn.Config(
            self.app, interface="asgi3", log_config=None, lifespan="off", timeout_keep_alive=keep_alive
        )
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
        await until(lambda: any(made.cut for made in server.made))
        assert 0 < len(await read(client)) < LARGE
        assert server.made[0].transport.get_write_buffer_size() == 0
    if path == "/stream":
        await until(lambda: server.cut == [True])


async def test_who_took_some_of_it_is_given_time_anew(server: Server) -> None:
    async with server.serving(write_timeout=30.0) as client:
        await ask(client, "/stream")
        (connection,) = await until(lambda: server.made)
        await until(lambda: connection.cycle is not None and connection.flow.write_paused)
        unsent = connection.transport.get_write_buffer_size()
        found = []
        for before in (unsent + 1, unsent):
            connection._look(before)
            found.append(connection.cut)
        assert found == [False, True]
    await until(lambda: server.cut == [True])


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
