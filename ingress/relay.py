"""Frames out of the mailbox into one HTTP answer. The engine's bytes pass through; its events get ids."""

from __future__ import annotations

import time
from collections.abc import Callable

from broker import errors
from broker.messages import Frame, FrameKind
from ingress import errors as wording
from ingress import metrics, sse, timing
from ingress.http import Send, answer

_SSE = b"text/event-stream"
_FROM_ENGINE = ("content-type", "retry-after")
_QUEUED = b": queued\n\n"
_ALIVE = b": keep-alive\n"
"""One line, which the next event begins with: an empty line would end an event, and OpenAI's clients take
whatever ends after an id for one, and fail on its missing data."""


class Relay:
    """Writes one answer: SSE as it comes, anything else whole, so that a late error still gets its
    status. Owned by the task that handles the request.

    Attributes:
        status: as sent to the client; 0 before anything was.
        worker: who answers, once known.
        after: what the client has of the answer already; None = nothing.
        first_payload_at: `time.monotonic()` of the first payload byte sent.
        told: further headers of the answer, beside its request id.
        cut: tells whether the connection was ended from here, because its client read nothing.
    """

    def __init__(self, send: Send, path: str, request_id: str, streaming: bool) -> None:
        self._send = send
        self._path = path
        self._streaming = streaming
        self._request_id = request_id.encode("latin-1")
        self.told: list[tuple[bytes, bytes]] = []
        self._buffer: list[bytes] = []
        self._head: Frame | None = None
        self._sse = False
        self._at_boundary = True
        self.status = 0
        self.worker = ""
        self.after: sse.Position | None = None
        self._joined = False  # the frame that `after` names has come by
        self.first_payload_at: float | None = None
        self.cut: Callable[[], bool] = lambda: False
        self.fault: errors.HeadraceError | None = None

    @property
    def _common(self) -> list[tuple[bytes, bytes]]:
        told = [(b"x-request-id", self._request_id), *self.told]
        if self.worker:
            told.append((b"x-headrace-worker", self.worker.encode("latin-1", "replace")))
        return told + timing.headers(self._head)

    async def frames(self, frames: list[Frame]) -> bool:
        """Pass on what came, joined into one send; True when the answer is complete.

        Raises errors.FramesLost when it does not go on from where its client is.
        """
        parts: list[bytes] = []
        for frame in frames:
            if frame.kind is FrameKind.DATA:
                parts.append(self._payload(frame))
            elif frame.kind is FrameKind.HEAD:
                parts.append(await self._begin(frame))
            elif frame.kind is FrameKind.BEAT:
                self.worker = frame.extra.get("worker", "")
            elif frame.kind is FrameKind.END:
                if self._sse and self.after is not None and not self._joined:
                    raise sse.not_there()
                await self._finish(b"".join(parts))
                return True
            elif frame.kind is FrameKind.ERROR:
                await self._pass_on(b"".join(parts))
                await self._break(
                    frame.extra.get("status", 500), frame.payload, frame.extra.get("retry_after")
                )
                return True
        await self._pass_on(b"".join(parts))
        return False

    async def keepalive(self, unserved: str = "") -> None:
        """An SSE comment, so that proxies and clients keep a silent connection.

        `unserved` names the model where it waits for want of a worker.
        Before the head has come this commits to an SSE answer; what goes wrong after that is told
        as an event.
        """
        events = self._sse or (self._streaming and self._head is None)
        if not events or not self._at_boundary:
            return
        if not self.status:
            await self._start_sse(200, [])
        metrics.KEEPALIVES.inc()
        if self._head is not None:
            await self._write(_ALIVE)
            self._at_boundary = True
        elif unserved and not self.worker:
            name = " ".join(unserved.split())  # a line break would end the comment
            await self._write(f": queued, no worker serves {name} now\n\n".encode())
        else:
            await self._write(_QUEUED)

    async def fail(self, fault: errors.HeadraceError) -> None:
        """End the answer with an error of our own."""
        self.fault = fault
        await self._break(fault.status, fault.body(), fault.retry_after)

    # Head

    async def _begin(self, frame: Frame) -> bytes:
        self._head = frame
        self.worker = frame.extra.get("worker", self.worker)
        content_type = frame.extra.get("headers", {}).get("content-type", "").encode("latin-1")
        if content_type.startswith(_SSE):
            self._sse = True
            if not self.status:
                await self._start_sse(frame.extra.get("status", 200), [])
        return self._payload(frame)

    def _payload(self, frame: Frame) -> bytes:
        if not self._sse:
            return frame.payload
        if self.after is not None and not self._joined:
            self._joined = sse.joins(frame, self.after)
        return sse.numbered(frame, self.after)

    async def _start_sse(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        head = [
            *self._common,
            *headers,
            (b"content-type", _SSE + b"; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    # Payload

    async def _pass_on(self, payload: bytes) -> None:
        if not payload:
            return
        if self.first_payload_at is None:
            self.first_payload_at = time.monotonic()
        if self._sse:
            await self._write(payload)
        else:
            self._buffer.append(payload)

    async def _write(self, payload: bytes) -> None:
        self._at_boundary = payload.endswith(b"\n\n")
        await self._send({"type": "http.response.body", "body": payload, "more_body": True})

    # End

    async def _finish(self, payload: bytes) -> None:
        if self._sse:
            await self._pass_on(payload)
            await self._send({"type": "http.response.body", "body": b""})
            return
        body = b"".join(self._buffer) + payload
        head = self._head.extra if self._head is not None else {}
        status = head.get("status", 500)
        if self.status:
            # A keep-alive had already promised an event stream.
            await self._end_sse(body, status)
            return
        self.status = status
        if self.first_payload_at is None and body:
            self.first_payload_at = time.monotonic()
        headers = [*self._common]
        for name, value in head.get("headers", {}).items():
            if name.lower() in _FROM_ENGINE:
                headers.append((name.lower().encode(), value.encode("latin-1", "replace")))
        await answer(self._send, status, headers, body)

    async def _break(self, status: int, body: bytes, retry_after: float | None) -> None:
        if self.status:
            await self._end_sse(body, status)
            return
        self.status = status
        headers = [*self._common, (b"content-type", b"application/json")]
        headers += wording.retry_after(status, retry_after)
        await answer(self._send, status, headers, wording.body(body, self._path))

    async def _end_sse(self, body: bytes, status: int) -> None:
        self.status = status
        event = wording.sse_event(body, self._path)
        if not self._at_boundary:
            event = b"\n\n" + event
        await self._send({"type": "http.response.body", "body": event})
