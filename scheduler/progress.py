"""How far a request has come that a worker may have had, as the journal of its reply tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from broker import base, replies
from broker.messages import QUEUED_EPOCH, Frame, FrameKind


class Progress(NamedTuple):
    """`tokens`: of its output. `begun`: part of the answer, or its end, went out."""

    begun: bool
    tokens: int


async def of(broker: base.Broker, reply_to: str, since_ms: float) -> Progress:
    """Of the request that was queued at `since_ms`. Raises errors.Unavailable, errors.MalformedMessage."""
    newest = await replies.last_frame(broker, reply_to, since_ms)
    if newest is None or newest.epoch == QUEUED_EPOCH:
        return Progress(begun=False, tokens=0)
    if newest.kind is FrameKind.BEAT and not newest.off:
        # Of a worker that has said nothing else; what others had said before stands behind it.
        return _progress(await replies.journal(broker, reply_to, since_ms))
    return _progress([newest])


def _progress(frames: Sequence[Frame]) -> Progress:
    """Of several choices the first one counts: frames say of the others only what they add."""
    return Progress(
        begun=any(frame.off or frame.kind is not FrameKind.BEAT for frame in frames),
        tokens=max((frame.off + len(frame.ids) for frame in frames), default=0),
    )
