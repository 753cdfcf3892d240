"""What an answer's head says of how it was served."""

from __future__ import annotations

from typing import Any

import pytest

from broker.messages import Frame, FrameKind
from ingress import timing


def head(told: Any) -> Frame:
    return Frame(1, 0, FrameKind.HEAD, extra={"timing": told})


def test_all_that_is_known_is_told() -> None:
    told = {"queue": 1.25, "ttft": 20.0, "predicted": 25, "prompt": 1024, "cached": 512}
    assert timing.headers(head(told)) == [
        (b"server-timing", b"queue;dur=1.2, ttft;dur=20.0, predicted;dur=25.0"),
        (b"x-headrace-prefix-hit", b"512/1024"),
    ]


def test_without_a_dispatcher_nothing_was_predicted() -> None:
    assert timing.headers(head({"queue": 1, "prompt": 0, "cached": 0})) == [
        (b"server-timing", b"queue;dur=1.0")
    ]


@pytest.mark.parametrize(
    "told",
    [None, [], "x", {}, {"queue": "1", "ttft": None}, {"queue": -1, "prompt": "9"}, {"queue": float("inf")}],
)
def test_what_is_no_timing_is_left_out(told: Any) -> None:
    assert timing.headers(head(told)) == []


def test_before_the_head_there_is_nothing_to_tell() -> None:
    assert timing.headers(None) == []
