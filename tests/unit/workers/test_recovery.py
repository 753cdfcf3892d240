"""What the journal has of a request whose worker was lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.messages import Frame, FrameKind
from tests.unit.broker.frames import attempt, sizes, tokens_of
from workers import recovery


@given(sizes=sizes)
def test_all_tokens_of_a_whole_journal_count(sizes: list[int]) -> None:
    frames = attempt(1, sizes, ending=None)
    assert recovery.past(frames).ids.get(0, []) == tokens_of(frames)


@given(sizes=sizes, data=st.data())
def test_what_stands_behind_a_hole_counts_for_nothing(sizes: list[int], data: st.DataObject) -> None:
    """No reader passes on what comes behind a gap: who had the missing frames has published them again."""
    frames = attempt(1, sizes, ending=None)
    missing = data.draw(st.integers(1, len(frames) - 1))
    past = recovery.past(frames[:missing] + frames[missing + 1 :])
    assert past.ids.get(0, []) == tokens_of(frames[:missing])


def beat(epoch: int, seq: int, left: str = "") -> Frame:
    return Frame(epoch, seq, FrameKind.BEAT, extra={"worker": "w1"} | ({"left": left} if left else {}))


def test_only_attempts_that_all_left_without_a_word_are_mute() -> None:
    first, second = beat(1, 0, "passed on"), beat(2, 1, "drained")
    assert recovery.mute([], 1)
    assert recovery.mute([beat(0, 0), first], 2)
    assert recovery.mute([first, beat(2, 0), second], 3)
    assert not recovery.mute([], 2), "the first may have said what the journal lacks"
    assert not recovery.mute([beat(1, 0)], 2), "its worker died, perhaps while it answered"
    assert not recovery.mute([first, second], 3), "a frame is missing before its last"
    assert not recovery.mute([*attempt(1, [2, 2], ending=None), beat(1, 2, "drained")], 2)
    assert not recovery.mute([second], 3)


def test_what_was_only_passed_on_counts_as_no_hand_back() -> None:
    frames = [beat(1, 0, recovery.PASSED_ON), beat(2, 0, "drained"), beat(3, 0, "all in use")]
    assert recovery.past(frames).left == 2


def test_without_its_first_frame_a_reply_is_lost() -> None:
    with pytest.raises(errors.FramesLost):
        recovery.past(attempt(1, [2, 2], ending=None)[1:])


def test_an_answer_with_its_end_needs_nothing() -> None:
    assert recovery.past(attempt(1, [2, 2], ending=FrameKind.END)).ended


def event(created: int, choice: int, text: str) -> bytes:
    return b'data: {"id":"r1","created":%d,"index":%d,"text":"%s"}\n\n' % (created, choice, text.encode())


def test_another_choice_may_speak_first_when_an_answer_goes_on() -> None:
    """Its opening comes in one piece with a new token then, and is not said again."""
    opening = [b"".join(event(created, choice, "") for choice in range(3)) for created in (7, 8)]
    joint = recovery.Joint(recovery.Past(streamed=True, ids={0: [5]}, body=opening[0] + event(7, 0, "a")))
    tokens = [(2, [9])]
    assert joint.feed(opening[1] + event(8, 2, "c"), tokens) == event(7, 2, "c")
    assert tokens == [(2, [9])]
    known = [(0, [5])]
    assert joint.feed(event(8, 0, "a"), known) == b""
    assert (known, joint.reached) == ([], True)
    assert joint.feed(event(8, 1, "b"), [(1, [6])]) == event(7, 1, "b")


def numbered(number: int, text: str) -> bytes:
    return b'data: {"type":"response.output_text.delta","sequence_number":%d,"delta":"%s"}\n\n' % (
        number,
        text.encode(),
    )


def test_events_are_numbered_on_however_many_brought_the_tokens_before() -> None:
    """The first run merged its outputs, or the second did."""
    for merged, single in ((1, 3), (3, 1)):
        past = recovery.Past(
            streamed=True,
            ids={0: [5, 6, 7]},
            body=b"".join(numbered(n, "x" * (3 // merged)) for n in range(merged)),
        )
        joint = recovery.Joint(past)
        for n in range(single):
            assert joint.feed(numbered(n, "x" * (3 // single)), [(0, [5, 6, 7][: 3 // single])]) == b""
        for n in range(9):
            text = '\\"sequence_number\\":4'  # a string that holds JSON is escaped, and stays as it is
            assert joint.feed(numbered(single + n, text), [(0, [8])]) == numbered(merged + n, text)
