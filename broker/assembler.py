"""Reply frames put in order, each passed on once: over attempts, gaps, repeats and used ids. Pure: no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from broker import errors
from broker.messages import LAST_EPOCH, TERMINAL, Frame, FrameKind

_HELD_LIMIT = 4096
_OVERLAP = 256
"""Tokens of each choice by which a later attempt is seen to say the same again."""


class Assembler:
    """Puts frames in order, each once. Pure: no I/O; `gap` says when frames are missing.

    A frame of an older epoch is dropped. A newer epoch starts again at seq 0 and goes on, without a
    head of its own, at the output token that the earlier ones came to; what it repeats is dropped. An
    answer that is not streamed is passed on whole, at its end: one that was cut short may so begin anew.

    While a newer epoch has said nothing but that it is there, the one before may still come to its end: its
    worker was not lost, and has acked the request perhaps.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.next_seq = 0
        self.finished = False
        self._said: dict[int, _Said] = {0: _Said()}
        self._mute = 0  # frames without tokens that were passed on since the last token of choice 0
        self._headed = False
        self._whole: list[Frame] | None = None
        self._spoke = False  # this epoch has said more than beats
        self._before: dict[int, int] = {}  # earlier epochs and their next seq, while it has not
        self._held: dict[tuple[int, int], Frame] = {}

    @property
    def tokens(self) -> dict[int, int]:
        """Output tokens passed on, by choice."""
        return {index: said.count for index, said in self._said.items() if said.count}

    @property
    def gap(self) -> bool:
        """Frames are held back because an earlier one is missing."""
        return not self.finished and any(epoch >= self.epoch for epoch, _ in self._held)

    def feed(self, frame: Frame) -> list[Frame]:
        """The frames that may now be forwarded, in order.

        Raises errors.FramesLost when more is held back than any repair could explain, or when an
        attempt goes on past what was seen.
        """
        ready: list[Frame] = []
        if frame.seq == self.next_seq and frame.epoch == self.epoch and not self._held and not self.finished:
            # Every frame of an undisturbed stream takes this way.
            self.next_seq += 1
            self._place(frame, ready)
        elif not self.finished and self._may_count(frame):
            self._held[frame.epoch, frame.seq] = frame
            if len(self._held) > _HELD_LIMIT:
                raise errors.FramesLost("reply frames are missing and too many wait behind them")
            self._release(ready)
        return ready

    def feed_all(self, frames: Iterable[Frame]) -> list[Frame]:
        """As `feed`, one after the other."""
        return [new for frame in frames for new in self.feed(frame)]

    def rest(self, frames: list[Frame]) -> list[Frame]:
        """Of a whole reply, put in order anew, what was not passed on here. Tokens tell; frames without any
        are counted.

        Raises errors.FramesLost when it says otherwise than what was passed on.
        """
        off, mute = self._said[0].count, self._mute
        rest: list[Frame] = []
        for frame in frames:
            if frame.kind in TERMINAL:
                rest.append(frame)
            elif frame.kind is FrameKind.BEAT:
                if not self._headed and (frame.epoch, frame.seq) >= (self.epoch, self.next_seq):
                    rest.append(frame)
            elif self._new(frame):
                if mute and frame.off == off and not frame.ids and not frame.choices:
                    mute -= 1
                else:
                    rest.append(frame)
        return rest

    def _may_count(self, frame: Frame) -> bool:
        if (frame.epoch, frame.seq) >= (self.epoch, self.next_seq):
            return True
        following = self._before.get(frame.epoch)
        return following is not None and frame.seq >= following

    def _release(self, ready: list[Frame]) -> None:
        """Place those held back whose turn has come."""
        while not self.finished:
            following = self._held.pop((self.epoch, self.next_seq), None)
            if following is not None:
                self.next_seq += 1
                self._place(following, ready)
            elif not self._advance_epoch():
                self._end_before(ready)
                return

    def _end_before(self, ready: list[Frame]) -> None:
        """Let an attempt before this one have the last word, if all that it said is here, to its end."""
        for epoch, seq in self._before.items():
            rest: list[Frame] = []
            while (frame := self._held.get((epoch, seq + len(rest)))) and frame.kind is not FrameKind.ERROR:
                rest.append(frame)
            if rest and rest[-1].kind is FrameKind.END:
                for frame in rest:
                    self._place(frame, ready)
                return

    def _advance_epoch(self) -> bool:
        """Move to the newest epoch whose first frame is here."""
        newest = max((epoch for epoch, seq in self._held if seq == 0), default=self.epoch)
        if newest <= self.epoch:
            return False
        self._before[self.epoch] = self.next_seq
        self._spoke = False
        self.epoch, self.next_seq = newest, 0
        self._let_go()
        return True

    def _let_go(self) -> None:
        """Of what can't count any more."""
        self._held = {
            key: frame for key, frame in self._held.items() if key[0] >= self.epoch or key[0] in self._before
        }

    def _place(self, frame: Frame, ready: list[Frame]) -> None:
        """Add to `ready` what may be passed on now that `frame`'s turn has come."""
        if not self._spoke and frame.kind is not FrameKind.BEAT:
            self._spoke = True
            if self._before:
                self._before = {}
                self._let_go()
        if frame.kind in TERMINAL:
            self.finished = True
            if frame.kind is FrameKind.END and self._whole is not None:
                ready += self._whole
            ready.append(frame)
        elif frame.kind is FrameKind.BEAT:
            if not self._headed:
                ready.append(frame)
        elif frame.kind is FrameKind.HEAD and not _streamed(frame) and not self._headed:
            self._whole = [frame]
        elif self._whole is not None and frame.kind is FrameKind.DATA:
            self._whole.append(frame)
        elif self._follows(frame):
            ready.append(frame)

    def _follows(self, frame: Frame) -> bool:
        """Whether this part of a streamed answer is new. Raises errors.FramesLost when it is out of place."""
        if frame.kind is FrameKind.HEAD:
            if self._headed:
                raise errors.FramesLost("the answer was begun anew after a part of it had been passed on")
            self._headed, self._whole = True, None
        return self._new(frame)

    def _new(self, frame: Frame) -> bool:
        """Whether what a frame says comes next; False when it was said before. Raises errors.FramesLost."""
        if not frame.choices and frame.off == self._said[0].count:
            self._said[0].add(frame.ids)
            self._mute = 0 if frame.ids else self._mute + 1
            return True
        new = old = 0
        for index, off, ids in _tokens(frame):
            said = self._said.setdefault(index, _Said())
            fresh = said.compare(off, ids)
            new, old = new + fresh, old + (not fresh)
        if new and old:
            raise errors.FramesLost("the reply goes on in the middle of a frame that was seen")
        if new:
            for index, _, ids in _tokens(frame):
                self._said[index].add(ids)
            self._mute = 0 if frame.ids else self._mute
        return bool(new)


class _Said:
    """Output tokens of one choice that were passed on."""

    __slots__ = ("count", "last")

    def __init__(self) -> None:
        self.count = 0
        self.last: deque[int] = deque(maxlen=_OVERLAP)

    def compare(self, off: int, ids: list[int]) -> bool:
        """Whether `ids`, from `off` on, come next; False when they were passed on before. Raises
        errors.FramesLost for anything else."""
        if off == self.count:
            return True
        again = self.count - off
        if again < 0:
            raise errors.FramesLost(f"the reply goes on at token {off}, but {self.count} were seen")
        if again < len(ids):
            raise errors.FramesLost("the reply goes on in the middle of a frame that was seen")
        known = list(self.last)[-again:] if again <= len(self.last) else []
        if known and known[: len(ids)] != ids:
            raise errors.FramesLost("the answer goes on otherwise than it was passed on")
        return False

    def add(self, ids: list[int]) -> None:
        self.count += len(ids)
        self.last.extend(ids)


def _tokens(frame: Frame) -> list[tuple[int, int, list[int]]]:
    """(choice, tokens before, tokens) for each choice of a frame; choice 0 stands for one without any."""
    found: dict[int, tuple[int, list[int]]] = {}
    for index, off, ids in frame.choices:
        before, earlier = found.get(index, (off, []))
        found[index] = before, [*earlier, *ids]  # a frame names a choice for each of its outputs
    more = [(index, off, ids) for index, (off, ids) in found.items()]
    return more if more and not frame.ids else [(0, frame.off, frame.ids), *more]


def _streamed(head: Frame) -> bool:
    headers = head.extra.get("headers", {})
    return isinstance(headers, dict) and str(headers.get("content-type", "")).startswith("text/event-stream")


def newest_request(frames: list[Frame]) -> int:
    """Where the frames of the newest request of one id begin.

    The first frame of an attempt, and the note that a request is queued, name its place in the queue: a
    higher one is a newer request's. Where frames name none, those that stand behind an end begin a request,
    but for late frames of an attempt that was given up, what was published once more, and the first word,
    and only one, of a worker that was about to take the request over.
    """
    places = [(number, n) for n, frame in enumerate(frames) if (number := place(frame))]
    if places:
        newest = max(places)[0]
        first = next(n for number, n in places if number == newest)
        older = min(places)[0] < newest or any(frame.kind in TERMINAL for frame in frames[:first])
        return first if older else 0
    start, ended = 0, 0
    for n, frame in enumerate(frames):
        late = frame.kind is FrameKind.BEAT and frame.epoch > ended and n == len(frames) - 1
        if ended and frame.seq == 0 and not late and frame not in frames[:n]:
            start, ended = n, 0
        if frame.kind in TERMINAL:
            ended = max(frame.epoch, 1) if frame.epoch < LAST_EPOCH else 1
    return start


def place(frame: Frame) -> int:
    """Where in the queue the request lies, or lay, as an attempt's first frame or a note names it; else 0."""
    number = frame.extra.get("request") or frame.extra.get("queued")
    return number if frame.seq == 0 and isinstance(number, int) else 0
