"""Frames are put in order, each passed on once, whatever came in between."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import broker.assembler
from broker import errors
from broker.assembler import Assembler
from broker.messages import Frame, FrameKind
from tests.unit.broker.frames import KINDS, SSE, attempt, sizes, tokens_of


@given(sizes, st.data())
def test_duplicates_and_disorder_change_nothing(run: list[int], data: st.DataObject) -> None:
    frames = attempt(1, run)
    again = data.draw(st.lists(st.sampled_from(frames)))
    assembler, seen = Assembler(), []
    for frame in data.draw(st.permutations(frames + again)):
        seen += assembler.feed(frame)
    assert seen == frames
    assert assembler.finished
    assert not assembler.gap


@given(sizes, st.data())
def test_what_is_lost_is_repaired_in_place(run: list[int], data: st.DataObject) -> None:
    frames = attempt(1, run)
    lost = data.draw(st.sets(st.sampled_from(range(len(frames)))))
    assembler, seen = Assembler(), []
    for number, frame in enumerate(frames):
        if number not in lost:
            seen += assembler.feed(frame)
        kept_back = any(k not in lost for k in range(len(seen), number + 1))
        assert assembler.gap == (kept_back and not assembler.finished)
    for frame in frames:  # the journal
        seen += assembler.feed(frame)
    assert seen == frames


@given(sizes, st.integers(0, 12), st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_later_attempt_goes_on_where_the_reader_is(
    run: list[int], cut: int, repeated: int, rng: random.Random
) -> None:
    """A worker dies after `cut` frames, the next goes on, repeating up to some: each token once, one
    head, one end. What the dead one's connection still held comes in between, and is nobody's."""
    whole = attempt(1, run)
    first = whole[:-1][:cut]
    rest = whole[max(min(cut, 2), len(first) - repeated, 1) :]
    second = [Frame(2, 0, FrameKind.BEAT)]
    second += [
        Frame(2, n, f.kind, f.off, f.ids, payload=f.payload, extra=f.extra)
        for n, f in enumerate(rest, start=1)
    ]
    assembler, seen = Assembler(), []
    for frame in first:
        seen += assembler.feed(frame)
    zombie = [Frame(1, len(first) + k, FrameKind.DATA, 99, [1], payload=b"zombie") for k in range(3)]
    seen += assembler.feed(second[0])
    mixed = second[1:]
    for frame in zombie:
        mixed.insert(rng.randrange(len(mixed) + 1), frame)
    for frame in mixed:
        seen += assembler.feed(frame)
    assert tokens_of(seen) == list(range(sum(run)))
    assert [f.payload for f in seen if f.kind in KINDS] == [f.payload for f in whole if f.kind in KINDS]
    assert seen[-1].kind is FrameKind.END
    assert assembler.finished


def test_an_answer_begun_anew_is_never_joined_to_what_was_sent() -> None:
    """After a broker lost its journal nobody knows that the first attempt had come so far."""
    assembler = Assembler()
    for frame in attempt(1, [1, 0, 0], None):
        assembler.feed(frame)
    beat, head, *_ = attempt(2, [1, 0, 0])
    assembler.feed(beat)
    with pytest.raises(errors.FramesLost, match="anew"):
        assembler.feed(head)


def ahead() -> Assembler:
    """A reader who has tokens 0 to 3 of choice 0, and 7 and 8 of choice 1, from the first attempt."""
    assembler = Assembler()
    assembler.feed(Frame(1, 0, FrameKind.HEAD, 0, [0, 1], [[1, 0, [7]]], extra=SSE))
    assembler.feed(Frame(1, 1, FrameKind.DATA, 2, [2]))
    assembler.feed(Frame(1, 2, FrameKind.DATA, 3, [3], [[1, 1, [8]]]))
    assembler.feed(Frame(2, 0, FrameKind.BEAT))
    assert assembler.tokens == {0: 4, 1: 2}
    return assembler


def test_a_reader_who_is_ahead_of_the_journal_gets_nothing_twice() -> None:
    """The next attempt knows what the journal had; its reader had more, of a node that is gone."""
    assembler = ahead()
    assert assembler.feed(Frame(2, 1, FrameKind.DATA, 2, [2])) == []
    assert assembler.feed(Frame(2, 2, FrameKind.DATA, 3, [3], [[1, 1, [8]]])) == []
    other = Frame(2, 3, FrameKind.DATA, 4, [], [[1, 2, [9]]])
    last = Frame(2, 4, FrameKind.DATA, 4, [4])
    tail = Frame(2, 5, FrameKind.DATA, 5, payload=b"usage")
    assert [assembler.feed(frame) for frame in (other, last, tail)] == [[other], [last], [tail]]
    assert assembler.tokens == {0: 5, 1: 3}


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (Frame(2, 1, FrameKind.DATA, 3, [33]), "otherwise"),
        (Frame(2, 1, FrameKind.DATA, 2, [2, 3, 4]), "middle of a frame"),
        (Frame(2, 1, FrameKind.DATA, 3, [3], [[1, 2, [9]]]), "middle of a frame"),
        (Frame(2, 1, FrameKind.DATA, 4, [4], [[1, 3, [9]]]), "goes on at token 3, but 2"),
    ],
)
def test_what_does_not_join_on_is_a_loss(frame: Frame, told: str) -> None:
    with pytest.raises(errors.FramesLost, match=told):
        ahead().feed(frame)


def test_an_answer_that_is_not_streamed_is_passed_on_whole_and_may_begin_anew() -> None:
    assembler = Assembler()
    half = Frame(1, 0, FrameKind.HEAD, 0, [1], payload=b'{"ha', extra={"headers": {"content-type": "json"}})
    assert assembler.feed(half) == []
    assert assembler.feed(Frame(1, 1, FrameKind.DATA, 1, payload=b"lf")) == []
    beat, head, end = Frame(2, 0, FrameKind.BEAT), Frame(2, 1, FrameKind.HEAD), Frame(2, 2, FrameKind.END)
    assert [assembler.feed(frame) for frame in (beat, head, end)] == [[beat], [], [head, end]]


def test_a_whole_answer_that_fails_at_its_end_has_only_failed() -> None:
    assembler = Assembler()
    assembler.feed(Frame(1, 0, FrameKind.HEAD))
    error = Frame(1, 1, FrameKind.ERROR)
    assert assembler.feed(error) == [error]


@given(
    st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=4),
    st.data(),
)
def test_any_interleaving_gives_each_token_once_in_order_or_says_that_frames_are_lost(
    runs: list[tuple[list[int], bool]], data: st.DataObject
) -> None:
    frames = [
        frame
        for epoch, (run, ends) in enumerate(runs, start=1)
        for frame in attempt(epoch, run, FrameKind.END if ends else None)
    ]
    drawn = data.draw(st.lists(st.sampled_from(frames), max_size=60))
    assembler, seen = Assembler(), []
    lost = False
    try:
        for frame in drawn:
            was_finished = assembler.finished
            ready = assembler.feed(frame)
            assert not (was_finished and ready)
            seen += ready
    except errors.FramesLost:
        lost = True
    got = tokens_of(seen)
    assert got == list(range(len(got)))
    assert [f.kind for f in seen].count(FrameKind.HEAD) <= 1
    # An attempt's first word may stand before the end of the one before it.
    said = [(f.epoch, f.seq) for f in seen if f.kind is not FrameKind.BEAT]
    assert said == sorted(set(said))
    assert len({(f.epoch, f.seq) for f in seen}) == len(seen)
    assert sum(f.kind is FrameKind.END for f in seen) == (assembler.finished and not lost)


def test_a_frame_may_name_a_choice_several_times() -> None:
    """Outputs that came together are one frame, and its whole answer may be read from the journal."""
    choices: list[list[Any]] = [[1, 0, [7]], [1, 1, [8, 9]]]
    for head in (Frame(1, 0, FrameKind.HEAD, 0, [5, 6], choices, b"x", extra) for extra in (SSE, {})):
        end = Frame(1, 1, FrameKind.END, 2)
        assembler = Assembler()
        assert assembler.feed_all([head, end]) == [head, end]
        assert Assembler().rest([head, end]) == [head, end]
        assert assembler.tokens == ({0: 2, 1: 3} if head.extra else {})


def test_an_attempt_that_starts_past_what_was_seen_is_a_loss() -> None:
    assembler = Assembler()
    for frame in attempt(1, [2, 2], None):
        assembler.feed(frame)
    assert assembler.feed(Frame(2, 0, FrameKind.BEAT)) == []
    with pytest.raises(errors.FramesLost, match="goes on at token 6, but 4 were seen"):
        assembler.feed(Frame(2, 1, FrameKind.DATA, off=6, ids=[6]))


def test_a_gap_in_an_attempt_that_is_over_is_no_gap() -> None:
    assembler = Assembler()
    first = attempt(1, [1, 1, 1], None)
    assembler.feed(first[0])
    assembler.feed(first[3])
    assert assembler.gap
    second = attempt(2, [1, 1, 1])
    assert assembler.feed(second[0]) == [second[0]]
    assert not assembler.gap


@given(sizes, st.integers(1, 12), st.integers(1, 3), st.randoms(use_true_random=False))
def test_an_attempt_that_was_given_up_may_come_to_its_end_while_the_next_has_said_nothing(
    run: list[int], cut: int, beats: int, rng: random.Random
) -> None:
    """Its worker was only slow, and acked the request: nobody else would go on with it."""
    whole = attempt(1, run)
    cut = min(cut, len(whole) - 1)
    rest = whole[cut:] + [Frame(epoch, 0, FrameKind.BEAT) for epoch in range(2, 2 + beats)]
    rng.shuffle(rest)
    assembler, seen = Assembler(), []
    for frame in whole[:cut] + rest:
        seen += assembler.feed(frame)
    assert [f.payload for f in seen if f.kind in KINDS] == [f.payload for f in whole if f.kind in KINDS]
    assert seen[-1].kind is FrameKind.END
    assert not assembler.gap


def test_but_not_once_the_next_has_said_something_and_not_to_an_error() -> None:
    assembler = Assembler()
    for frame in [*attempt(1, [1, 1], None), Frame(2, 0, FrameKind.BEAT)]:
        assembler.feed(frame)
    late = [Frame(1, 3, FrameKind.DATA, 2, [2]), Frame(1, 5, FrameKind.END)]
    assert [assembler.feed(frame) for frame in late] == [[], []]
    assert not assembler.gap
    assert assembler.feed(Frame(1, 4, FrameKind.ERROR)) == []
    new = Frame(2, 1, FrameKind.DATA, 2, [22])
    assert assembler.feed(new) == [new]
    assert assembler._held == {}
    assert assembler.feed(Frame(1, 4, FrameKind.DATA, 3, [3])) == []
    assert not assembler.finished


def test_beats_are_passed_on_until_the_head_only() -> None:
    assembler = Assembler()
    first, second = attempt(1, []), attempt(2, [1])
    assert assembler.feed(first[0]) == [first[0]]
    assert assembler.feed(second[0]) == [second[0]]
    assert assembler.feed(second[1]) == [second[1]]
    assert assembler.feed(Frame(3, 0, FrameKind.BEAT)) == []
    assert assembler.epoch == 3


@pytest.mark.parametrize("kind", [FrameKind.END, FrameKind.ERROR])
def test_nothing_follows_a_terminal_frame(kind: FrameKind) -> None:
    assembler = Assembler()
    end = Frame(1, 0, kind)
    assert assembler.feed(end) == [end]
    assert assembler.feed(Frame(1, 1, FrameKind.DATA)) == []
    assert assembler.feed(Frame(2, 0, FrameKind.BEAT)) == []
    assert not assembler.gap


def test_what_waits_behind_a_gap_is_bounded() -> None:
    assembler = Assembler()
    for seq in range(1, broker.assembler._HELD_LIMIT + 1):
        assert assembler.feed(Frame(1, seq, FrameKind.DATA)) == []
    with pytest.raises(errors.FramesLost, match="too many"):
        assembler.feed(Frame(1, broker.assembler._HELD_LIMIT + 1, FrameKind.DATA))


@given(sizes, st.integers(0, 12), st.data())
def test_the_rest_of_a_reply_that_was_put_in_order_anew(
    run: list[int], cut: int, data: st.DataObject
) -> None:
    """Each frame of the old order once, whatever had come of it, with frames without tokens between them."""
    frames = []
    for frame in attempt(1, run):
        frames.append(frame)
        if frame.kind in KINDS:
            off = frame.off + len(frame.ids)
            frames += [Frame(1, 0, FrameKind.DATA, off)] * data.draw(st.integers(0, 2))
    frames = [
        Frame(1, n, f.kind, f.off, f.ids, payload=f.payload, extra=f.extra) for n, f in enumerate(frames)
    ]
    had, whole = Assembler(), Assembler()
    seen = had.feed_all(frames[:-1][:cut])
    rest = had.rest(whole.feed_all(frames))
    said = [frame for frame in frames if frame.kind is not FrameKind.BEAT]
    assert [frame for frame in seen + rest if frame.kind is not FrameKind.BEAT] == said
