"""A network between a process and the broker's nodes that can be stalled, or cut, or lose some messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Self

_Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]

_CHUNK = 64 * 1024


class Proxy:
    """One listening port for each target, all under one switch; an async context manager.

    Stalled, it takes connections and bytes and passes nothing on, until `mend`: a network that loses
    all packets for a while. Cut, connections are reset and new ones too. Of what is told to `lose`, a
    beginning of subjects, nothing arrives that the process publishes.
    """

    def __init__(self, targets: Sequence[tuple[str, int]]) -> None:
        self._targets = targets
        self._servers: list[asyncio.Server] = []
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._cut = False
        self._lost = b""

    @property
    def ports(self) -> list[int]:
        return [int(server.sockets[0].getsockname()[1]) for server in self._servers]

    def stall(self) -> None:
        self._passing.clear()

    def cut(self) -> None:
        self._cut = True
        for writer in list(self._open):
            writer.transport.abort()

    def lose(self, prefix: str) -> None:
        self._lost = prefix.encode()

    def mend(self) -> None:
        self._cut, self._lost = False, b""
        self._passing.set()

    async def __aenter__(self) -> Self:
        for target in self._targets:
            self._servers.append(await asyncio.start_server(self._accept(target), "127.0.0.1", 0))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for server in self._servers:
            server.close()
        self.cut()
        self._passing.set()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, target: tuple[str, int]) -> _Accept:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(target, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    async def _serve(
        self, target: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._open.add(writer)
        if self._cut:
            self.cut()
        try:
            there, away = await asyncio.open_connection(*target)
        except OSError:
            self._open.discard(writer)
            writer.transport.abort()
            return
        self._open.add(away)
        if writer.transport.is_closing():
            away.transport.abort()
        try:
            await asyncio.gather(self._copy(reader, away, Messages()), self._copy(there, writer))
        finally:
            self._open -= {writer, away}

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, messages: Messages | None = None
    ) -> None:
        """One way; its end, or a broken connection, is passed on at once."""
        with contextlib.suppress(OSError, RuntimeError):  # uvloop raises the second for a closed one
            while data := await reader.read(_CHUNK):
                await self._passing.wait()
                if messages is not None:
                    data = b"".join(whole for subject, whole in messages.feed(data) if self._arrives(subject))
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def _arrives(self, subject: bytes) -> bool:
        return not self._lost or not subject.startswith(self._lost)


class Messages:
    """What a client writes in NATS' protocol, cut at the ends of its messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Subject and bytes of each that is complete now; the subject is empty where none is published."""
        self._rest += data
        found, at = [], 0
        while (end := self._rest.find(b"\r\n", at)) >= 0:
            words, end = self._rest[at:end].split(), end + 2
            subject = b""
            if words and words[0] in (b"PUB", b"HPUB"):
                subject, end = words[1], end + int(words[-1]) + 2
            if end > len(self._rest):
                break
            found.append((subject, self._rest[at:end]))
            at = end
        self._rest = self._rest[at:]
        return found
