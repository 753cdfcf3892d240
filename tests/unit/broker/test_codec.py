from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import codec, errors
from broker.messages import Frame, FrameKind

naturals = st.integers(0, 2**53)
ids = st.lists(st.integers(0, 2**31))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
OWN = {"epoch", "seq", "kind", "off", "ids", "choices"}
frames = st.builds(
    Frame,
    epoch=st.integers(1, 2**31),
    seq=naturals,
    kind=st.sampled_from(FrameKind),
    off=naturals,
    ids=ids,
    choices=st.lists(st.tuples(naturals, naturals, ids).map(list), max_size=3),
    payload=st.binary(),
    extra=st.dictionaries(st.text().filter(lambda key: key not in OWN), json_values, max_size=4),
)


@given(frames)
def test_frames_round_trip(frame: Frame) -> None:
    assert codec.decode(codec.encode(frame)) == frame


@given(frames)
def test_the_meta_is_one_line_of_json(frame: Frame) -> None:
    line, _, payload = codec.encode(frame).partition(b"\n")
    assert payload == frame.payload
    assert orjson.loads(line)["kind"] == frame.kind


def test_fields_that_hold_their_default_stay_out() -> None:
    frame = Frame(epoch=1, seq=4, kind=FrameKind.DATA, off=3, payload=b"data: {}\n\n")
    assert codec.encode(frame) == b'{"epoch":1,"seq":4,"kind":"data","off":3}\ndata: {}\n\n'


def test_unknown_meta_is_kept_with_or_without_an_offset() -> None:
    assert codec.decode(b'{"epoch":1,"seq":0,"kind":"end","later":1}\n').extra == {"later": 1}
    assert codec.decode(b'{"epoch":1,"seq":0,"kind":"end","off":7,"later":1}\n').extra == {"later": 1}


def _readable(data: bytes) -> Frame | None:
    try:
        return codec.decode(data)
    except errors.MalformedMessage:
        return None


@given(st.binary() | json_values.map(lambda value: orjson.dumps(value) + b"\n"))
def test_garbage_is_malformed_and_nothing_else(data: bytes) -> None:
    assert _readable(data) is None


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "epoch": naturals | json_values,
            "seq": naturals | json_values,
            "kind": st.sampled_from(FrameKind) | json_values,
            "off": naturals | json_values,
            "ids": ids | json_values,
            "choices": json_values,
        },
    )
)
def test_what_decodes_has_the_types_it_says(meta: dict[str, Any]) -> None:
    frame = _readable(orjson.dumps(meta) + b"\npayload")
    if frame is not None:
        assert all(type(number) is int for number in (frame.epoch, frame.seq, frame.off))
        assert all(type(ids) is list for ids in (frame.ids, frame.choices))
        assert frame.payload == b"payload"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b'{"epoch":1,"seq":0,"kind":"data","off":0}',
        b'{"epoch":"1","seq":0,"kind":"data","off":0}\n',
        b'{"epoch":1,"seq":0.5,"kind":"data","off":0}\n',
        b'{"epoch":true,"seq":0,"kind":"data","off":0}\n',
        b'{"epoch":1,"seq":0,"kind":"tail","off":0}\n',
        b'{"epoch":1,"seq":0,"kind":"data","off":"3"}\n',
        b'{"epoch":1,"seq":0,"kind":"data","ids":"12"}\n',
        b'{"seq":0,"kind":"data","off":0}\n',
        b'[1,0,"data"]\n',
        b"\xff\xfe\n",
    ],
)
def test_each_way_to_be_no_frame(data: bytes) -> None:
    with pytest.raises(errors.MalformedMessage):
        codec.decode(data)
