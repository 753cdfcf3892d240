"""How a request whose worker was lost goes on: what the journal has of it, and where the new run joins in.

A redelivered request is run again from its beginning, for the engine's own application to come to the
same state: the engine is handed the output tokens that the caller has (`Tap.replay`), and what the
application says up to there is held back (`Joint`). So the new part is the very continuation of the old,
whatever the endpoint, its parsers and its counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from broker import base, errors, replies, subjects
from broker.assembler import Assembler
from broker.messages import QUEUED_EPOCH, TERMINAL, Attempt, Frame, FrameKind, Request

_FENCE_LIMIT = 3.0
"""Seconds until the journal must show the frame that was just written to it."""

_ELECTION = 10.0
"""Seconds that the journal is given to have a leader: a cluster takes up to 9 to elect one."""

_HEARD = 0.05
"""Seconds in which whoever has frames of a reply publishes them again; it takes a millisecond or two."""

_POLL = 0.1

PASSED_ON = "passed on"
"""Why an attempt left the request whose worker never meant to run it."""

_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal has of a request's earlier attempts.

    Attributes:
        ended: its reader has a terminal frame: there is nothing left to do.
        streamed: part of a streamed answer went out.
        ids: output tokens that went out, by choice.
        events: whole events that went out after the last token's.
        part: bytes that went out of the event after those.
        body: all payload that went out.
        died: attempts that ended with their worker or its engine.
        left: attempts whose worker took it on, and gave it to another.
    """

    ended: bool = False
    streamed: bool = False
    ids: dict[int, list[int]] = field(default_factory=dict)
    events: int = 0
    part: int = 0
    body: bytes = b""
    died: tuple[Attempt, ...] = ()
    left: int = 0


NOTHING = Past()


async def fence(
    broker: base.Broker, request: Request, delivery: base.Delivery, writer: replies.Writer, worker: str
) -> Past:
    """Take the request over from its earlier attempts, and say how far they came.

    The first frame under the new epoch shuts them out: of what they still say, readers take only what the
    journal has before it. So the journal is read up to there; before that, who heard what it lacks publishes
    it again: the journal was without a leader perhaps, and the reader has tokens that nobody else knows.

    Raises errors.FramesLost when it lacks frames, errors.Unavailable, and errors.MalformedMessage when
    someone else wrote there.
    """
    newest = await _newest(broker, request, delivery)
    frames = [] if newest is None else await replies.journal(broker, request.reply_to, delivery.enqueued_ms)
    if newest is not None and newest.kind in TERMINAL:
        # It may be of an attempt that was given up, whose end readers do not take.
        with contextlib.suppress(errors.FramesLost):
            told = past(frames)
            if told.ended:
                return told
    if newest is None or not mute(frames, writer.epoch):
        await _fill(broker, request, delivery)
    await writer.beat(worker)
    try:
        return past(await _before(broker, request, delivery, writer.epoch))
    except errors.Unavailable as exc:
        with contextlib.suppress(errors.HeadraceError):
            await writer.beat(worker, left=exc.message)  # else it counts as a death
        raise


async def _newest(broker: base.Broker, request: Request, delivery: base.Delivery) -> Frame | None:
    """The journal's newest frame, once it has a leader. Raises errors.Unavailable."""
    deadline = asyncio.get_running_loop().time() + _ELECTION
    while True:
        try:
            return await replies.last_frame(broker, request.reply_to, delivery.enqueued_ms)
        except errors.Unavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(_POLL)


async def _fill(broker: base.Broker, request: Request, delivery: base.Delivery) -> None:
    """Have the journal get the frames that others have heard and it has not. What stays lost nobody has."""
    for pause in (0.0, _POLL, _POLL):
        await asyncio.sleep(pause)
        with contextlib.suppress(errors.Unavailable):  # nobody has any
            await broker.ask(subjects.again(request.reply_to), b"{}", _HEARD)
        assembler = Assembler()
        with contextlib.suppress(errors.FramesLost):
            assembler.feed_all(await replies.journal(broker, request.reply_to, delivery.enqueued_ms))
            if not assembler.gap:
                return


async def _before(
    broker: base.Broker, request: Request, delivery: base.Delivery, epoch: int
) -> Sequence[Frame]:
    """What the journal has before the first frame of `epoch`, once it has that. Raises errors.Unavailable."""
    deadline = asyncio.get_running_loop().time() + _FENCE_LIMIT
    for pause in itertools.chain((0.0, 0.005, 0.02), itertools.repeat(0.1)):
        await asyncio.sleep(pause)
        frames = await replies.journal(broker, request.reply_to, delivery.enqueued_ms)
        fenced = [n for n, frame in enumerate(frames) if frame.epoch == epoch]
        if fenced:
            return frames[: fenced[0]]
        if asyncio.get_running_loop().time() > deadline:
            raise errors.Unavailable("the journal of replies does not keep what is written to it")
    raise AssertionError  # the pauses never end


def past(frames: Sequence[Frame]) -> Past:
    """What `frames`, in the journal's order, come to: up to the first that is missing. No reader has passed
    on what stands behind that. Raises errors.FramesLost when the first of all is missing."""
    assembler = Assembler()
    said = assembler.feed_all(frames)
    if assembler.finished:
        return Past(ended=True)
    if assembler.gap and not said:
        raise errors.FramesLost("the journal lacks the beginning of the answer")
    said = [frame for frame in said if frame.kind is not FrameKind.BEAT]
    ids: dict[int, list[int]] = {}
    rest = b""
    for frame in said:
        tokens = [(0, frame.ids), *((index, more) for index, _, more in frame.choices)]
        for index, more in tokens:
            if more:
                ids.setdefault(index, []).extend(more)
        rest = b"" if any(more for _, more in tokens) else rest + frame.payload
    *events, part = rest.split(_END)
    return Past(
        streamed=bool(said),
        ids=ids,
        events=len(events),
        part=len(part),
        body=b"".join(frame.payload for frame in said),
        died=died(frames),
        left=sum(frame.extra.get("left") not in (None, PASSED_ON) for frame in frames),
    )


def mute(frames: Sequence[Frame], epoch: int) -> bool:
    """Whether all attempts before `epoch` gave the request to another worker and said nothing of an answer:
    then no reader has heard what the journal lacks."""
    said: dict[int, set[int]] = {}
    left: dict[int, int] = {}
    for frame in frames:
        if frame.kind is FrameKind.BEAT:
            said.setdefault(frame.epoch, set()).add(frame.seq)
            if frame.extra.get("left"):
                left[frame.epoch] = frame.seq
    return all(
        attempt in left and said[attempt] >= set(range(left[attempt] + 1)) for attempt in range(1, epoch)
    )


def died(frames: Sequence[Frame]) -> tuple[Attempt, ...]:
    """Attempts that began and neither ended nor handed the request back."""
    attempts: dict[int, Attempt] = {}
    for frame in frames:
        worker = frame.extra.get("worker")
        if frame.kind in TERMINAL or frame.extra.get("left"):
            attempts.pop(frame.epoch, None)
        elif isinstance(worker, str) and frame.epoch != QUEUED_EPOCH:
            at_ms = int(frame.extra.get("at", 0))
            attempts.setdefault(
                frame.epoch, Attempt(epoch=frame.epoch, worker=worker, at_ms=at_ms, what="died")
            )
    return tuple(attempts.values())


def refusal(past: Past, request: Request, continues: bool) -> errors.HeadraceError | None:
    """Why an answer that was begun can't be continued; None when it can, or was not begun."""
    if not past.streamed:
        return None
    if not continues:
        return errors.WorkerLost(
            "the worker was lost while it was answering, and this engine can't continue an answer; "
            "send the request again"
        )
    if several_prompts(request.body):
        return errors.WorkerLost(
            "the worker was lost while it was answering, and an answer to several prompts can't be "
            "continued; send the request again"
        )
    return None


def several_prompts(body: bytes) -> bool:
    """Their outputs are generated side by side, and what was said of which is not told apart."""
    try:
        prompt = orjson.loads(body).get("prompt")
    except (ValueError, AttributeError):
        return False
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


class Joint:
    """Holds back what a run says again, and lets the rest join on to what its caller has. Pure."""

    def __init__(self, past: Past) -> None:
        self._past = past
        self._left = {index: len(ids) for index, ids in past.ids.items()}
        self._events, self._part = past.events, past.part
        self._again = b""
        self._names: dict[bytes, bytes] | None = None
        self._ahead = 0  # what this run's event numbers are above those that its caller is to see

    def feed(self, body: bytes, tokens: list[tuple[int, list[int]]]) -> bytes:
        """What is new of a part of the run's answer; `tokens` loses those that the caller has.

        Raises errors.WorkerLost when it holds old and new tokens in one.
        """
        new = [(index, ids) for index, ids in tokens if not self._known(index, len(ids))]
        if new and len(new) < len(tokens):
            raise errors.WorkerLost("the answer can't be continued: old and new tokens came in one piece")
        if (tokens and not new) or (not tokens and any(self._left.values())):
            self._again += body
            tokens.clear()
            return b""
        body = self._skip(body)
        if self._names is not None or not body:
            return self._renamed(body)
        self._names = renamed(self._past.body, self._again or body)
        self._ahead = _last_number(self._again) - _last_number(self._past.body) if self._again else 0
        body = self._renamed(body)
        return body if self._again else self._unopened(body)

    @property
    def reached(self) -> bool:
        """The run has come to where its caller is."""
        return not (any(self._left.values()) or self._events or self._part)

    def _known(self, index: int, count: int) -> bool:
        left = self._left.get(index, 0)
        if not left:
            return False
        if count > left:
            raise errors.WorkerLost("the answer can't be continued: old and new tokens came in one piece")
        self._left[index] = left - count
        return True

    def _skip(self, body: bytes) -> bytes:
        """Without what went out after the last known token."""
        if not (self._events or self._part) or any(self._left.values()):
            return body
        whole = body
        while self._events and body:
            _, end, body = body.partition(_END)
            self._events -= bool(end)
        if not self._events:
            skipped = min(self._part, len(body))
            self._part -= skipped
            body = body[skipped:]
        self._again += whole[: len(whole) - len(body)]
        return body

    def _unopened(self, body: bytes) -> bytes:
        """Without the events that an answer begins with, where they come in one piece with a token of a
        choice that had said nothing: which choice is the first to speak differs from run to run."""
        for event in self._past.body.split(_END)[:-1]:
            if not body.startswith(event + _END):
                break
            body = body[len(event + _END) :]
        return body

    def _renamed(self, body: bytes) -> bytes:
        if self._names:
            body = _NAMED.sub(self._rename, body)
        return _NUMBERED.sub(self._renumber, body) if self._ahead else body

    def _renumber(self, found: re.Match[bytes]) -> bytes:
        return b"%s%d" % (found[1], int(found[2]) - self._ahead)

    def _rename(self, found: re.Match[bytes]) -> bytes:
        assert self._names is not None
        return self._names.get(found[0], found[0])


_NAMED = re.compile(
    rb'"(?:id|item_id|response_id|call_id|created|created_at)":\s*(?:"[^"\\]*"|\d+(?:\.\d+)?)'
)
"""What two runs of one request say differently: their names and dates. A text can't hold it: there, a quote
follows a backslash."""

_NUMBERED = re.compile(rb'("sequence_number":\s*)(\d+)')
"""`/v1/responses` numbers its events. How many tokens an event brings differs from run to run, and so do
the numbers."""


def _last_number(body: bytes) -> int:
    """Of the events in `body`; -1 where none has a number."""
    found = _NUMBERED.findall(body)
    return int(found[-1][1]) if found else -1


def renamed(before: bytes, again: bytes) -> dict[bytes, bytes]:
    """What the new run calls otherwise than the old, as `"key":value`, to what the old called it."""
    olds, news = (list(dict.fromkeys(_NAMED.findall(text))) for text in (before, again))
    pairs = itertools.takewhile(lambda pair: _key(pair[0]) == _key(pair[1]), zip(news, olds, strict=False))
    return {new: old for new, old in pairs if new != old}


def _key(named: bytes) -> bytes:
    return named.partition(b":")[0]
