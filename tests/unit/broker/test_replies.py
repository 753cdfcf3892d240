"""Frames written once, read exactly once and in order, whatever the way does to them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from broker import base, codec, errors, replies, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Attempt, DeadLetter, Frame, FrameKind
from broker.replies import Assembler, Mailbox, Stream, Writer

SUBJECT = "out.acme.box.r1"

KINDS = {FrameKind.HEAD, FrameKind.DATA}


def attempt(epoch: int, sizes: list[int], ending: FrameKind | None = FrameKind.END) -> list[Frame]:
    """The frames of one run: a beat, a head, data of `sizes` tokens each, and an end."""
    frames = [Frame(epoch, 0, FrameKind.BEAT)]
    off = 0
    for number, size in enumerate(sizes):
        kind = FrameKind.DATA if number else FrameKind.HEAD
        ids = list(range(off, off + size))
        extra = {} if number else {"headers": {"content-type": "text/event-stream"}}
        frames.append(Frame(epoch, number + 1, kind, off, ids, payload=b"%d" % off, extra=extra))
        off += size
    if ending is not None:
        frames.append(Frame(epoch, len(frames), ending, off))
    return frames


def tokens(frames: list[Frame]) -> list[int]:
    return [token for frame in frames if frame.kind in KINDS for token in frame.ids]


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=12)


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
    assert tokens(seen) == list(range(sum(run)))
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


SSE = {"headers": {"content-type": "text/event-stream"}}


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
    got = tokens(seen)
    assert got == list(range(len(got)))
    assert [f.kind for f in seen].count(FrameKind.HEAD) <= 1
    assert [(f.epoch, f.seq) for f in seen] == sorted({(f.epoch, f.seq) for f in seen})
    assert sum(f.kind is FrameKind.END for f in seen) == (assembler.finished and not lost)


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
    for seq in range(1, replies._HELD_LIMIT + 1):
        assert assembler.feed(Frame(1, seq, FrameKind.DATA)) == []
    with pytest.raises(errors.FramesLost, match="too many"):
        assembler.feed(Frame(1, replies._HELD_LIMIT + 1, FrameKind.DATA))


# Over a broker


class Deafening(MemoryBroker):
    """Frames whose numbers are in `lost` reach no subscriber; those in `forgotten` no journal either; those
    written while `unkept` no journal."""

    def __init__(self) -> None:
        super().__init__(BrokerConfig())
        self.lost: set[int] = set()
        self.forgotten: set[int] = set()
        self.unkept = False
        self.refused: list[str] = []
        self.asked = 0
        self.kept: list[bytes] = []  # what the writer publishes once more when asked

    async def publish(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        if subject == subjects.again(SUBJECT):
            self.asked += 1
            for frame in self.kept:
                await super().publish(SUBJECT, frame)
            return
        number = codec.decode(data).seq
        if number in self.forgotten:
            return
        if self.unkept:
            self.hub.route(base.Message(subject, data, headers))
            return
        if number in self.lost:
            self.hub.store(subject, data, headers)
            return
        await super().publish(subject, data, headers, reply)

    async def read(self, stream: str, subject: str, start: int = 1, limit: int = 1000) -> list[base.Record]:
        if self.refused:
            raise errors.Unavailable(self.refused.pop())
        return await super().read(stream, subject, start, limit)


@pytest.fixture
def broker(anyio_backend: object) -> Deafening:
    return Deafening()


@pytest.fixture
async def stream(broker: Deafening) -> AsyncIterator[Stream]:
    async with Mailbox(broker, "box") as mailbox:
        yield mailbox.open("acme", "r1")


async def write(broker: MemoryBroker, count: int = 4, epoch: int = 1, end: bool = True) -> None:
    """A beat, a head, `count` data frames of a token each, and an end."""
    writer = Writer(broker, SUBJECT, epoch)
    await writer.beat("w1")
    await writer.head(200, {"content-type": "text/event-stream"}, "w1", b"h", [])
    for token in range(count):
        await writer.data(b"%d" % token, [(0, [token])])
    if end:
        await writer.end({"completion_tokens": count})


async def read(stream: Stream, silence: float = 5.0) -> list[Frame]:
    frames: list[Frame] = []
    async with asyncio.timeout(5):
        while not stream.finished:
            frames += await stream.next(silence)
    return frames


async def test_frames_as_the_writer_numbers_them(broker: Deafening, stream: Stream) -> None:
    writer = Writer(broker, SUBJECT, 3)
    await writer.beat("w1")
    await writer.head(200, {"content-type": "x"}, "w1", b"a", [(0, [7]), (1, [8, 9]), (0, [10])])
    await writer.data(b"b", [(1, [11]), (0, [12])])
    await writer.data(b"c", [])
    await writer.end({"completion_tokens": 6})
    beat, head, first, second, end = await read(stream)
    assert [f.seq for f in (beat, head, first, second, end)] == [0, 1, 2, 3, 4]
    assert {f.epoch for f in (beat, head, first, second, end)} == {3}
    assert beat.extra["worker"] == "w1"
    assert (head.off, head.ids, head.choices) == (0, [7, 10], [[1, 0, [8, 9]]])
    assert (head.extra["status"], head.extra["headers"]) == (200, {"content-type": "x"})
    assert (first.off, first.ids, first.choices) == (2, [12], [[1, 2, [11]]])
    assert (second.off, second.ids, second.payload) == (3, [], b"c")
    assert (end.kind, end.off, end.extra["usage"]) == (FrameKind.END, 3, {"completion_tokens": 6})
    assert writer.frames == 5


async def test_an_error_frame_tells_all_that_the_error_knows(broker: Deafening, stream: Stream) -> None:
    await Writer(broker, SUBJECT, 1).error(errors.Overloaded("later", retry_after=1.5))
    (frame,) = await read(stream)
    assert frame.kind is FrameKind.ERROR
    assert {key: frame.extra[key] for key in ("status", "code", "retry_after")} == {
        "status": 429,
        "code": "overloaded",
        "retry_after": 1.5,
    }
    assert orjson.loads(frame.payload)["error"]["message"] == "later"


@pytest.mark.parametrize("size", [2**20 - 200, 2**20, 5 * 2**20])
async def test_an_answer_too_large_for_one_frame_goes_out_in_several(
    broker: Deafening, stream: Stream, size: int
) -> None:
    body = random.Random(1).randbytes(size)
    writer = Writer(broker, SUBJECT, 1)
    await writer.head(200, {}, "w1", body, [(0, [1, 2, 3])])
    await writer.end({})
    frames = await read(stream)
    assert b"".join(f.payload for f in frames) == body
    assert [f.seq for f in frames] == list(range(len(frames)))
    assert [token for f in frames for token in f.ids] == [1, 2, 3]


async def test_a_frame_that_can_not_be_sent_takes_no_number(broker: Deafening, stream: Stream) -> None:
    writer = Writer(broker, SUBJECT, 1)
    with pytest.raises(errors.TooLarge):
        await writer.data(b"x", [(0, list(range(10**9, 10**9 + 200_000)))])
    await writer.error(errors.TooLarge("too much"))
    assert [f.kind for f in await read(stream)] == [FrameKind.ERROR]


@pytest.mark.parametrize("lost", [{0}, {1}, {3}, {1, 2, 4}, {0, 1, 2, 3, 4, 5}])
async def test_a_gap_is_read_back_from_the_journal(broker: Deafening, stream: Stream, lost: set[int]) -> None:
    broker.lost = lost
    await write(broker)
    frames = await read(stream)
    assert [f.seq for f in frames] == [0, 1, 2, 3, 4, 5, 6]
    assert tokens(frames) == [0, 1, 2, 3]


@pytest.mark.parametrize("kept", [0, 2, 5])
async def test_a_lost_tail_is_noticed_in_the_silence(broker: Deafening, stream: Stream, kept: int) -> None:
    broker.lost = set(range(kept, 7))
    await write(broker)
    frames = await read(stream, silence=0.02)
    assert [f.seq for f in frames] == [0, 1, 2, 3, 4, 5, 6]


async def test_a_lost_answer_is_noticed_behind_a_late_note(broker: Deafening, stream: Stream) -> None:
    """Who asked heard nothing of a worker, and noted that the request waits: the note is the newest frame."""
    broker.lost = set(range(7))
    await write(broker)
    broker.lost = set()
    await replies.note_queued(broker, SUBJECT, 1)
    assert [f.extra.get("queued") for f in await stream.next(0.02)] == [1]
    frames = await read(stream, silence=0.02)
    assert [f.seq for f in frames] == [0, 1, 2, 3, 4, 5, 6]


async def test_an_end_that_a_later_attempt_outran_is_found_in_the_silence(
    broker: Deafening, stream: Stream
) -> None:
    """The first attempt's end came to the journal before the next one began, and to its reader after it."""
    broker.lost = {4, 5, 6}
    await write(broker)
    broker.lost = set()
    await Writer(broker, SUBJECT, 2).beat("w2")
    broker.unkept = True
    for late in (Frame(1, 4, FrameKind.DATA, 2, [2]), Frame(1, 6, FrameKind.END)):
        await broker.publish(SUBJECT, codec.encode(late))
    frames = await read(stream, silence=0.02)
    assert tokens(frames) == [0, 1, 2, 3]
    assert frames[-1].kind is FrameKind.END


async def test_the_journal_is_not_read_again_and_again_in_a_silence(
    broker: Deafening, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(broker, count=2, end=False)
    await Writer(broker, SUBJECT, 2).beat("w2")
    read, calls = broker.read, []

    async def counted(*of: Any, **more: Any) -> list[base.Record]:
        calls.append(of)
        return await read(*of, **more)

    monkeypatch.setattr(broker, "read", counted)
    for _ in range(5):
        await stream.next(0.01)
    assert len(calls) == 1
    assert not stream.finished


async def test_the_first_word_of_an_attempt_that_comes_behind_the_end_begins_nothing(
    broker: Deafening, stream: Stream
) -> None:
    """The first worker was cut off with all that it had said; the second answered; then the first is back."""
    for epoch in (2, 1):
        writer = Writer(broker, SUBJECT, epoch, request=7)
        await writer.head(200, SSE["headers"], f"w{epoch}", b"%d" % epoch, [(0, [1])])
        if epoch == 2:
            await writer.end({})
    async with replies.following(broker, SUBJECT) as late:
        assert [f.payload for f in await late.begin()] == [b"2", b""]
        assert late.finished
    newer = Writer(broker, SUBJECT, 1, request=8)
    await newer.head(200, SSE["headers"], "w3", b"new", [(0, [1])])
    async with replies.following(broker, SUBJECT) as late:
        assert [f.payload for f in await late.begin()] == [b"new"]


async def test_a_copy_of_the_journal_that_lags_is_looked_at_again(
    broker: Deafening, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(broker, count=2, end=False)
    await stream.next(0.01)
    broker.lost = set(range(10))
    await Writer(broker, SUBJECT, 2).end({})
    read, lags = broker.read, [True]

    async def lagging(*of: Any, **more: Any) -> list[base.Record]:
        records = await read(*of, **more)
        return records[:-1] if lags and lags.pop() else records

    monkeypatch.setattr(broker, "read", lagging)
    assert (await read_to_end(stream))[-1].kind is FrameKind.END


async def read_to_end(stream: Stream) -> list[Frame]:
    return await read(stream, silence=0.02)


async def test_what_came_while_the_connection_was_broken_is_looked_for_at_once(broker: Deafening) -> None:
    async with Mailbox(broker, "box") as mailbox:
        stream = mailbox.open("acme", "r1")
        await write(broker, count=1, end=False)
        await stream.next(5)
        broker.lost = {3}
        waiting = asyncio.create_task(stream.next(60))
        await asyncio.sleep(0)
        await broker.publish(SUBJECT, codec.encode(Frame(1, 3, FrameKind.END)))
        broker.reconnected()
        assert [f.kind for f in await asyncio.wait_for(waiting, 5)] == [FrameKind.END]


async def test_a_reply_whose_repetition_broke_off_has_not_begun_anew(
    broker: Deafening, stream: Stream
) -> None:
    await write(broker)
    first, *_ = await broker.read(subjects.REPLIES, SUBJECT)
    await broker.publish(SUBJECT, first.data)
    async with replies.following(broker, SUBJECT) as late:
        assert [f.seq for f in await late.begin()] == [0, 1, 2, 3, 4, 5, 6]
        assert late.finished


async def test_silence_is_silence_when_nothing_was_said(stream: Stream) -> None:
    assert await stream.next(0.01) == []
    assert not stream.finished


async def test_a_gap_that_the_journal_does_not_fill_is_filled_by_its_writer(
    broker: Deafening, stream: Stream
) -> None:
    broker.forgotten = {3}
    await write(broker)
    broker.kept = [codec.encode(Frame(1, n, FrameKind.DATA, n - 2, [n - 2])) for n in (2, 3, 4)]
    assert tokens(await read(stream)) == [0, 1, 2, 3]
    assert broker.asked == 1


async def test_a_gap_that_nobody_fills_is_a_loss(
    broker: Deafening, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "_LAG", 0.3)
    broker.forgotten = {3}
    await write(broker)
    with pytest.raises(errors.FramesLost, match="no longer has them"):
        await read(stream, silence=0.02)
    assert broker.asked >= 2


async def test_the_end_of_a_lost_attempt_is_read_back_though_the_next_one_is_here(
    broker: Deafening, stream: Stream
) -> None:
    broker.lost = {4, 5}
    await write(broker, count=4, end=False)
    broker.lost = set()
    second = Writer(broker, SUBJECT, 2)
    await second.beat("w2")
    second.go_on({0: 4})
    await second.data(b"4", [(0, [4])])
    await second.end({})
    frames = await read(stream, silence=0.02)
    assert tokens(frames) == [0, 1, 2, 3, 4]
    assert [frame.epoch for frame in frames] == [1, 1, 1, 1, 1, 1, 2, 2]


async def test_a_reader_who_has_what_the_journal_lost_goes_on_with_what_is_new(
    broker: Deafening, stream: Stream
) -> None:
    """All that the first attempt said was lost with the journal's leader; the next begins anew."""
    broker.unkept = True
    await write(broker, count=4, end=False)
    broker.unkept = False
    frames = [frame for _ in range(2) for frame in await stream.next(0.02)]
    assert tokens(frames) == [0, 1, 2, 3]
    second = Writer(broker, SUBJECT, 2)
    await second.beat("w2")
    await second.head(200, SSE["headers"], "w2", b"role", [])
    await second.data(b"01", [(0, [0, 1])])
    await second.data(b"2", [(0, [2])])
    assert await stream.next(0.02) == []
    await second.data(b"345", [(0, [3])])
    await second.data(b"45", [(0, [4, 5])])
    await second.data(b"finish", [])
    await second.end({})
    frames += await read(stream, silence=0.02)
    assert tokens(frames) == [0, 1, 2, 3, 4, 5]
    assert [frame.payload for frame in frames[-3:]] == [b"45", b"finish", b""]


async def test_a_reader_is_never_given_another_text_behind_what_the_journal_lost(
    broker: Deafening, stream: Stream
) -> None:
    broker.unkept = True
    await write(broker, count=4, end=False)
    broker.unkept = False
    await stream.next(0.02)
    second = Writer(broker, SUBJECT, 2)
    await second.head(200, SSE["headers"], "w2", b"", [])
    await second.data(b"other", [(0, [0, 1, 7])])
    await second.data(b"text", [(0, [8, 9])])
    with pytest.raises(errors.FramesLost, match="otherwise than it was passed on"):
        await read(stream, silence=0.02)


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
    seen = [new for frame in frames[:-1][:cut] for new in had.feed(frame)]
    rest = had.rest([new for frame in frames for new in whole.feed(frame)])
    said = [frame for frame in frames if frame.kind is not FrameKind.BEAT]
    assert [frame for frame in seen + rest if frame.kind is not FrameKind.BEAT] == said


async def test_so_is_one_before_a_lost_tail(
    broker: Deafening, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "_LAG", 0.3)
    broker.forgotten, broker.lost = {3}, {4, 5, 6}
    await write(broker)
    with pytest.raises(errors.FramesLost, match="no longer has them"):
        await read(stream, silence=0.02)


async def test_a_journal_that_does_not_answer_is_asked_again(broker: Deafening, stream: Stream) -> None:
    broker.lost, broker.refused = {2}, ["later", "later"]
    await write(broker)
    frames = await read(stream, silence=0.02)
    assert tokens(frames) == [0, 1, 2, 3]
    assert not broker.refused


async def test_wake_ends_the_wait(stream: Stream) -> None:
    waiting = asyncio.create_task(stream.next(60.0))
    await asyncio.sleep(0)
    stream.wake()
    assert await asyncio.wait_for(waiting, 5) == []


async def test_what_is_no_frame_is_told_to_the_reader(broker: Deafening, stream: Stream) -> None:
    await MemoryBroker.publish(broker, SUBJECT, b"garbage")
    with pytest.raises(errors.MalformedMessage):
        await stream.next(5.0)


# Readers who are behind


async def numbered(broker: MemoryBroker, count: int, start: int = 0, end: bool = True) -> None:
    """Frames `start` to `count` of a reply, of some 1 kB each, and its end."""
    extra = {"status": 200, "worker": "w", "at": 1.0, **SSE}
    for number in range(start, count):
        kind = FrameKind.DATA if number else FrameKind.HEAD
        frame = Frame(1, number, kind, number, [number], payload=b"%d;" % number + b"x" * 1000)
        frame.extra = {} if number else extra
        await MemoryBroker.publish(broker, SUBJECT, codec.encode(frame))
        await asyncio.sleep(0)
    if end:
        await MemoryBroker.publish(broker, SUBJECT, codec.encode(Frame(1, count, FrameKind.END, count)))
    await asyncio.sleep(0)


async def test_what_waits_for_a_reader_is_bounded_and_read_back_in_pages(broker: Deafening) -> None:
    async with replies.following(broker, SUBJECT, max_unread=20_000) as stream:
        await numbered(broker, 1000)
        assert stream.overflows > 1
        assert stream.unread <= 22_000
        pages = [await stream.next(0.02)]
        while not stream.finished:
            pages.append(await stream.next(0.02))
    frames = [frame for page in pages for frame in page]
    assert tokens(frames) == list(range(1000))
    assert max(map(len, pages)) <= replies._PAGE


async def test_who_comes_late_gets_pages_while_more_comes(broker: Deafening) -> None:
    async with replies.following(broker, SUBJECT, max_unread=20_000) as stream:
        await numbered(broker, 600)
        frames = await stream.begin()
        assert len(frames) == replies._PAGE
        while not stream.finished:
            page = await stream.next(0.02)
            assert len(page) <= replies._PAGE
            frames += page
    assert tokens(frames) == list(range(600))


async def test_what_is_dropped_while_the_journal_is_read_is_read_too(
    broker: Deafening, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, later = broker.read, [numbered(broker, 300, 100)]

    async def reading(*args: Any, **kwargs: Any) -> Any:
        found = await read(*args, **kwargs)
        if later:
            await later.pop()
        return found

    async with replies.following(broker, SUBJECT, max_unread=20_000) as stream:
        await numbered(broker, 100, end=False)
        monkeypatch.setattr(broker, "read", reading)
        frames: list[Frame] = []
        while not stream.finished:
            frames += await stream.next(0.02)
        assert stream.overflows > 5
    assert tokens(frames) == list(range(300))


async def test_a_journal_that_cannot_be_read_leaves_its_reader_waiting(
    broker: Deafening, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, refusals = broker.read, [errors.Unavailable("later"), errors.Unavailable("later")]

    async def reading(*args: Any, **kwargs: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await read(*args, **kwargs)

    monkeypatch.setattr(broker, "read", reading)
    async with replies.following(broker, SUBJECT, max_unread=20_000) as stream:
        await numbered(broker, 100)
        frames = [await stream.next(0.02), await stream.next(0.02)]
        assert frames == [[], []]
        whole: list[Frame] = []
        while not stream.finished:
            whole += await stream.next(0.02)
    assert tokens(whole) == list(range(100))


async def test_a_mailbox_sorts_by_request_and_forgets_the_closed(broker: Deafening) -> None:
    async with Mailbox(broker, "box") as mailbox:
        one, two = mailbox.open("acme", "r1"), mailbox.open("a.b *", "r>1")
        await Writer(broker, one.subject, 1).data(b"one", [])
        await Writer(broker, two.subject, 1).data(b"two", [])
        await Writer(broker, "out.acme.box.stranger", 1).data(b"three", [])
        assert [f.payload for f in await one.next(5.0)] == [b"one"]
        assert [f.payload for f in await two.next(5.0)] == [b"two"]
        with pytest.raises(errors.DuplicateRequest):
            mailbox.open("acme", "r1")
        one.close()
        one.close()
        assert len(mailbox) == 1
        mailbox.open("acme", "r1")


# Dead letters


async def letters(broker: MemoryBroker) -> list[DeadLetter]:
    records = await broker.read(subjects.DEAD, subjects.ALL_DEAD)
    return [DeadLetter.model_validate_json(record.data) for record in records]


FAULT = errors.MalformedMessage("no path")


async def test_a_dead_letter_keeps_the_message_and_answers_it(anyio_backend: object) -> None:
    broker = MemoryBroker()
    headers = {"Reply-To": SUBJECT, "Odd": "one"}
    history = (Attempt(epoch=1, worker="w1", at_ms=1, what="worker lost"),)
    await replies.dead_letter(broker, "req.llama.standard.acme.llama", headers, b"\xff", FAULT, 2, history)
    (letter,) = await letters(broker)
    assert letter.history == history
    assert (letter.reason, letter.message, letter.headers) == ("malformed_message", "no path", headers)
    assert letter.body == "/w=="
    frame = await replies.last_frame(broker, SUBJECT, 0)
    assert frame is not None
    assert (frame.epoch, frame.kind, frame.extra["status"]) == (2, FrameKind.ERROR, 400)


@pytest.mark.parametrize(
    ("subject", "reply_to"),
    [
        ("req.llama.standard.acme.llama", ""),
        ("req.llama.standard.acme.llama", "out.acme.*.r1"),
        ("req.llama.standard.acme.llama", "req.llama.standard.acme.llama"),
        ("req.llama.standard.mallory.llama", SUBJECT),
        ("req.x", SUBJECT),
    ],
)
async def test_nobody_is_answered_whom_the_sender_may_not_write_to(
    anyio_backend: object, subject: str, reply_to: str
) -> None:
    broker = MemoryBroker()
    await replies.dead_letter(broker, subject, {"Reply-To": reply_to}, b"", FAULT)
    assert len(await letters(broker)) == 1
    assert await broker.counts(subjects.REPLIES, subjects.ALL_REPLIES) == {}


async def test_a_message_too_large_for_its_dead_letter_leaves_its_body_behind(anyio_backend: object) -> None:
    broker = MemoryBroker()
    await replies.dead_letter(broker, "req.llama.standard.acme.llama", {}, bytes(2**20), FAULT)
    (letter,) = await letters(broker)
    assert letter.body == ""
    assert letter.message == "no path (headers and body, 1048576 bytes, were too large to keep)"


async def test_what_an_earlier_request_of_the_same_id_was_told_is_not_repeated(anyio_backend: object) -> None:
    """The journal outlives the dedup window."""
    clock = time.time() - 300
    hub = MemoryBroker(clock=lambda: clock)
    await replies.Writer(hub, SUBJECT, 1).end({})
    clock = time.time()
    assert await replies.last_frame(hub, SUBJECT, clock * 1000) is None
    async with replies.Mailbox(hub, SUBJECT.split(".")[2]) as mailbox:
        stream = mailbox.open("acme", SUBJECT.split(".")[3])
        assert await stream.next(0.01) == []
        assert not stream.finished


def test_a_wait_that_is_all_but_over_under_uvloop() -> None:
    """Its timers are due in whole milliseconds, and what is due at once is no timer there."""

    async def waits() -> None:
        stream = Stream(MemoryBroker(), SUBJECT, lambda _: None)
        for _ in range(5):
            asyncio.get_running_loop().call_soon(stream.wake)
            assert await stream.next(0.0004, ask_journal=False) == []
        stream.close()

    uvloop.run(waits())
