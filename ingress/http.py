"""Raw ASGI pieces: types, reading a body, sending an answer. No framework on the token path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from broker import errors

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_POLITE_DRAIN = 64 * 2**20
"""Bytes of a refused body read and dropped, so that its sender gets to read the answer."""


class ClientGone(Exception):
    """The client disconnected before its request was complete: there is nobody to answer."""


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, timeout: float) -> bytes:
    """The whole body.

    Raises errors.TooLarge past `limit` bytes, errors.BodyTimeout after `timeout` seconds, ClientGone.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _read_body(headers, receive, limit)
    except TimeoutError as exc:
        raise errors.BodyTimeout(f"the request body did not arrive within {timeout:g} s") from exc


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        return body
    chunks: list[bytes] = []
    size = 0
    declared = int(headers.get(b"content-length", b"0"))
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if max(size, declared) <= limit:
            chunks.append(chunk)
        if size > _POLITE_DRAIN or (not message.get("more_body", False) and max(size, declared) > limit):
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()


async def disconnected(receive: Receive) -> None:
    """Until the client has gone. Call it after the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> errors.TooLarge:
    return errors.TooLarge(f"the body is larger than the {limit:,} bytes this server takes")


async def answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    """A complete response with its length."""
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
