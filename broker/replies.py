"""Reply frames: written once by the worker, read exactly once and in order by whoever asked.

A frame is one core publish. Subscribers get it live; the REPLIES stream keeps it, so that a reader
who missed some (a slow consumer, a broken connection) reads the gap back.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from broker import base, codec, errors, subjects
from broker.messages import TERMINAL, DeadLetter, Frame, FrameKind

_log = logging.getLogger(__name__)

_HELD_LIMIT = 4096
_GAP_LIMIT = 3.0
"""Seconds until frames that are missing count as lost: their writer may be reconnecting, a copy of the
journal may lag behind."""
_GAP_POLL = 0.1
_CLOCKS_APART = 60_000
"""Milliseconds that a reader's clock and the broker's may differ; half the default dedup window."""


class Writer:
    """The frames of one attempt at one request, numbered. Owned by the job that runs it."""

    def __init__(self, broker: base.Broker, reply_to: str, epoch: int) -> None:
        self._broker = broker
        self._reply_to = reply_to
        self._epoch = epoch
        self._offs: dict[int, int] = {}
        self.frames = 0
        self.head_sent = False

    async def beat(self, worker: str) -> None:
        await self._send(FrameKind.BEAT, extra={"worker": worker, "at": _stamp()})

    async def head(
        self,
        status: int,
        headers: dict[str, str],
        worker: str,
        payload: bytes,
        tokens: list[tuple[int, list[int]]],
    ) -> None:
        self.head_sent = True
        extra = {"status": status, "headers": headers, "worker": worker, "at": _stamp()}
        await self._send(FrameKind.HEAD, payload, tokens, extra)

    async def data(self, payload: bytes, tokens: list[tuple[int, list[int]]]) -> None:
        await self._send(FrameKind.DATA, payload, tokens)

    async def end(self, usage: dict[str, int]) -> None:
        await self._send(FrameKind.END, extra={"usage": usage, "at": _stamp()})

    async def error(self, exc: errors.HeadraceError) -> None:
        extra: dict[str, Any] = {"status": exc.status, "code": exc.code, "at": _stamp()}
        if exc.retry_after is not None:
            extra["retry_after"] = exc.retry_after
        await self._send(FrameKind.ERROR, exc.body(), extra=extra)

    async def _send(
        self,
        kind: FrameKind,
        payload: bytes = b"",
        tokens: list[tuple[int, list[int]]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        frame = Frame(self._epoch, self.frames, kind, self._offs.get(0, 0), payload=payload)
        if tokens:
            self._number(frame, tokens)
        if extra is not None:
            frame.extra = extra
        data = codec.encode(frame)
        over = len(data) - self._broker.max_payload
        if over > len(payload):
            raise errors.TooLarge("the answer holds more tokens than one reply frame can name")
        self.frames += 1
        if over <= 0:
            await self._broker.publish(self._reply_to, data)
            return
        await self._broker.publish(self._reply_to, data[:-over])
        await self._send(FrameKind.DATA, payload[-over:])

    def _number(self, frame: Frame, tokens: list[tuple[int, list[int]]]) -> None:
        for index, ids in tokens:
            off = self._offs.get(index, 0)
            self._offs[index] = off + len(ids)
            if index == 0:
                frame.ids = frame.ids + ids if frame.ids else ids
            else:
                frame.choices.append([index, off, ids])


def now_ms() -> int:
    return int(time.time() * 1000)


def _stamp() -> float:
    """Unix time in ms to the microsecond: frames take less than a millisecond on their way."""
    return round(time.time() * 1000, 3)


async def dead_letter(
    broker: base.Broker,
    subject: str,
    headers: Mapping[str, str] | None,
    body: bytes,
    exc: errors.HeadraceError,
    epoch: int = 0,
) -> None:
    """Keep a message that can't be run in DEAD, and answer it with an `error` frame if it says where."""
    head = dict(headers or {})
    reply_to = head.get(subjects.REPLY_TO, "")
    if subjects.may_answer(subject, reply_to):
        await Writer(broker, reply_to, epoch).error(exc)
    letter = DeadLetter(
        reason=exc.code,
        message=exc.message,
        subject=subject.encode("utf-8", "backslashreplace").decode(),
        headers=head,
        body=base64.b64encode(body).decode(),
        failed_ms=now_ms(),
    )
    data = letter.model_dump_json().encode()
    if len(data) > broker.max_payload:
        # Base64 and the envelope can make a message that just fitted too large.
        left_out = f"{exc.message} (headers and body, {len(body)} bytes, were too large to keep)"
        letter = letter.model_copy(update={"headers": {}, "body": "", "message": left_out})
        data = letter.model_dump_json().encode()
    await (await broker.enqueue(subjects.dead(exc.code), data))
    _log.warning("a message went to the dead letters: %s", exc.message, extra={"code": exc.code})


async def last_frame(broker: base.Broker, reply_to: str, since_ms: float) -> Frame | None:
    """The newest frame that the journal has for a request; None when nothing was said `since_ms`.

    The journal outlives the dedup window: older frames may be an earlier request's of the same id.
    """
    record = await broker.last(subjects.REPLIES, reply_to)
    return None if record is None or record.stored_ms < since_ms else codec.decode(record.data)


class Assembler:
    """Puts frames in order, each once. Pure: no I/O; `gap` says when frames are missing.

    A frame of an older epoch is dropped. A newer epoch starts again at seq 0 and goes on, without a
    head of its own, at the output token that the reader has come to; what it repeats is dropped. One
    that brings a second head has begun anew, with another text perhaps: that is a loss.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.next_seq = 0
        self.finished = False
        self._headed = False
        self._off = 0
        self._held: dict[tuple[int, int], Frame] = {}

    @property
    def gap(self) -> bool:
        """Frames are held back because an earlier one is missing."""
        return bool(self._held) and not self.finished

    @property
    def started(self) -> bool:
        """The head has been passed on."""
        return self._headed

    def feed(self, frame: Frame) -> list[Frame]:
        """The frames that may now be forwarded, in order.

        Raises errors.FramesLost when more is held back than any repair could explain, or when a new
        attempt starts past what was seen.
        """
        if frame.seq == self.next_seq and frame.epoch == self.epoch and not self._held and not self.finished:
            # Every frame of an undisturbed stream takes this way.
            self.next_seq += 1
            return [frame] if self._wanted(frame) else []
        if self.finished or (frame.epoch, frame.seq) < (self.epoch, self.next_seq):
            return []
        self._held[frame.epoch, frame.seq] = frame
        if len(self._held) > _HELD_LIMIT:
            raise errors.FramesLost("reply frames are missing and too many wait behind them")
        ready: list[Frame] = []
        while not self.finished:
            following = self._held.pop((self.epoch, self.next_seq), None)
            if following is None and not self._advance_epoch():
                break
            if following is not None:
                self.next_seq += 1
                if self._wanted(following):
                    ready.append(following)
        return ready

    def _advance_epoch(self) -> bool:
        """Move to the newest epoch whose first frame is here."""
        newest = max((epoch for epoch, seq in self._held if seq == 0), default=self.epoch)
        if newest <= self.epoch:
            return False
        self.epoch, self.next_seq = newest, 0
        self._held = {key: frame for key, frame in self._held.items() if key[0] >= newest}
        return True

    def _wanted(self, frame: Frame) -> bool:
        if frame.kind in TERMINAL:
            self.finished = True
            return True
        if frame.kind is FrameKind.BEAT:
            return not self._headed
        if frame.off > self._off:
            raise errors.FramesLost(f"the reply goes on at token {frame.off}, but {self._off} were seen")
        if frame.kind is FrameKind.HEAD:
            if self._headed:
                raise errors.FramesLost("the answer was begun anew after a part of it had been passed on")
            self._headed = True
        elif frame.off < self._off:
            return False
        self._off = frame.off + len(frame.ids)
        return True


class Stream:
    """One request's frames as its reader sees them."""

    def __init__(self, broker: base.Broker, subject: str, close: Callable[[str], None]) -> None:
        self.subject = subject
        self._broker = broker
        self._close = close
        self._waiting: deque[bytes] = deque()
        self._wake: asyncio.Future[bool] | None = None  # its result: whether it was silence that ended it
        self._silent_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._assembler = Assembler()
        self._since_ms = time.time() * 1000 - _CLOCKS_APART
        self._gap_since = 0.0  # loop time; 0 = nothing is missing
        self._gap_asked = 0.0

    @property
    def finished(self) -> bool:
        return self._assembler.finished

    def push(self, data: bytes) -> None:
        self._waiting.append(data)
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
        if self._assembler.gap:
            timeout = min(timeout, _GAP_POLL)
        if not self._waiting and not await self._wait(timeout) and not self._waiting:
            return []
        ready: list[Frame] = []
        silent = ask_journal and not self._waiting
        while self._waiting:
            ready += self._assembler.feed(codec.decode(self._waiting.popleft()))
        try:
            if self._assembler.gap or (silent and await self._missed()):
                ready += await self._repair()
            else:
                self._gap_since = 0.0
        except errors.Unavailable as exc:
            # What is in order goes on its way; the next frame or silence asks the journal again.
            _log.warning("the journal can't be read now: %s", exc.message)
        return ready

    async def _wait(self, timeout: float) -> bool:
        """Whether `timeout` passed in silence.

        One timer outlives many waits: it looks again when it fires, since setting and cancelling one
        for every token would cost more than the token.
        """
        loop = asyncio.get_running_loop()
        self._silent_at = loop.time() + timeout
        if self._timer is None or self._timer.when() > self._silent_at:
            self._set_timer(loop)
        self._wake = loop.create_future()
        try:
            return await self._wake
        finally:
            self._wake = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._silent_at, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._wake is None:
            return
        if loop.time() < self._silent_at:
            self._set_timer(loop)
        else:
            self._end_wait(True)

    async def _missed(self) -> bool:
        newest = await last_frame(self._broker, self.subject, self._since_ms)
        seen = self._assembler.epoch, self._assembler.next_seq
        return newest is not None and (newest.epoch, newest.seq) >= seen

    async def begin(self) -> list[Frame]:
        """For a reader who comes late: what the journal has of the newest request of this id.

        Raises errors.FramesLost when it no longer has the beginning, errors.Unavailable.
        """
        records = await self._journal()
        frames = [codec.decode(record.data) for record in records]
        start, ended = 0, False
        for n, frame in enumerate(frames):
            if ended and frame.seq == 0:  # else it is a late frame of an attempt that was given up
                start, ended = n, False
            ended = ended or frame.kind in TERMINAL
        self._since_ms = records[start].stored_ms if records else self._since_ms
        return self._fill(frames[start:])

    async def forgotten(self) -> bool:
        """Whether the journal keeps nothing of the reply any more; False while it can't be asked."""
        try:
            return await self._broker.last(subjects.REPLIES, self.subject) is None
        except errors.Unavailable:
            return False

    async def _repair(self) -> list[Frame]:
        """Read the journal and pass on what is new; what it has not, its writer is asked for.

        Raises errors.FramesLost when frames have been missing for too long.
        """
        now = asyncio.get_running_loop().time()
        if self._gap_since and now - self._gap_asked < _GAP_POLL:
            return []  # other frames came while these are waited for
        records = [record for record in await self._journal() if record.stored_ms >= self._since_ms]
        frames = [codec.decode(record.data) for record in records]
        ready = [passed for frame in frames for passed in self._assembler.feed(frame)]
        if not self._assembler.gap:
            self._gap_since = 0.0
            return ready
        if ready or not self._gap_since:
            self._gap_since = now
        elif now - self._gap_since > _GAP_LIMIT:
            raise errors.FramesLost("reply frames were lost, and the journal no longer has them")
        self._gap_asked = now
        await self._broker.publish(subjects.again(self.subject), b"{}")
        return ready

    async def _journal(self) -> list[base.Record]:
        return await self._broker.read(subjects.REPLIES, self.subject, limit=1_000_000)

    def _fill(self, frames: list[Frame]) -> list[Frame]:
        ready = [passed for frame in frames for passed in self._assembler.feed(frame)]
        if self._assembler.gap:
            raise errors.FramesLost("reply frames were lost, and the journal no longer has them")
        return ready

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._close(self.subject)


@contextlib.asynccontextmanager
async def following(broker: base.Broker, tenant: str, request_id: str) -> AsyncIterator[Stream | None]:
    """The reply to any request, whoever it goes to: live, and from the journal by `Stream.begin`.

    None where the journal has none. An id that was used at two ingresses is that of the newer request.
    """
    newest = await broker.last(subjects.REPLIES, subjects.replies_to(tenant, request_id))
    if newest is None:
        yield None
        return
    stream = Stream(broker, newest.subject, lambda _: None)
    subscription = await broker.subscribe(newest.subject, lambda message: stream.push(message.data))
    try:
        yield stream
    finally:
        stream.close()
        await subscription.close()


class Mailbox:
    """All replies of one reader process: one wildcard subscription, frames sorted by subject."""

    def __init__(self, broker: base.Broker, name: str) -> None:
        self.name = name
        self._broker = broker
        self._streams: dict[str, Stream] = {}
        self._subscription: base.Subscription | None = None

    async def __aenter__(self) -> Mailbox:
        self._subscription = await self._broker.subscribe(subjects.mailbox(self.name), self._on_message)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    def _on_message(self, message: base.Message) -> None:
        stream = self._streams.get(message.subject)
        if stream is not None:
            stream.push(message.data)

    def open(self, tenant: str, request_id: str) -> Stream:
        """Raises errors.DuplicateRequest while a request with this id is open here."""
        subject = subjects.reply(tenant, self.name, request_id)
        if subject in self._streams:
            raise errors.DuplicateRequest(f"request id {request_id!r} is in use: choose another")
        stream = Stream(self._broker, subject, self._forget)
        self._streams[subject] = stream
        return stream

    def _forget(self, subject: str) -> None:
        self._streams.pop(subject, None)

    def __len__(self) -> int:
        return len(self._streams)
