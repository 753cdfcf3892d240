"""uvicorn's HTTP/1.1, less its patience with clients that don't read, or don't end what they say."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ingress.http import Scope

_MAX_HEAD = 64 * 2**10
"""Bytes of a request's head, or of a body's framing, of which no end comes; and one read on top."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_CONNECTION = "headrace.connection"


def was_cut(scope: Scope) -> bool:
    """Whether the connection was ended from here, because its client read nothing."""
    connection = scope["state"].get(_CONNECTION)
    return isinstance(connection, Protocol) and connection.cut


class Protocol(HttpToolsProtocol):
    """One connection. It costs nothing where its client reads.

    Attributes:
        cut: more than the socket's buffers waited for its client, which took nothing for `write_timeout`
            seconds; what waited is thrown away.
    """

    def __init__(self, *args: Any, write_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cut = False
        self._write_timeout = write_timeout
        self._stalled: asyncio.TimerHandle | None = None
        self._open = 0  # bytes read of what has not ended

    # The way out

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self._write_timeout, self._look, unsent)

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _look(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() < unsent:
            self._watch()  # it reads, if slowly
            return
        self.cut = True
        self.transport.abort()

    # The way in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_more()

    def data_received(self, data: bytes) -> None:
        self._open += len(data)
        super().data_received(data)
        idle = self.cycle is None or self.cycle.response_complete
        if self._open > _MAX_HEAD and not self.transport.is_closing():
            if idle:
                self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._open and idle:
            self._await_more()

    def _await_more(self) -> None:
        """uvicorn does this between two requests only."""
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][_CONNECTION] = self

    def on_headers_complete(self) -> None:
        self._open = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._open = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._open = 0
        super().on_message_complete()
