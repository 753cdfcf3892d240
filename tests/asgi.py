"""Call an ASGI app as a worker does: one request, its body parts as they come, a disconnect at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson

from workers.engines.base import ASGIApp, ASGIMessage, Tap, current_tap


class Call:
    """A request under way. `status` is 0 until the response has started."""

    def __init__(
        self, app: ASGIApp, method: str, path: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.tap = Tap()
        self.parts: list[bytes] = []
        self._received: asyncio.Queue[ASGIMessage] = asyncio.Queue()
        self._received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self._sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        more = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self._task = asyncio.create_task(self._run(app, method, path, more))

    async def _run(self, app: ASGIApp, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        current_tap.set(self.tap)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("engine", 80),
            "state": {},
        }
        try:
            await app(scope, self._received.get, self._send)
        finally:
            self._sent.put_nowait(None)

    async def _send(self, message: ASGIMessage) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif body := message.get("body"):
            self._sent.put_nowait(body)

    def disconnect(self) -> None:
        self._received.put_nowait({"type": "http.disconnect"})

    async def chunks(self) -> AsyncIterator[bytes]:
        """Body parts up to the end; raises what the app raised."""
        while (part := await self._sent.get()) is not None:
            self.parts.append(part)
            yield part
        await self._task

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The SSE events of the rest of the body, without the final `[DONE]`."""
        rest = b""
        async for part in self.chunks():
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                data = event[event.index(b"data:") + 5 :].strip()
                if data != b"[DONE]":
                    yield orjson.loads(data)
        assert not rest

    async def body(self) -> bytes:
        return b"".join([part async for part in self.chunks()])

    async def json(self) -> Any:
        return orjson.loads(await self.body())

    async def ended(self) -> None:
        """Until the app has returned, whatever it sends; raises what it raised."""
        async for _ in self.chunks():
            pass

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


@asynccontextmanager
async def request(
    app: ASGIApp,
    path: str,
    body: object = None,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Call]:
    """Send `body` (bytes as they are, anything else as JSON); the call is ended on the way out."""
    call = Call(app, method, path, body if isinstance(body, bytes) else orjson.dumps(body), headers)
    try:
        yield call
    finally:
        await call.close()


async def ask(app: ASGIApp, path: str, body: object) -> Any:
    """The JSON of a 200 response."""
    async with request(app, path, body) as call:
        answer = await call.json()
        assert call.status == 200, answer
        return answer
