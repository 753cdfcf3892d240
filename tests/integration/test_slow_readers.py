"""Clients that don't read what they asked for: bounded, told, able to read on; and no matter to others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from broker import base, replies, subjects
from broker.config import BrokerConfig
from broker.messages import TERMINAL
from tests.integration.reading import CHAT, Reader, chat, connected, where
from tests.integration.serving import answer, ingress, ready, worker
from tests.waiting import until
from tests.workbench import metric

UNREAD = 2**18
TOKENS = 12_000
"""An answer of some 3 MB: much more than the sockets of `narrow` hold, and a stream beside them."""


@pytest.fixture(scope="module")
async def fast(config: BrokerConfig) -> AsyncIterator[None]:
    """A worker that answers as fast as it can."""
    async with worker(config, model="sim", ttft_ms=0, itl_ms=0.05, context_tokens=2 * TOKENS):
        yield


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most bytes that ever waited in a stream, by its request's id."""
    found: dict[str, int] = {}
    push = replies.Stream.push

    def noted(self: replies.Stream, data: bytes) -> None:
        push(self, data)
        name = self.subject.rpartition(".")[2]
        found[name] = max(found.get(name, 0), self.unread)

    monkeypatch.setattr(replies.Stream, "push", noted)
    return found


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an ingress sends waits in the ingress, not in its socket."""
    create = socket.create_server

    def with_little_room(*args: Any, **kwargs: Any) -> socket.socket:
        listener = create(*args, **kwargs)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(socket, "create_server", with_little_room)


class Client:
    """A client on a bare socket with little room, which reads when it is told to."""

    def __init__(self, url: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)
        self._address = urlsplit(url).hostname, urlsplit(url).port
        self._raw = b""
        self.reader = Reader()
        self.whole = False

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> None:
        data = json.dumps(body).encode() if body is not None else b""
        head = {"Host": "test", "Content-Length": str(len(data)), **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, self._address)
        await loop.sock_sendall(self._socket, "\r\n".join(lines).encode() + data)
        while b"\r\n\r\n" not in self._raw:
            self._raw += await loop.sock_recv(self._socket, 4096)
        _, _, self._raw = self._raw.partition(b"\r\n\r\n")

    async def read(self) -> None:
        """To the end of the answer, or of the connection."""
        parts = [self._raw]
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.get_running_loop().sock_recv(self._socket, 2**16):
                parts.append(part)
                if (parts[-2] + part).endswith(b"\r\n0\r\n\r\n"):
                    self.whole = True
                    break
        rest = b"".join(parts)
        while b"\r\n" in rest:
            size, _, rest = rest.partition(b"\r\n")
            self.reader.feed(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]

    def close(self) -> None:
        self._socket.close()


@contextlib.asynccontextmanager
async def reading(url: str) -> AsyncIterator[Client]:
    with contextlib.closing(Client(url)) as found:
        yield found


async def kept(broker: base.Broker, request_id: str) -> bool:
    """Whether the reply has come to its end."""
    frame = await replies.last_frame(broker, await _subject(broker, request_id), 0)
    return frame is not None and frame.kind in TERMINAL


async def _subject(broker: base.Broker, request_id: str) -> str:
    record = await broker.last(subjects.REPLIES, subjects.replies_to("anonymous", request_id))
    assert record is not None
    return record.subject


async def finish(reader: Reader, http: httpx.AsyncClient, request_id: str) -> None:
    """What a client does that was cut off: it reads on behind the last event that it has."""
    reader._rest = b""
    await reader.resume(http, request_id)


async def test_a_slow_reader_is_cut_and_reads_on_while_the_others_read_to_the_end(
    config: BrokerConfig, broker: base.Broker, fast: None, most: dict[str, int]
) -> None:
    async with ingress(config, max_unread=UNREAD) as url, connected(url) as http, reading(url) as slow:
        await until(lambda: ready(http))
        head = {"X-Request-Id": "slow"}
        await slow.ask("POST", CHAT, chat("slow", TOKENS), **head)
        others = [Reader() for _ in range(3)]
        asking = [
            other.read(http, "POST", CHAT, json=chat(f"other {n}", 200)) for n, other in enumerate(others)
        ]
        await asyncio.gather(*asking)
        for n, other in enumerate(others):
            assert other.text == answer(f"other {n}", 200)
        await until(lambda: kept(broker, "slow"))
        assert UNREAD < most["slow"] < UNREAD + 4096

        await slow.read()
        *events, error = slow.reader.data
        assert slow.whole
        assert b"[DONE]" not in events
        told = json.loads(error)["error"]
        assert told["code"] == "reader_too_slow"
        assert where("slow") in told["message"]
        slow.reader.data = events
        await finish(slow.reader, http, "slow")
        assert slow.reader.text == answer("slow", TOKENS)


async def test_a_client_that_reads_nothing_is_disconnected_and_its_request_goes_on(
    config: BrokerConfig, broker: base.Broker, fast: None, most: dict[str, int]
) -> None:
    def cut() -> float:
        return metric("headrace_requests_total", path=CHAT, status="408")

    before = cut()
    settings = {"max_unread": UNREAD, "write_timeout": 0.1}
    async with ingress(config, **settings) as url, connected(url) as http, reading(url) as slow:
        await until(lambda: ready(http))
        await slow.ask("POST", CHAT, chat("stuck", TOKENS), **{"X-Request-Id": "stuck"})
        await until(lambda: cut() > before)
        await until(lambda: kept(broker, "stuck"))
        await slow.read()
        assert not slow.whole
        await finish(slow.reader, http, "stuck")
        assert slow.reader.text == answer("stuck", TOKENS)


async def test_who_reads_on_sets_the_pace(
    config: BrokerConfig, broker: base.Broker, fast: None, most: dict[str, int]
) -> None:
    """It is no live reader: what it doesn't take waits in the journal."""
    async with ingress(config, max_unread=UNREAD) as url, connected(url) as http, reading(url) as slow:
        await until(lambda: ready(http))
        head = {"X-Request-Id": "followed", "X-Detach": "true"}
        await Reader().read(http, "POST", CHAT, 1, json=chat("followed", TOKENS), headers=head)
        await slow.ask("GET", where("followed"))
        await until(lambda: kept(broker, "followed"))
        await slow.read()
        assert slow.whole
        assert slow.reader.text == answer("followed", TOKENS)
        assert most["followed"] < UNREAD + 4096
