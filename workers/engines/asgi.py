"""The few turns of ASGI that the raw engine apps share."""

from __future__ import annotations

from broker.messages import MAX_BODY
from workers.engines.base import Receive, Send


class BodyTooLong(Exception):
    """The request body exceeds `MAX_BODY`."""


async def read_body(receive: Receive) -> bytes | None:
    """The request body; None when the client went away before its end. Raises BodyTooLong."""
    parts, size = [], 0
    while (message := await receive())["type"] != "http.disconnect":
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            raise BodyTooLong(f"The request body exceeds {MAX_BODY} bytes.")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
    return None


async def disconnected(receive: Receive) -> None:
    """Until the client has gone. Call it after the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Send, status: int, body: bytes) -> None:
    """A whole JSON response."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
