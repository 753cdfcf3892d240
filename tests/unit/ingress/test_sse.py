"""Event ids: a client that was cut off anywhere goes on with exactly the events that it lacks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.messages import Frame, FrameKind
from ingress import sse


def client(stream: bytes) -> tuple[list[bytes], bytes]:
    """What an SSE client makes of a stream that may break off: the data of whole events, and the last id."""
    *blocks, _ = stream.split(b"\n\n")
    data, last = [], b""
    for block in blocks:
        lines = [line.partition(b": ")[::2] for line in block.split(b"\n")]
        data += [value for name, value in lines if name == b"data"]
        last = next((value for name, value in lines if name == b"id"), last)
    return data, last


def cut(stream: bytes, places: list[int]) -> list[Frame]:
    """The stream as frames, cut at `places`, which leave the end of an event whole."""
    whole = {n + 1 for n in range(len(stream)) if stream[n : n + 2] == b"\n\n"}
    edges = [0, *sorted(set(places) - whole), len(stream)]
    parts = [stream[a:b] for a, b in itertools.pairwise(edges)]
    return [Frame(1 + seq // 4, seq % 4, FrameKind.DATA, payload=part) for seq, part in enumerate(parts)]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8), st.data())
def test_what_was_had_and_what_follows_make_the_whole(values: list[int], data: st.DataObject) -> None:
    stream = b"".join(b"event: e\ndata: %d\n\n" % value for value in values)
    frames = cut(stream, data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=6)))
    sent = b"".join(map(sse.numbered, frames))
    had, last = client(sent[: data.draw(st.integers(0, len(sent)))])
    after = sse.last_event({b"last-event-id": last})
    rest, _ = client(b"".join(sse.numbered(frame, after) for frame in frames))
    assert had + rest == [b"%d" % value for value in values]


def test_every_event_of_a_frame_has_an_id_of_its_own() -> None:
    frame = Frame(2, 7, FrameKind.DATA, payload=b"data: a\n\ndata: b\n\n")
    assert sse.numbered(frame) == b"data: a\nid: 2-7-0\n\ndata: b\nid: 2-7-1\n\n"
    assert sse.numbered(frame, sse.Position(2, 7, 0)) == b"data: b\nid: 2-7-1\n\n"
    assert sse.numbered(frame, sse.Position(2, 7, 1)) == b""
    assert sse.numbered(frame, sse.Position(1, 9, 0)) == sse.numbered(frame)


@pytest.mark.parametrize("given_id", [b"17", b"1-2", b"1-2-x", b"1-2-3-4", b"-1-2-3", b"1-2-" + b"9" * 30])
def test_an_id_that_is_none_of_ours_is_refused(given_id: bytes) -> None:
    with pytest.raises(errors.InvalidRequest, match="Last-Event-ID"):
        sse.last_event({b"last-event-id": given_id})


def test_no_id_is_the_beginning() -> None:
    assert sse.last_event({}) is None
    assert sse.last_event({b"last-event-id": b" "}) is None


def test_a_reply_goes_on_from_the_very_frame_that_was_read() -> None:
    after = sse.Position(1, 7, 0)
    assert [sse.joins(Frame(1, seq, FrameKind.DATA), after) for seq in (6, 7)] == [False, True]
    for later in (Frame(1, 8, FrameKind.DATA), Frame(2, 1, FrameKind.DATA)):
        with pytest.raises(errors.FramesLost, match="Last-Event-ID"):
            sse.joins(later, after)
