"""A reply read again, or read on, by a client that comes back: at any ingress, by as many as like."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time

from broker import base, errors, replies, subjects
from broker.assembler import place
from broker.messages import QUEUED_EPOCH, Frame, parse_request
from ingress.http import Receive, disconnected
from ingress.relay import Relay

_CHECK = 10.0
"""Seconds after which a request that waits is looked for in the queue again."""

_SETTLE = 2.0
"""Seconds that the frames of a request which left the queue may take to come, and those that a client has
read already to be in the journal."""

_LOOK_AGAIN = 0.05
"""Seconds between two looks for a reply that is known to be there."""

PATH = "/v1/requests/{id}/stream"
_PATH = re.compile(r"/v1/requests/([\x21-\x7e]{1,128})/stream")


def requested(path: str) -> str | None:
    """The request id that `path` names; None for another path."""
    found = _PATH.fullmatch(path)
    return found[1] if found else None


async def find(broker: base.Broker, tenant: str, request_id: str, known: bool = False) -> str:
    """The subject of the reply to a request; of an id that was used at two ingresses, the newer one's.

    `known`: whether the caller has read of the reply already. Who reads live may have a frame before the
    journal has it: such a caller is not told at once that there is nothing.
    Raises errors.NotFound where the journal has none of it, errors.Unavailable.
    """
    named = subjects.replies_to(tenant, request_id)
    give_up_at = time.monotonic() + (_SETTLE if known else 0.0)
    while True:
        newest = await broker.last(subjects.REPLIES, named)
        if newest is None:  # a copy that has just come back lags behind for seconds
            with contextlib.suppress(errors.Unavailable):  # there may be no leader
                newest = await broker.last(subjects.REPLIES, named, leader=True)
        if newest is not None:
            return newest.subject
        if time.monotonic() >= give_up_at:
            raise errors.NotFound(
                f"nothing is known of request {request_id!r}: it came to the queue this moment, or its reply "
                "is no longer kept, or there was none of this id"
            )
        await asyncio.sleep(_LOOK_AGAIN)


class Absence:
    """How long a request has not been in the queue while its reply has no end."""

    def __init__(self, broker: base.Broker) -> None:
        self._broker = broker
        self._since = math.inf

    def heard(self) -> None:
        """More of the reply came: it counts anew."""
        self._since = math.inf

    async def fault(self, seq: int) -> errors.FramesLost | None:
        """Why nobody will go on with request `seq`; None while somebody may. Raises errors.Unavailable."""
        if await self._broker.record(subjects.REQUESTS, seq) is not None:
            self._since = math.inf
            return None
        now = time.monotonic()
        self._since = min(self._since, now)
        if now - self._since < replies.NO_END_AFTER:
            return None
        return errors.FramesLost("the request has left the queue, and its reply has no end")


class _Waiting:
    """What is known of the request whose reply is read."""

    def __init__(self, broker: base.Broker, seq: int) -> None:
        self._broker = broker
        self._seq = seq  # in REQUESTS; 0 where no frame has told yet
        self._deadline_ms = 0
        self._check_at = 0.0
        self._note_at = time.monotonic() + replies.NOTE_AGAIN
        self.over = False  # a worker has said something of it
        self._absence = Absence(broker)

    def observe(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._seq = place(frame) or self._seq
            self.over = self.over or frame.epoch != QUEUED_EPOCH
            self._absence.heard()

    async def left(self) -> errors.HeadraceError | None:
        """Why nobody will go on with it; None while somebody may, or nothing tells."""
        return await self._absence.fault(self._seq) if self._seq else None

    async def fault(self) -> errors.HeadraceError | None:
        """Why nothing will come of it any more; None while something may."""
        now = time.monotonic()
        if now >= self._check_at:
            record = await self._broker.record(subjects.REQUESTS, self._seq) if self._seq else None
            if record is None:
                return errors.FramesLost("the request left the queue, and no reply to it is kept")
            self._check_at = now + _CHECK
            request = parse_request(record.subject, record.headers, record.data)
            self._deadline_ms = request.deadline_ms
            if now >= self._note_at:
                self._note_at = now + replies.NOTE_AGAIN
                await replies.note_queued(self._broker, request.reply_to, self._seq)
        if 0 < self._deadline_ms <= self._broker.now_ms():
            return errors.DeadlineExceeded("the request's deadline passed in the queue")
        return None


async def follow(
    broker: base.Broker,
    stream: replies.Stream,
    relay: Relay,
    receive: Receive,
    keepalive: float,
    seq: int = 0,
) -> bool:
    """Relay a reply to its end; False when this reader went before. The request itself is left alone. One
    who reads slowly sets the pace: the journal waits for it.

    `seq`: the request's in REQUESTS, where it is known to be there and the journal may not say so.
    Raises errors.FramesLost also where the journal keeps nothing of the reply any more and no end came,
    errors.DeadlineExceeded, errors.Unavailable.
    """
    waiting = _Waiting(broker, seq)
    gone = asyncio.create_task(disconnected(receive))
    gone.add_done_callback(lambda _: stream.wake())
    try:
        frames = await stream.begin()
        while not gone.done():
            waiting.observe(frames)
            if await relay.frames(frames):
                return True
            if not frames and (fault := await _silent(stream, waiting)) is not None:
                frames = await stream.next(_SETTLE)
                if frames or gone.done():
                    continue
                raise fault
            if not frames:
                await relay.keepalive()
            frames = await stream.next(keepalive)
        return False
    except errors.MalformedMessage as exc:
        raise errors.FramesLost(f"the reply holds what is no frame: {exc.message}") from exc
    finally:
        gone.cancel()


async def _silent(stream: replies.Stream, waiting: _Waiting) -> errors.HeadraceError | None:
    """Why a reply of which nothing came will not go on; None while it may, or while nobody can tell."""
    try:
        fault = await (waiting.left() if waiting.over else waiting.fault())
    except errors.Unavailable:
        return None
    if fault is not None or not waiting.over:
        return fault
    forgotten = await stream.forgotten()
    return errors.FramesLost("the reply has no end, and is no longer kept") if forgotten else None
