"""nats-py's client with shortcuts for the messages that come by the token.

They reach into nats-py's internals, and so stand alone here, against the release that pyproject pins.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client

from broker import base

_log = logging.getLogger(__name__)

GATHER = 0.001
"""Seconds at most for which a gathered message waits for company."""

_BACKLOG = 64 * 1024
"""Bytes that the socket has not taken, past which nats-py's flusher waits for it; asyncio's own mark."""


class Connection(Client):
    """Core messages go from the socket to their handler at once, and back to it by the end of the turn;
    small messages leave together.

    nats-py's own way in, a reading task and then a queue and a task for each subscription, costs three
    more turns of the event loop a message; handlers here are plain functions, so nothing piles up. Its
    own way out, a queue and a flushing task, costs one more than needed. And a write to the socket for
    each message wakes the server, and the server the reader: with many streams that, not the bytes, is
    what a token costs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[int, Callable[[base.Message], None]] = {}
        self._gathering = False
        self._flushed_at = 0.0
        self._fault: asyncio.Task[None] | None = None
        self._gathered: asyncio.TimerHandle | None = None
        self._turn: asyncio.Handle | None = None

    # The way in

    async def _read_loop(self) -> None:
        """nats-py's, to which only what came before it and the end of the connection are left."""
        reader: asyncio.StreamReader | None = getattr(self._transport, "_io_reader", None)
        if reader is not None:  # a WebSocket has none
            reader.feed_data = functools.partial(self._on_bytes, reader)  # type: ignore[method-assign]
        await super()._read_loop()

    def _on_bytes(self, reader: asyncio.StreamReader, data: bytes) -> None:
        if reader._buffer:  # type: ignore[attr-defined]  # not read yet, and first
            asyncio.StreamReader.feed_data(reader, data)
            return
        parsing = self._ps.parse(data)
        try:
            # One step does it: the parser awaits nothing that waits.
            parsing.send(None)
        except StopIteration:
            return
        except Exception as exc:
            fault = exc
        else:
            parsing.close()
            fault = RuntimeError("nats-py's parser waited for something")
        _log.error("the connection can't be read", exc_info=fault)
        self._fault = asyncio.create_task(self._process_op_err(fault))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """What is raised here would end nats-py's read loop, and with it the connection: anybody may
        publish anything, so garbage reaches its handler as far as it can be read."""
        handler = self.handlers.get(sid)
        try:
            if handler is None:
                await super()._process_msg(sid, subject, reply, data, headers)
                return
            head = await self._readable(headers) if headers else None
            handler(base.Message(subject.decode("utf-8", "surrogateescape"), data, head, reply.decode()))
        except Exception:
            _log.exception("a message on %r could not be handled", subject)

    async def _readable(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await self._process_headers(headers)
        except Exception:
            return None

    # The way out

    async def publish_gathered(self, subject: str, data: bytes) -> None:
        """Publish, leaving at once if nothing left within `GATHER`, else by its end, together with
        what has come until then. Any other publish takes along what waits: order is kept."""
        self._gathering = True
        try:
            await self.publish(subject, data)
        finally:
            self._gathering = False

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        if force_flush or not self.is_connected or self._unsent() > _BACKLOG:
            return await super()._flush_pending(force_flush)
        loop = asyncio.get_running_loop()
        if self._gathering and time.monotonic() - self._flushed_at < GATHER:
            if self._gathered is None:
                self._gathered = loop.call_later(GATHER, self._flush)
        elif self._turn is None:
            # uvloop writes at once: by the end of this turn, what fell due with it can go along.
            self._turn = loop.call_soon(self._flush)
        return None

    def _unsent(self) -> int:
        size: int = self._transport._io_writer.transport.get_write_buffer_size()
        return size

    def _flush(self) -> None:
        if self._gathered is not None:
            self._gathered.cancel()
        self._gathered = self._turn = None
        self._flushed_at = time.monotonic()
        if self._pending and self.is_connected:  # else a reconnect sends what waits
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.writelines(pending)
