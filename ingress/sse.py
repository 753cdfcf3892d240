"""Server-sent events' ids: where in a reply its client is, the same at every ingress.

Each event of an answer ends in a line `id: <epoch>-<seq>-<number>`: the frame that completed it, and
which of the frame's events it is. It stands last since an event may have begun in an earlier frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from broker import errors
from broker.messages import Frame

_END = b"\n\n"
_ID = re.compile(rb"(\d{1,9})-(\d{1,9})-(\d{1,9})")


class Position(NamedTuple):
    """The last event that a client has: number `event`, from 0, of frame `seq` of `epoch`."""

    epoch: int
    seq: int
    event: int


def last_event(headers: Mapping[bytes, bytes]) -> Position | None:
    """What `Last-Event-ID` says; None where there is none. Raises errors.InvalidRequest for no id of ours."""
    given = headers.get(b"last-event-id", b"").strip()
    if not given:
        return None
    found = _ID.fullmatch(given)
    if found is None:
        raise errors.InvalidRequest(
            "Last-Event-ID must be the id of the last event received, such as 1-17-0, "
            f"not {given.decode('latin-1')!r:.99}"
        )
    return Position(*map(int, found.groups()))


def joins(frame: Frame, after: Position) -> bool:
    """Whether this is the frame that its client read last, so that what follows goes on from there.

    Raises errors.FramesLost when it is a later one: what the client has was read from a worker which was lost
    before the journal had it.
    """
    place, read = (frame.epoch, frame.seq), (after.epoch, after.seq)
    if place > read:
        raise not_there()
    return place == read


def not_there() -> errors.FramesLost:
    return errors.FramesLost(
        "the journal lacks the event that Last-Event-ID names: read from the beginning, without the header"
    )


def numbered(frame: Frame, after: Position | None = None) -> bytes:
    """The frame's payload with an id to each event that ends in it, less what the client has already."""
    *events, rest = frame.payload.split(_END)
    first = 0
    if after is not None and (frame.epoch, frame.seq) <= (after.epoch, after.seq):
        if (frame.epoch, frame.seq) < (after.epoch, after.seq):
            return b""
        first = after.event + 1
    ids = b"\nid: %d-%d-" % (frame.epoch, frame.seq)
    return b"".join([b"%s%s%d\n\n" % (event, ids, n) for n, event in enumerate(events) if n >= first]) + rest
