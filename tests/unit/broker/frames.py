"""Frames as an attempt writes them."""

from __future__ import annotations

from hypothesis import strategies as st

from broker.messages import Frame, FrameKind

KINDS = {FrameKind.HEAD, FrameKind.DATA}
SSE = {"headers": {"content-type": "text/event-stream"}}


def attempt(epoch: int, sizes: list[int], ending: FrameKind | None = FrameKind.END) -> list[Frame]:
    """The frames of one run: a beat, a head, data of `sizes` tokens each, and an end."""
    frames = [Frame(epoch, 0, FrameKind.BEAT)]
    off = 0
    for number, size in enumerate(sizes):
        kind = FrameKind.DATA if number else FrameKind.HEAD
        ids = list(range(off, off + size))
        extra = {} if number else SSE
        frames.append(Frame(epoch, number + 1, kind, off, ids, payload=b"%d" % off, extra=extra))
        off += size
    if ending is not None:
        frames.append(Frame(epoch, len(frames), ending, off))
    return frames


def tokens_of(frames: list[Frame]) -> list[int]:
    return [token for frame in frames if frame.kind in KINDS for token in frame.ids]


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=12)
