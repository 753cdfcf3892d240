"""nats-py's client with shortcuts for the messages that come by the token.

They reach into nats-py's internals, and so stand alone here, against the release that pyproject pins.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any, cast

import nats.errors
from nats.aio.client import PONG_PROTO, Client
from nats.aio.transport import TcpTransport
from nats.protocol.command import pub_cmd
from nats.protocol.parser import PERMISSIONS_ERR

from broker import base

_log = logging.getLogger(__name__)

_BACKLOG = 64 * 1024
"""Bytes that the socket has not taken, past which nats-py's flusher waits for it; asyncio's own mark."""


class Connection(Client):
    """Core messages go from the socket to their handler at once, and back to it in the loop's next turn.

    nats-py's own way in, a reading task and then a queue and a task for each subscription, costs three
    more turns of the event loop a message; handlers here are plain functions, so nothing piles up. Its
    own way out, a queue and a flushing task, costs one more than needed, and Python's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[int, Callable[[base.Message], None]] = {}
        self._fault: asyncio.Task[None] | None = None
        self._turn: asyncio.Handle | None = None

    # The way in

    async def _read_loop(self) -> None:
        """nats-py's, to which only what came before it and the end of the connection are left."""
        reader: asyncio.StreamReader | None = getattr(self._transport, "_io_reader", None)
        if reader is not None:  # a WebSocket has none
            reader.feed_data = functools.partial(self._on_bytes, reader)  # type: ignore[method-assign]
        self._ps.reset()  # what an earlier connection left in it is not this one's
        await super()._read_loop()

    def _on_bytes(self, reader: asyncio.StreamReader, data: bytes) -> None:
        if self.is_reconnecting or self.is_closed:
            return  # given up, but not closed yet
        if reader._buffer:  # type: ignore[attr-defined]  # not read yet, and first
            asyncio.StreamReader.feed_data(reader, data)
            return
        parsing = self._ps.parse(data)
        try:
            # One step does it: what the parser awaits does not wait.
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

    async def _process_ping(self) -> None:
        """nats-py's, which would wait where much is unsent."""
        self._pending.append(PONG_PROTO)
        self._pending_data_size += len(PONG_PROTO)
        await self._flush_pending()

    async def _process_err(self, err_msg: str) -> None:
        """nats-py gives a connection up for good when the server refuses what it was sent, and nobody would
        notice: a new one may do."""
        if not self.is_connected or PERMISSIONS_ERR in err_msg:
            await super()._process_err(err_msg)
            return
        fault = nats.errors.Error(f"nats: {err_msg}")
        await self._error_cb(fault)
        await self._process_op_err(fault)

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

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, Any] | None = None
    ) -> None:
        """nats-py's, less its checks for what goes along with a write that is due already."""
        size = len(payload)
        checked = headers or size > self._max_payload or size + self._pending_data_size > _BACKLOG
        if self._turn is None or checked:
            await super().publish(subject, payload, reply, headers)
            return
        command = pub_cmd(subject, reply, payload)
        self._pending.append(command)
        self._pending_data_size += len(command)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """In the loop's next turn, with what falls due until then: uvloop writes at once."""
        theirs = force_flush or not (self.is_connected and isinstance(self._transport, TcpTransport))
        if theirs or self._socket().get_write_buffer_size() > _BACKLOG:
            return await super()._flush_pending(force_flush)
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._flush)
        return None

    def _flush(self) -> None:
        self._turn = None
        if not (self._pending and self.is_connected) or self._socket().is_closing():
            return  # a reconnect sends what waits
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        self._socket().write(b"".join(pending))

    async def flush(self, timeout: int = 10) -> None:
        """nats-py's, whose PING would overtake what waits."""
        self._flush()
        await super().flush(timeout)

    def _socket(self) -> asyncio.WriteTransport:
        return cast("asyncio.WriteTransport", self._transport._io_writer.transport)  # type: ignore[union-attr]
