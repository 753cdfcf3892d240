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


class Turn:
    """One request's place among the large bodies that may be held at once. Others wait unread, in their
    senders' sockets, so that many large uploads take no more memory than `places` of them."""

    def __init__(self, places: asyncio.Semaphore, large: int) -> None:
        self._places = places
        self._large = large  # bytes up to which a body needs no place
        self._held = False

    async def wait(self, size: int) -> None:
        """Before holding `size` bytes."""
        if size > self._large and not self._held:
            await self._places.acquire()
            self._held = True

    def end(self) -> None:
        """The body is held no more. Idempotent."""
        if self._held:
            self._held = False
            self._places.release()


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, limit: int, timeout: float, turn: Turn
) -> bytes:
    """The whole body; the caller ends the `turn` that a large one took.

    Raises errors.TooLarge past `limit` bytes, errors.BodyTimeout after `timeout` seconds, the wait for its
    turn included, ClientGone.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _read_body(headers, receive, limit, turn)
    except TimeoutError as exc:
        raise errors.BodyTimeout(f"the request body did not arrive within {timeout:g} s") from exc


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, turn: Turn) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        await turn.wait(len(body))
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
            await turn.wait(max(size, declared))
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
