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

from broker import base, codec, errors, replies, subjects
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Frame, FrameKind
from broker.replies import Mailbox, Stream, Writer
from tests.unit.broker.frames import SSE, tokens_of
from tests.waiting import LIMIT, until

SUBJECT = "out.acme.box.r1"


class Deafening(MemoryBroker):
    """Frames whose numbers are in `lost` reach no subscriber; those in `forgotten` no journal either; those
    written while `unkept` no journal."""

    def __init__(self) -> None:
        super().__init__(BrokerConfig(timeout=0.01))
        self.lost: set[int] = set()
        self.forgotten: set[int] = set()
        self.unkept = False
        self.refused: list[str] = []
        self.asked = 0
        self.looked = 0
        self.kept: list[bytes] = []  # what the writer publishes once more when asked
        self.noted: list[bytes] = []  # what readers had kept

    def heard(self, subject: str, data: bytes) -> None:
        self.noted.append(data)

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
        self.looked += 1
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
    async with asyncio.timeout(LIMIT):
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


class TestKept:
    """What its writer waits for before it takes a request for done."""

    @pytest.fixture(autouse=True)
    def hurry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replies, "_LOOK_AGAIN", 0.005)

    async def test_a_journal_that_acknowledges_the_end_has_all(self, broker: Deafening) -> None:
        writer = await written(broker)
        async with asyncio.timeout(5):
            await writer.kept(0.0)
        assert len(await replies.journal(broker, SUBJECT, 0.0)) == writer.frames == 4

    async def test_one_without_a_leader_is_asked_for_until_it_has_each_frame(self, broker: Deafening) -> None:
        """They come again, in any order, from whoever said or heard them."""
        said: list[bytes] = []
        await broker.subscribe(SUBJECT, lambda message: said.append(message.data))
        broker.unkept = True
        writer = await written(broker)
        keeping = asyncio.create_task(writer.kept(0.0))
        await until(lambda: broker.asked > 1)
        assert not keeping.done()
        broker.kept, broker.unkept = said[::-1], False
        async with asyncio.timeout(5):
            await keeping
        frames = await replies.journal(broker, SUBJECT, 0.0)
        assert {frame.seq for frame in frames} == {0, 1, 2, 3}

    async def test_an_acknowledged_end_says_nothing_of_frames_before_a_disturbance(
        self, broker: Deafening
    ) -> None:
        broker.forgotten = {1}
        writer = await written(broker)
        broker.reconnected()
        broker.kept = [codec.encode(Frame(1, 1, FrameKind.DATA, 0, [7]))]
        async with asyncio.timeout(5):
            await writer.kept(0.0)
        frames = await replies.journal(broker, SUBJECT, 0.0)
        assert {frame.seq for frame in frames} == {0, 1, 2, 3}

    async def test_a_reply_into_which_someone_else_wrote_is_not_waited_for(self, broker: Deafening) -> None:
        """Its readers can't tell what is ours either."""
        writer = await written(broker)
        await MemoryBroker.publish(broker, SUBJECT, b"garbage")
        broker.reconnected()
        async with asyncio.timeout(5):
            await writer.kept(0.0)
        assert broker.asked == 0

    async def test_what_nobody_remembers_is_not_waited_for(self, broker: Deafening) -> None:
        """A frame that left the journal, or was said long ago."""
        broker.forgotten = {1}
        writer = await written(broker)
        broker.reconnected()
        async with asyncio.timeout(5):
            await writer.kept(0.0)
        assert broker.asked == 1

    async def test_frames_of_another_attempt_or_of_an_earlier_request_are_not_its_own(
        self, broker: Deafening, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replies, "_KEPT_WITHIN", 0.05)
        await written(broker)
        await written(broker, 2)
        broker.unkept = True
        writer = await written(broker)
        with pytest.raises(errors.Unavailable, match="does not keep"):
            await writer.kept(time.time() * 1000 + 1)
        third = await written(broker, 3)
        with pytest.raises(errors.Unavailable, match="does not keep"):
            await third.kept(0.0)

    async def test_an_end_that_a_broken_connection_holds_up(self, broker: Deafening) -> None:
        broker.disconnect()
        writer = await written(broker)
        keeping = asyncio.create_task(writer.kept(0.0))
        await until(lambda: broker.looked > 1)
        assert not keeping.done()
        broker.reconnect()
        async with asyncio.timeout(5):
            await keeping


async def written(broker: Deafening, epoch: int = 1) -> Writer:
    """A reply of four frames, the last of them its end."""
    writer = Writer(broker, SUBJECT, epoch)
    await writer.beat("w1")
    await writer.head(200, {}, "w1", b"a", [(0, [7])])
    await writer.data(b"b", [(0, [8])])
    await writer.end({})
    return writer


async def test_a_reader_keeps_what_it_hears_once(broker: Deafening, stream: Stream) -> None:
    """For who goes on with the reply after its writer: what comes again must not make it grow."""
    frames: list[bytes] = []
    await broker.subscribe(SUBJECT, lambda message: frames.append(message.data))
    await write(broker, end=False)
    await until(lambda: len(frames) == 6)
    end = codec.encode(Frame(1, 6, FrameKind.END, 4))
    for frame in (*list(frames), end):
        await broker.publish(SUBJECT, frame)
    await read(stream)
    assert broker.noted == [*frames[:6], end]


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
    assert tokens_of(frames) == [0, 1, 2, 3]


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
    assert tokens_of(frames) == [0, 1, 2, 3]
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
        assert [f.kind for f in await asyncio.wait_for(waiting, LIMIT)] == [FrameKind.END]


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
    assert tokens_of(await read(stream)) == [0, 1, 2, 3]
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
    assert tokens_of(frames) == [0, 1, 2, 3, 4]
    assert [frame.epoch for frame in frames] == [1, 1, 1, 1, 1, 1, 2, 2]


async def test_a_reader_who_has_what_the_journal_lost_goes_on_with_what_is_new(
    broker: Deafening, stream: Stream
) -> None:
    """All that the first attempt said was lost with the journal's leader; the next begins anew."""
    broker.unkept = True
    await write(broker, count=4, end=False)
    broker.unkept = False
    frames = [frame for _ in range(2) for frame in await stream.next(0.02)]
    assert tokens_of(frames) == [0, 1, 2, 3]
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
    assert tokens_of(frames) == [0, 1, 2, 3, 4, 5]
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


async def test_a_gap_before_a_tail_that_is_lost_too_is_a_loss(
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
    assert tokens_of(frames) == [0, 1, 2, 3]
    assert not broker.refused


async def test_wake_ends_the_wait(stream: Stream) -> None:
    waiting = asyncio.create_task(stream.next(60.0))
    await asyncio.sleep(0)
    stream.wake()
    assert await asyncio.wait_for(waiting, LIMIT) == []


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
    assert tokens_of(frames) == list(range(1000))
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
    assert tokens_of(frames) == list(range(600))


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
    assert tokens_of(frames) == list(range(300))


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
    assert tokens_of(whole) == list(range(100))


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
