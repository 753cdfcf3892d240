"""A reply read again, or read on, by a client that comes back: at any ingress, by as many as like."""

from __future__ import annotations

import asyncio
import re
import time

from broker import base, errors, replies, subjects
from broker.messages import Request, parse_request
from ingress.exchange import disconnected
from ingress.http import Receive
from ingress.relay import Relay

PATH = "/v1/requests/{id}/stream"
_PATH = re.compile(r"/v1/requests/([\x21-\x7e]{1,128})/stream")


def requested(path: str) -> str | None:
    """The request id that `path` names; None for another path."""
    found = _PATH.fullmatch(path)
    return found[1] if found else None


async def queued(broker: base.Broker, seq: int) -> Request | None:
    """The request at a sequence of the queue; None when it has ended."""
    found = await broker.read(subjects.REQUESTS, subjects.ALL_REQUESTS, start=seq, limit=1)
    if not found or found[0].seq != seq:
        return None
    return parse_request(found[0].subject, found[0].headers, found[0].data)


async def follow(
    broker: base.Broker,
    tenant: str,
    request_id: str,
    relay: Relay,
    receive: Receive,
    keepalive: float,
    patience: float = 0.0,
) -> None:
    """Relay a reply to its end, or until this reader goes; the request itself is left alone.

    Args:
        patience: seconds that a reply of which there is nothing yet may take to begin.

    Raises errors.NotFound where the journal has none of it and it isn't waited for,
    errors.DeadlineExceeded where it was in vain, errors.FramesLost, errors.Unavailable.
    """
    gone = asyncio.create_task(disconnected(receive))
    until = time.monotonic() + patience
    try:
        async with replies.following(broker, tenant, request_id) as stream:
            gone.add_done_callback(lambda _: stream.wake())
            frames = await stream.begin()
            if not frames and patience <= 0:
                raise errors.NotFound(
                    f"nothing is known of request {request_id!r}: it waits in the queue, or its reply is no "
                    "longer kept, or there was none of this id"
                )
            begun, quiet_since = bool(frames), time.monotonic()
            while not gone.done():
                now = time.monotonic()
                if frames:
                    begun, quiet_since = True, now
                    if await relay.frames(frames):
                        return
                elif not begun and now >= until:
                    raise errors.DeadlineExceeded("the request's deadline passed")
                elif now - quiet_since >= keepalive:
                    quiet_since = now
                    await relay.keepalive()
                due = quiet_since + keepalive if begun else min(quiet_since + keepalive, until)
                frames = await stream.next(max(0.0, due - now))
    except errors.MalformedMessage as exc:
        raise errors.FramesLost(f"the reply holds what is no frame: {exc.message}") from exc
    finally:
        gone.cancel()
