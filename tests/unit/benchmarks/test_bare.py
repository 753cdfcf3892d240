"""What the benchmark of the journal leaves out is really out, and the rest is as it was."""

from __future__ import annotations

import pytest

from benchmarks import bare
from broker import subjects, tail, topology
from broker.assembler import Assembler
from broker.config import BrokerConfig
from broker.messages import Frame, FrameKind
from ingress import sse
from ops import child


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test leaves out is there again after it."""
    for patches in bare.INSTEAD.values():
        for owner, name, _ in patches:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(child, "PROGRAM", child.PROGRAM)


def captured(stream: str) -> list[str] | None:
    return next(made.subjects for made in topology.streams(BrokerConfig()) if made.name == stream)


def frame(seq: int, kind: FrameKind = FrameKind.DATA) -> Frame:
    return Frame(1, seq, kind, payload=b"data: x\n\n")


def test_nothing_left_out_is_headrace_as_it_is() -> None:
    bare.leave_out("nothing")
    assert captured(subjects.REPLIES) == [subjects.ALL_REPLIES]
    assert Assembler().feed(frame(5)) == []
    assert child.PROGRAM == ("-m", "benchmarks.bare", "nothing"), "started by the launcher all the same"


def test_all_left_out() -> None:
    bare.leave_out(",".join(bare.ALL))
    assert captured(subjects.REPLIES) != [subjects.ALL_REPLIES]
    assert captured(subjects.REQUESTS) == [subjects.ALL_REQUESTS]

    kept = tail.Tail(10, 1000)
    kept.add("out.acme.box.r1", b"frame", now=0)
    assert kept.keys(now=0) == []

    bare_one, ended = Assembler(), Assembler()
    assert bare_one.feed(frame(5)) == [frame(5)], "taken as it comes"
    ended.feed(frame(6, FrameKind.END))
    assert (bare_one.finished, ended.finished) == (False, True)
    assert sse.numbered(frame(1)) == frame(1).payload


def test_children_leave_out_the_same() -> None:
    bare.leave_out("journal")
    assert child.PROGRAM == ("-m", "benchmarks.bare", "journal")


def test_a_part_that_is_no_part_is_refused() -> None:
    with pytest.raises(KeyError):
        bare.leave_out("jornal")


def test_what_is_not_there_any_more_is_not_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bare.INSTEAD, "journal", ((topology, "gone", None),))
    with pytest.raises(AttributeError):
        bare.leave_out("journal")
