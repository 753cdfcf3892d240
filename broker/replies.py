"""Reply frames: written once by the worker, read exactly once and in order by whoever asked.

A frame is one core publish. Subscribers get it live; the REPLIES stream keeps it, so that a reader
who missed some (a slow consumer, a broken connection) reads the gap back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from broker import base, codec, errors, subjects
from broker.assembler import Assembler, newest_request
from broker.messages import QUEUED_EPOCH, TERMINAL, Frame, FrameKind

_log = logging.getLogger(__name__)

NOTE_AGAIN = 300.0
"""Seconds after which the note that a request is queued is written anew: the journal forgets."""

MAX_UNREAD = 2**20
"""Bytes of frames that wait for their reader, past which they are left to the journal."""

NO_END_AFTER = 12.0
"""Seconds after which the reply to a request that has left the queue gets no end any more: a journal that
elects its leader, up to 9 s, has been told again by then what it has missed."""

_KEPT_WITHIN = 12.0
"""Seconds that a journal without a leader is given to have a reply's end: an election takes up to 9."""
_LAG = 3.0
"""Seconds until frames that are missing count as lost: a copy of the journal may lag behind, and who wrote
them may be reconnecting."""
_POLL = 0.1
_LOOK_AGAIN = 0.5
"""Seconds between two looks whether a journal that had no leader has a reply's end."""
_PAGE = 256
"""Frames read from the journal, and handed out, at once to a reader who is behind."""
_CLOCKS_APART = 60_000
"""Milliseconds that a reader may be wrong about the broker's clock; half the default dedup window."""


class Writer:
    """The frames of one attempt at one request, numbered. Owned by the job that runs it.

    `request`: its sequence in REQUESTS, which the first frame names: an id may be used again.
    """

    def __init__(self, broker: base.Broker, reply_to: str, epoch: int, request: int = 0) -> None:
        self._broker = broker
        self._reply_to = reply_to
        self._request = request
        self.epoch = epoch
        self._offs: dict[int, int] = {}
        self._began = math.inf  # loop time of the first frame
        self._stored: asyncio.Future[base.Stored] | None = None  # the journal's word on the last one
        self.frames = 0
        self.head_sent = False

    def go_on(self, said: Mapping[int, int]) -> None:
        """Continue an answer of which an earlier attempt said so many tokens of each choice, and its head."""
        self._offs = dict(said)
        self.head_sent = True

    async def beat(self, worker: str, left: str = "") -> None:
        """Say that `worker` has the request; or, with `left`, why it gives it to another unfinished."""
        extra: dict[str, Any] = {"worker": worker, "at": _stamp(self._broker)}
        if left:
            extra["left"] = left
        await self._send(FrameKind.BEAT, extra=extra)

    async def head(
        self,
        status: int,
        headers: dict[str, str],
        worker: str,
        payload: bytes,
        tokens: list[tuple[int, list[int]]],
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """`timing`: what `Frame.extra` says of it."""
        self.head_sent = True
        at = _stamp(self._broker)
        extra: dict[str, Any] = {"status": status, "headers": headers, "worker": worker, "at": at}
        if timing:
            extra["timing"] = dict(timing)
        await self._send(FrameKind.HEAD, payload, tokens, extra)

    async def data(self, payload: bytes, tokens: list[tuple[int, list[int]]]) -> None:
        await self._send(FrameKind.DATA, payload, tokens)

    async def end(self, usage: dict[str, int]) -> None:
        await self._send(FrameKind.END, extra={"usage": usage, "at": _stamp(self._broker)})

    async def error(self, exc: errors.HeadraceError) -> None:
        extra: dict[str, Any] = {"status": exc.status, "code": exc.code, "at": _stamp(self._broker)}
        if exc.retry_after is not None:
            extra["retry_after"] = exc.retry_after
        await self._send(FrameKind.ERROR, exc.body(), extra=extra)

    async def kept(self, since_ms: float) -> None:
        """Return once the journal has the whole reply, which has ended: until then it may be known to this
        process alone. What was said while it had no leader, or was not there, it has from who said or heard
        it, as soon as it is.

        Args:
            since_ms: unix time in ms at which the request was queued.

        Raises errors.Unavailable when it lacks the end for longer than an election takes.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + _KEPT_WITHIN
        if self._stored is not None:
            with contextlib.suppress(errors.Unavailable):
                await self._stored
                if self._broker.disturbed < self._began:
                    return  # else it says nothing of the frames before
        last, asked = self.frames - 1, False
        while True:
            kept: set[int] = set()
            try:
                frames = await journal(self._broker, self._reply_to, since_ms)
            except errors.MalformedMessage:
                return  # someone else wrote there: no reader has use for the rest
            except errors.Unavailable:
                pass
            else:
                kept = {frame.seq for frame in frames if frame.epoch == self.epoch}
            # What is not there after it was said again is older than what is remembered.
            if kept.issuperset(range(self.frames)) or (asked and last in kept):
                return
            if loop.time() > end:
                raise errors.Unavailable("the journal of replies does not keep what is written to it")
            asked = last in kept
            with contextlib.suppress(errors.Unavailable):
                await self._broker.publish(subjects.again(self._reply_to), b"{}")
            await asyncio.sleep(_LOOK_AGAIN)

    async def _send(
        self,
        kind: FrameKind,
        payload: bytes = b"",
        tokens: list[tuple[int, list[int]]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        frame = Frame(self.epoch, self.frames, kind, self._offs.get(0, 0), payload=payload)
        if tokens:
            self._number(frame, tokens)
        if extra is not None:
            frame.extra = extra
        if not self.frames:
            self._began = asyncio.get_running_loop().time()
            if self._request:
                frame.extra = {**frame.extra, "request": self._request}
        data = codec.encode(frame)
        while (over := len(data) - self._broker.max_payload) > 0:
            if over >= len(frame.payload):
                raise errors.TooLarge("the answer holds more tokens than one reply frame can name")
            part, rest = _split(frame.payload, len(frame.payload) - over)
            # The last part names the tokens: who has it has all of their payload.
            whole = Frame(self.epoch, self.frames, frame.kind, frame.off, payload=part, extra=frame.extra)
            await self._publish(codec.encode(whole))
            frame.seq, frame.kind, frame.payload, frame.extra = self.frames, FrameKind.DATA, rest, {}
            data = codec.encode(frame)
        if kind in TERMINAL:
            await self._publish_last(data)
        else:
            await self._publish(data)

    async def _publish(self, data: bytes) -> None:
        self.frames += 1
        await self._broker.publish(self._reply_to, data)

    async def _publish_last(self, data: bytes) -> None:
        try:
            self._stored = await self._broker.enqueue(self._reply_to, data)
        except errors.Unavailable:
            await self._publish(data)  # it goes out when the connection is back
        else:
            self.frames += 1

    def _number(self, frame: Frame, tokens: list[tuple[int, list[int]]]) -> None:
        for index, ids in tokens:
            off = self._offs.get(index, 0)
            self._offs[index] = off + len(ids)
            if index == 0:
                frame.ids = frame.ids + ids if frame.ids else ids
            else:
                frame.choices.append([index, off, ids])


async def note_queued(broker: base.Broker, reply_to: str, seq: int) -> None:
    """Say in the journal that a request waits as number `seq` of REQUESTS, so that who asks for its reply
    by its id finds it before a worker has it. Said once or twice, early or late: readers take it so. Without
    a broker it is not said."""
    extra = {"worker": "", "queued": seq, "at": _stamp(broker)}
    with contextlib.suppress(errors.Unavailable):
        await broker.publish(reply_to, codec.encode(Frame(QUEUED_EPOCH, 0, FrameKind.BEAT, extra=extra)))


def _split(payload: bytes, at: int) -> tuple[bytes, bytes]:
    """Two parts, the first of at most `at` bytes; never between the two newlines that end an event."""
    while at > 1 and payload[at - 1 : at] == b"\n":
        at -= 1
    return payload[:at], payload[at:]


def _stamp(broker: base.Broker) -> float:
    """Unix time in ms to the microsecond: frames take less than a millisecond on their way."""
    return round(broker.now_ms(), 3)


async def last_frame(broker: base.Broker, reply_to: str, since_ms: float) -> Frame | None:
    """The newest frame that the journal has for a request, as its leader knows it; None when nothing was
    said `since_ms`.

    The journal outlives the dedup window: older frames may be an earlier request's of the same id.
    """
    record = await broker.last(subjects.REPLIES, reply_to, leader=True)
    return None if record is None or record.stored_ms < since_ms else codec.decode(record.data)


async def journal(broker: base.Broker, reply_to: str, since_ms: float) -> list[Frame]:
    """All frames that the journal has for a request that was queued at `since_ms`, in its order."""
    records = await broker.read(subjects.REPLIES, reply_to, limit=1_000_000)
    return [codec.decode(record.data) for record in records if record.stored_ms >= since_ms]


class Stream:
    """One request's frames as its reader sees them.

    Those that its reader has not asked for yet wait here, up to `max_unread` bytes and one frame. What
    comes on top is dropped, with what waits, and read from the journal when its reader asks for it.

    Attributes:
        overflows: how often that was.
    """

    def __init__(
        self,
        broker: base.Broker,
        subject: str,
        close: Callable[[str], None],
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self.subject = subject
        self.overflows = 0
        self._broker = broker
        self._close = close
        self._max_unread = max_unread
        self._waiting: deque[bytes] = deque()
        self._unread = 0  # bytes in it
        self._paging = False  # what comes next is in the journal, behind its sequence `_read_to`
        self._read_to = 0
        self._wake: asyncio.Future[bool] | None = None  # its result: whether it was silence that ended it
        self._silent_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # uvloop's handle of a timer that is due at once can't tell
        self._assembler = Assembler()
        self._behind = (
            False  # what the assembler holds can't be continued: the journal must be read from its start
        )
        self._lag: float | None = None  # loop time since which the journal lacks what must be there
        self._since_ms = broker.now_ms() - _CLOCKS_APART
        self._asked_again = 0.0  # loop time
        self._looked: tuple[int, int] | None = None  # the journal's end and our epoch at the last look
        self._read_end = 0  # sequence of the last frame that the journal gave us
        self._doubted = False  # frames may have passed us by: our connection was broken
        self._noted: dict[
            int, int
        ] = {}  # of each epoch, the last frame that was kept for who asks for it again

    @property
    def finished(self) -> bool:
        return self._assembler.finished

    @property
    def unread(self) -> int:
        """Bytes that wait for the reader."""
        return self._unread

    def push(self, data: bytes) -> None:
        if self._unread > self._max_unread:
            self._waiting.clear()
            self._unread = 0
            self._paging = True
            self.overflows += 1
        else:
            self._waiting.append(data)
            self._unread += len(data)
        self.wake()

    def doubt(self) -> None:
        """Have the journal looked at, for frames that came while we could not hear."""
        self._doubted = True
        self.wake()

    def wake(self) -> None:
        """Make `next` return, even with nothing to return."""
        self._end_wait(False)

    def _end_wait(self, silent: bool) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(silent)

    async def next(self, timeout: float, *, ask_journal: bool = True) -> list[Frame]:
        """Frames in order as soon as there are any; [] after `timeout` seconds or a `wake`.

        Silence is not trusted: the journal is asked whether frames passed us by, unless the caller
        knows better. Raises errors.FramesLost when a gap can't be filled from it.
        """
        if self._lag is not None:
            timeout = min(timeout, _POLL)
        if self._paging and not self._behind:
            page = await self._tried_page(min(timeout, _POLL))
            if page or self._paging:
                return page
        if not (self._waiting or self._doubted):
            silent = await self._wait(timeout)
            if not (silent or self._waiting or self._doubted or self._lag is not None):
                return []
        ready: list[Frame] = []
        silent = (ask_journal or self._doubted) and not self._waiting
        if self._doubted:
            self._doubted = False
            with contextlib.suppress(errors.Unavailable):  # the journal may have no leader: its writer has it
                await self._broker.publish(subjects.again(self.subject), b"{}")
        while self._waiting and not self._behind:
            data = self._waiting.popleft()
            self._unread -= len(data)
            self._feed(data, ready, live=True)
        try:
            if self._behind:
                ready += await self._checked(*await self._again())
            elif self._assembler.gap:
                ready += await self._checked(*await self._repair())
            elif silent and (place := await self._unlooked()):
                ready += await self._look()
                if self._read_end >= place[0]:  # else it was a copy that lags behind
                    self._looked = place
        except errors.Unavailable as exc:
            # What is in order goes on its way; the next frame or silence asks the journal again.
            _log.warning("the journal can't be read now: %s", exc.message)
        return ready

    def _feed(self, data: bytes, ready: list[Frame], live: bool = False) -> None:
        frame = codec.decode(data)
        if live and frame.seq > self._noted.get(frame.epoch, -1):
            self._noted[frame.epoch] = frame.seq
            self._broker.heard(self.subject, data)
        try:
            ready += self._assembler.feed(frame)
        except errors.FramesLost:
            self._behind = True  # an earlier attempt's last frames may only have passed us by

    async def _tried_page(self, timeout: float) -> list[Frame]:
        try:
            return await self._page()
        except errors.Unavailable as exc:
            _log.warning("the journal can't be read now: %s", exc.message)
            await self._wait(timeout)
            return []

    async def _page(self) -> list[Frame]:
        """What is new on the journal's next page that has anything new; [] once it is read to its end.

        Raises errors.Unavailable.
        """
        ready: list[Frame] = []
        while self._paging and not ready and not self._behind:
            overflows = self.overflows
            page = await self._broker.read(subjects.REPLIES, self.subject, self._read_to + 1, _PAGE)
            self._paging = len(page) == _PAGE or self.overflows > overflows
            for record in page:
                self._read_to = record.seq
                if record.stored_ms >= self._since_ms and not self._behind:
                    self._feed(record.data, ready)
        return ready

    async def _checked(self, frames: list[Frame], whole: bool) -> list[Frame]:
        """What a repair found; what it did not find, its writer is asked for.

        Raises errors.FramesLost when it is not `whole` for too long.
        """
        now = asyncio.get_running_loop().time()
        if whole:
            self._lag = None
            return frames
        if self._lag is None or frames:
            self._lag = now
        elif now - self._lag > _LAG:
            raise errors.FramesLost("reply frames were lost, and the journal no longer has them")
        if now - self._asked_again >= _POLL:
            self._asked_again = now
            await self._broker.publish(subjects.again(self.subject), b"{}")
        return frames

    async def _wait(self, timeout: float) -> bool:
        """Whether `timeout` passed in silence.

        One timer outlives many waits: it looks again when it fires, since setting and cancelling one
        for every token would cost more than the token.
        """
        loop = asyncio.get_running_loop()
        self._silent_at = loop.time() + timeout
        if self._timer is None or self._timer_at > self._silent_at:
            self._set_timer(loop)
        self._wake = loop.create_future()
        try:
            return await self._wake
        finally:
            self._wake = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._silent_at
        self._timer = loop.call_at(self._timer_at, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._wake is None:
            return
        if loop.time() < self._silent_at:
            self._set_timer(loop)
        else:
            self._end_wait(True)

    async def _unlooked(self) -> tuple[int, int] | None:
        """Where the journal ends, if it may have what passed us by: a place and an epoch of ours.

        Its newest frame tells that it has not, when it is the one that we had last, of the first attempt. Any
        other may stand behind some that we lack: a note, a late one of an attempt that was given up, or the
        first of an attempt that came when there was an end already.
        """
        newest = await self._broker.last(subjects.REPLIES, self.subject)
        if newest is None or newest.stored_ms < self._since_ms:
            return None
        frame, assembler = codec.decode(newest.data), self._assembler
        first_and_last = (frame.epoch, frame.seq) == (1, assembler.next_seq - 1) and assembler.epoch == 1
        place = newest.seq, assembler.epoch
        return None if first_and_last or place == self._looked else place

    async def _look(self) -> list[Frame]:
        frames, whole = await self._again()
        return frames if whole else await self._checked(*await self._repair())

    async def begin(self) -> list[Frame]:
        """For a reader who comes late: the first page of what the journal has of the newest request of this
        id. `next` has the others.

        Raises errors.FramesLost when the beginning is no longer there, errors.Unavailable.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + _LAG
        while True:
            ready = await self._first_page()
            if not self._behind and (not self._assembler.gap or (ready and self._paging)):
                return ready
            if loop.time() > end:
                raise errors.FramesLost("the journal no longer has the beginning of the reply")
            self._assembler, self._behind = Assembler(), False  # this copy of it may lag behind
            await asyncio.sleep(_POLL)

    async def _first_page(self) -> list[Frame]:
        places, frames = [], []
        page = await self._broker.read(subjects.REPLIES, self.subject, limit=_PAGE)
        while page:
            for record in page:
                frame = codec.decode(record.data)
                frame.payload = b""  # held for its reader it could be many times a page
                frames.append(frame)
                places.append((record.seq, record.stored_ms))
            full, last = len(page) == _PAGE, page[-1].seq
            page = await self._broker.read(subjects.REPLIES, self.subject, last + 1, _PAGE) if full else []
        if places:
            seq, self._since_ms = places[newest_request(frames)]
            self._read_to, self._paging = seq - 1, True
        return await self._page()

    async def forgotten(self) -> bool:
        """Whether the journal keeps nothing of the reply any more; False while it can't be asked."""
        try:
            return await self._broker.last(subjects.REPLIES, self.subject) is None
        except errors.Unavailable:
            return False

    async def _journal(self) -> list[Frame]:
        records = await self._broker.read(subjects.REPLIES, self.subject, limit=1_000_000)
        self._read_end = records[-1].seq if records else 0
        return [codec.decode(record.data) for record in records if record.stored_ms >= self._since_ms]

    async def _repair(self) -> tuple[list[Frame], bool]:
        """Read the journal: what is new in it, and whether that closed the gap."""
        ready = self._assembler.feed_all(await self._journal())
        return ready, not self._assembler.gap

    async def _again(self) -> tuple[list[Frame], bool]:
        """Put the whole reply in order once more, by the journal's own: where attempts follow each other,
        that is the one which counts. What the reader has had stays out."""
        had, assembler = self._assembler, Assembler()
        try:
            frames = assembler.feed_all(await self._journal())
        except errors.FramesLost:
            return [], False
        # Not so far yet: a copy of the journal lags behind, or the next attempt is on its way again.
        if assembler.gap or any(assembler.tokens.get(index, 0) < n for index, n in had.tokens.items()):
            return [], False
        self._assembler, self._behind = assembler, False
        return had.rest(frames), True

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # who still waits for the end of a cancelled run sets another
        self._close(self.subject)


@contextlib.asynccontextmanager
async def following(broker: base.Broker, subject: str, max_unread: int = MAX_UNREAD) -> AsyncIterator[Stream]:
    """The reply on any subject, whoever it goes to: live, and from the journal by `Stream.begin`."""
    stream = Stream(broker, subject, lambda _: None, max_unread)
    subscription = await broker.subscribe(subject, lambda message: stream.push(message.data))
    forget = broker.on_reconnect(stream.doubt)
    try:
        yield stream
    finally:
        forget()
        stream.close()
        await subscription.close()


class Mailbox:
    """All replies of one reader process: one wildcard subscription, frames sorted by subject."""

    def __init__(self, broker: base.Broker, name: str, max_unread: int = MAX_UNREAD) -> None:
        self.name = name
        self._broker = broker
        self._max_unread = max_unread
        self._streams: dict[str, Stream] = {}
        self._subscription: base.Subscription | None = None

    async def __aenter__(self) -> Mailbox:
        self._subscription = await self._broker.subscribe(subjects.mailbox(self.name), self._on_message)
        self._no_longer = self._broker.on_reconnect(self._on_reconnect)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._no_longer()
        if self._subscription is not None:
            await self._subscription.close()

    def _on_message(self, message: base.Message) -> None:
        stream = self._streams.get(message.subject)
        if stream is not None:
            stream.push(message.data)

    def _on_reconnect(self) -> None:
        for stream in list(self._streams.values()):
            stream.doubt()

    def open(self, tenant: str, request_id: str) -> Stream:
        """Raises errors.DuplicateRequest while a request with this id is open here."""
        subject = subjects.reply(tenant, self.name, request_id)
        if subject in self._streams:
            raise errors.DuplicateRequest(f"request id {request_id!r} is in use: choose another")
        stream = Stream(self._broker, subject, self._forget, self._max_unread)
        self._streams[subject] = stream
        return stream

    def _forget(self, subject: str) -> None:
        self._streams.pop(subject, None)

    def __len__(self) -> int:
        return len(self._streams)
