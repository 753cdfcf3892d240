"""`Idempotency-Key`: a request is queued once, whoever repeats it, at whichever ingress.

Everything follows from the names. The request id derives from tenant and key, so that every ingress
finds the request: by the deduplication of the queue, and by its frames in the journal. In the reply's
subject the fingerprint of path and body stands where other requests have their ingress's mailbox, so that
the subject of any frame, and the `Reply-To` of the queued message, tell one request from another; and
so that all who repeat it listen to the same subject as the first.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

from broker import base, errors, replies, subjects
from broker.messages import Request
from ingress import metrics

HEADER = b"idempotency-key"
_KEY = re.compile(rb"[\x20-\x7e]{1,255}")

_AGAIN = 0.05
"""Seconds until what was unconfirmed is published again, or the journal asked again."""

_SETTLE = 2.0
"""Seconds that the frames of a request which left the queue may take to reach the journal."""


def given(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The caller's key; None where there is none. Raises errors.InvalidRequest."""
    key = headers.get(HEADER)
    if key is not None and not _KEY.fullmatch(key):
        raise errors.InvalidRequest("Idempotency-Key must be 1 to 255 printable ASCII characters")
    return key


def request_id(tenant: str, key: bytes) -> str:
    return f"idem-{_digest(tenant.encode(), key)}"


def fingerprint(path: str, body: bytes) -> str:
    """What the reply's subject has in place of a mailbox: the same for the same request alone."""
    return f"idem-{_digest(path.encode(), body)}"


def _digest(*parts: bytes) -> str:
    """128 bits, more than anyone can make two of by chance."""
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()[:32]


class Claim(NamedTuple):
    """`seq`: the request's in REQUESTS, 0 where frames tell of it; `ours`: this call queued it."""

    seq: int
    ours: bool


async def claim(broker: base.Broker, request: Request, timeout: float, read_on: bool) -> Claim:
    """Queue the request, unless its key is known: then it is the reader's to follow. Its frames must be
    listened to before, and none passed on until this has returned.

    Only the queue's acknowledgement tells which: it is awaited for `timeout` seconds, and what stays
    unconfirmed is left alone, since it may run, and its client come back for it.
    `read_on`: the client has a part of the reply, and another run's would not go on from there.

    Raises errors.KeyReused, errors.NotFound when what is to be read on is no longer kept, errors.FramesLost,
    errors.Overloaded, errors.Unavailable; with all but errors.Unconfirmed this call surely queued nothing.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            return await _claim(broker, request, end, read_on)
        except errors.Unconfirmed:
            raise
        except errors.Unavailable:
            if time.monotonic() + _AGAIN >= end:
                raise
        await asyncio.sleep(_AGAIN)


async def _claim(broker: base.Broker, request: Request, end: float, read_on: bool) -> Claim:
    replies_to = subjects.replies_to(request.subject.tenant, request.request_id)
    known = await broker.last(subjects.REPLIES, replies_to, leader=True)
    if known is None and read_on:
        known = await _settled(broker, replies_to)
        if known is None:
            raise errors.NotFound("the reply is no longer kept: without Last-Event-ID the request runs anew")
    if known is None:
        stored = await _queue(broker, request, end)
        first = await broker.record(subjects.REQUESTS, stored.seq) if stored.duplicate else None
        if not stored.duplicate or first is not None:
            if first is not None:
                _check(request, (first.headers or {}).get(subjects.REPLY_TO, ""))
            # The queue forgets its ids sooner than a request may wait.
            await replies.note_queued(broker, request.reply_to, stored.seq)
            return Claim(stored.seq, first is None or _queued_before(request, first))
        known = await _settled(broker, replies_to)
        if known is None:
            raise errors.FramesLost("the first request under this key left the queue, and no reply is kept")
    _check(request, known.subject)
    return Claim(0, False)


def _queued_before(request: Request, first: base.Record) -> bool:
    """Whether what lies in the queue is this very call's, whose acknowledgement was lost."""
    return (
        bool(request.body_object) and (first.headers or {}).get(subjects.BODY_OBJECT) == request.body_object
    )


def _check(request: Request, reply_to: str) -> None:
    if reply_to != request.reply_to:
        raise errors.KeyReused(
            "this Idempotency-Key stands for a request with another path or body: use a new one"
        )


async def _queue(broker: base.Broker, request: Request, end: float) -> base.Stored:
    """Publish until the queue has said yes, no, or that it knows the id; at monotonic time `end` at last."""
    started = time.monotonic()
    doubt: errors.Unconfirmed | None = None
    while True:
        try:
            stored = await _publish(broker, request, end)
        except errors.Unconfirmed as exc:
            doubt = exc
        except errors.Unavailable:
            if doubt is None:
                raise  # else an earlier try may have been accepted
        else:
            metrics.PUBLISH.observe(time.monotonic() - started)
            return stored
        if time.monotonic() >= end:
            raise doubt
        await asyncio.sleep(_AGAIN)


async def _publish(broker: base.Broker, request: Request, end: float) -> base.Stored:
    ack = await broker.enqueue(str(request.subject), request.body, request.headers())
    ack.add_done_callback(_retrieve)
    await asyncio.wait({ack}, timeout=max(0.0, end - time.monotonic()))
    if not ack.done() or ack.cancelled():
        raise errors.Unconfirmed(
            "the broker did not say in time whether it accepted the request: repeat it under its key"
        )
    return ack.result()


def _retrieve(ack: asyncio.Future[base.Stored]) -> None:
    """An answer that comes too late is nobody's."""
    if not ack.cancelled():
        ack.exception()


async def _settled(broker: base.Broker, replies_to: str) -> base.Record | None:
    """The newest frame of a reply that began this moment: frames are stored a little after they are sent."""
    end = time.monotonic() + _SETTLE
    while True:
        known = await broker.last(subjects.REPLIES, replies_to, leader=True)
        if known is not None or time.monotonic() >= end:
            return known
        await asyncio.sleep(_AGAIN)
