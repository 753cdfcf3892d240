"""nats-py's client with two shortcuts for the messages that come by the token.

Both reach into nats-py's internals, and so stand alone here, against the release that pyproject pins.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client

from broker import base

_log = logging.getLogger(__name__)

GATHER = 0.001
"""Seconds at most for which a gathered message waits for company."""


class Connection(Client):
    """Core messages go from the parser to their handler at once, and small messages leave together.

    nats-py's own way in, a queue and a task for each subscription, costs two more turns of the event
    loop a message; handlers here are plain functions, so nothing piles up. Its own way out is a write
    to the socket a message, each of which wakes the server, and the server the reader: with many
    streams that, not the bytes, is what a token costs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[int, Callable[[base.Message], None]] = {}
        self._gathering = False
        self._flushed_at = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None

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

    async def publish_gathered(self, subject: str, data: bytes) -> None:
        """Publish, leaving at once if nothing left within `GATHER`, else by its end, together with
        what has come until then. Any other publish takes along what waits: order is kept."""
        self._gathering = True
        try:
            await self.publish(subject, data)
        finally:
            self._gathering = False

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        if self._gathering and not force_flush:
            now = time.monotonic()
            if now - self._flushed_at < GATHER:
                if self._flush_timer is None:
                    loop = asyncio.get_running_loop()
                    self._flush_timer = loop.call_later(GATHER, self._flush_gathered)
                return None
            self._flushed_at = now
        return await super()._flush_pending(force_flush)

    def _flush_gathered(self) -> None:
        self._flush_timer = None
        self._flushed_at = time.monotonic()
        if self._flush_queue is not None and self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())
