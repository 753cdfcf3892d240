"""Errors as HTTP answers and as SSE events. The only place that knows how each API words them."""

from __future__ import annotations

import math
from typing import Any

import orjson

from broker.errors import BodyTimeout, HeadraceError

_JSON = (b"content-type", b"application/json")


def headers(exc: HeadraceError, request_id: str) -> list[tuple[bytes, bytes]]:
    """Response headers that go with an error."""
    found = [_JSON, (b"x-request-id", request_id.encode("ascii"))]
    if isinstance(exc, BodyTimeout):
        found.append((b"connection", b"close"))  # the rest of the body would be read as the next request
    return found + retry_after(exc.status, exc.retry_after)


def retry_after(status: int, seconds: float | None) -> list[tuple[bytes, bytes]]:
    """`Retry-After` in whole seconds: where they are known, and where the status promises one. Where they are
    known, in ms too, as OpenAI's clients read it."""
    if seconds is None:
        return [(b"retry-after", b"1")] if status in (408, 429, 503) else []
    return [
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
        (b"retry-after-ms", b"%d" % math.ceil(1000 * seconds)),
    ]


def body(exc_body: bytes, path: str) -> bytes:
    """An OpenAI error object; `/v1/messages` clients look for Anthropic's `type` beside it."""
    if path.startswith("/v1/messages"):
        return orjson.dumps({"type": "error", **_loads(exc_body)})
    return exc_body


def sse_event(exc_body: bytes, path: str) -> bytes:
    """The event that ends a broken stream, as each API's clients know it. No `[DONE]` follows."""
    if path.startswith("/v1/messages"):
        return b"event: error\ndata: " + body(exc_body, path) + b"\n\n"
    if path.startswith("/v1/responses"):
        inner = _loads(exc_body).get("error") or {}
        event = {
            "type": "error",
            "code": inner.get("code"),
            "message": inner.get("message"),
            "param": inner.get("param"),
        }
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    return b"data: " + exc_body.replace(b"\n", b" ") + b"\n\n"


def _loads(exc_body: bytes) -> dict[str, Any]:
    """The engine's own error bodies pass through here too: what is no object is wrapped as one."""
    try:
        found = orjson.loads(exc_body)
    except orjson.JSONDecodeError:
        found = exc_body.decode("utf-8", "replace")
    return found if isinstance(found, dict) else {"error": {"message": found}}
