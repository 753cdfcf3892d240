"""A reply read again, or read on, by a client that comes back: at any ingress, by as many as like."""

from __future__ import annotations

import asyncio
import re

from broker import base, errors, replies
from ingress.http import Receive, disconnected
from ingress.relay import Relay

_PAGE = 256
"""Frames passed on at once."""

PATH = "/v1/requests/{id}/stream"
_PATH = re.compile(r"/v1/requests/([\x21-\x7e]{1,128})/stream")


def requested(path: str) -> str | None:
    """The request id that `path` names; None for another path."""
    found = _PATH.fullmatch(path)
    return found[1] if found else None


async def follow(
    broker: base.Broker, tenant: str, request_id: str, relay: Relay, receive: Receive, keepalive: float
) -> bool:
    """Relay a reply to its end; False when this reader went before. The request itself is left alone.

    Raises errors.NotFound where the journal has none of it, errors.FramesLost also where it keeps nothing
    of it any more and no end came, errors.Unavailable.
    """
    gone = asyncio.create_task(disconnected(receive))
    try:
        async with replies.following(broker, tenant, request_id) as stream:
            if stream is None:
                raise errors.NotFound(
                    f"nothing is known of request {request_id!r}: it waits in the queue, or its reply is no "
                    "longer kept, or there was none of this id"
                )
            gone.add_done_callback(lambda _: stream.wake())
            frames = await stream.begin()
            while not gone.done():
                for page in range(0, len(frames), _PAGE):
                    if await relay.frames(frames[page : page + _PAGE]):
                        return True
                    await asyncio.sleep(0)  # others' tokens go between
                if not frames:
                    if await stream.forgotten():
                        raise errors.FramesLost("the reply has no end, and is no longer kept")
                    await relay.keepalive()
                frames = await stream.next(keepalive)
            return False
    except errors.MalformedMessage as exc:
        raise errors.FramesLost(f"the reply holds what is no frame: {exc.message}") from exc
    finally:
        gone.cancel()
