"""One request's answer: its tokens as they fall due, their text, their stops."""

from __future__ import annotations

import time
from typing import NamedTuple

from workers.config import SimConfig
from workers.engines.sim_formats import Choice, Usage
from workers.engines.sim_pace import Output, Pacer, Reader
from workers.engines.sim_request import CHAT_TOKENS, Generation
from workers.engines.sim_tokens import Continuation, text_of_token
from workers.engines.step_model import block_hashes


class Piece(NamedTuple):
    """One token of a choice. `reason` is "" until the choice's last one."""

    choice: int
    text: str
    ids: list[int]
    reason: str


class StopScan:
    """Looks for stop strings across tokens, holding back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...], min_tokens: int) -> None:
        self._stops = stops
        self._min_tokens = min_tokens
        self._hold = max(map(len, stops)) - 1
        self._tail = ""
        self._seen = 0

    def feed(self, text: str) -> tuple[str, bool]:
        """The text of one more token in, (text to show, stopped) out."""
        self._seen += 1
        if self._seen <= self._min_tokens:
            return text, False
        text = self._tail + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        shown = max(len(text) - self._hold, 0)
        self._tail = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What is still held back when the end has come without a stop string."""
        return self._tail


class _Lane:
    """A choice that is being generated."""

    __slots__ = ("choice", "index", "limit", "output", "past", "scan", "tokens")

    def __init__(
        self, index: int, limit: int, output: Output, tokens: Continuation, choice: Choice, past: list[int]
    ) -> None:
        self.index, self.limit, self.output, self.choice = index, limit, output, choice
        self.tokens, self.past = tokens, past
        self.scan: StopScan | None = None


class Answer:
    """All choices of a request. `close` frees what they hold."""

    def __init__(self, generation: Generation, config: SimConfig, pacer: Pacer, reader: Reader) -> None:
        self._generation = generation
        self._pacer = pacer
        self._reader = reader
        self._first: list[Output] = []
        self._all: list[_Lane] = []
        replay = {} if reader.tap is None else reader.tap.replay
        for prompt, limit in zip(generation.prompts, generation.limits, strict=True):
            for number in range(generation.n):
                past = list(replay.get(len(self._all), ()))[:limit]
                # Prompt and past output, given as a prompt, go on as the whole would have.
                given = prompt + past
                hashes = block_hashes(given, config.block_size, generation.salt)
                adapter = generation.adapter
                output = Output(len(given), limit - len(past), hashes, adapter, reader=reader)
                tokens = Continuation(given, 0 if past else number, adapter)
                lane = _Lane(len(self._all), limit, output, tokens, Choice(prompt), past)
                if generation.stops:
                    lane.scan = StopScan(generation.stops, generation.min_tokens)
                self._all.append(lane)
                if not number:
                    self._first.append(output)
        self._live = list(self._all)
        if reader.tap is not None:
            reader.tap.prompt_tokens = self.usage.prompt
        self._replayed = self._replay()
        for lane in self._live:
            pacer.add(lane.output)

    @property
    def choices(self) -> list[Choice]:
        return [lane.choice for lane in self._all]

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt=sum(map(len, self._generation.prompts)),
            cached=self._cached,
            output=sum(len(lane.choice.ids) for lane in self._all),
        )

    @property
    def _cached(self) -> int:
        return sum(
            min(output.cached or 0, len(prompt))
            for output, prompt in zip(self._first, self._generation.prompts, strict=True)
        )

    @property
    def done(self) -> bool:
        return not (self._live or self._replayed)

    async def take(self) -> list[Piece]:
        """Wait for tokens, then all that are due. [] = the client is gone.

        Raises what broke the engine.
        """
        reader = self._reader
        if self._replayed:
            pieces, self._replayed = self._replayed, []
            return pieces
        while not reader.closed:
            pieces = []
            for lane in self._live:
                if lane.output.due:
                    # A reader may have some of these: one by one, none comes with one that it has not.
                    due = 1 if lane.past else lane.output.due
                    lane.output.due -= due
                    self._advance(lane, lane.tokens.take(due), pieces)
            if pieces:
                self._drop_ended(pieces)
                return pieces
            await reader.wait()
        if reader.error is not None:
            raise reader.error
        return []

    def close(self) -> None:
        for lane in self._all:
            self._pacer.abort(lane.output)

    def _replay(self) -> list[Piece]:
        """What an earlier attempt said, before anything new."""
        pieces: list[Piece] = []
        for lane in self._live:
            if lane.past:
                self._advance(lane, lane.past, pieces)
        self._drop_ended(pieces)
        return pieces

    def _drop_ended(self, pieces: list[Piece]) -> None:
        if any(piece.reason for piece in pieces):
            self._live = [lane for lane in self._live if not lane.choice.reason]

    def _advance(self, lane: _Lane, tokens: list[int], pieces: list[Piece]) -> None:
        """Add the next tokens of one choice to `pieces`, and to the tap."""
        output, choice, tap = lane.output, lane.choice, self._reader.tap
        before = len(choice.ids)
        for token in tokens:
            ids = [token]
            choice.ids.append(token)
            text = text_of_token(token)
            ended = len(choice.ids) == lane.limit
            if lane.scan is not None:
                text, stopped = lane.scan.feed(text)
                if stopped:
                    choice.reason = "stop"
                    self._pacer.abort(output)
                elif ended:
                    text += lane.scan.flush()
            if ended and not choice.reason:
                choice.reason = self._reason(lane)
            choice.text.append(text)
            pieces.append(Piece(lane.index, text, ids, choice.reason))
            if choice.reason:
                break
        if tap is not None:
            if not before:
                tap.cached_tokens = self._cached
            tap.tokens(time.monotonic(), lane.index, choice.ids[before:])

    def _reason(self, lane: _Lane) -> str:
        return "stop" if self._generation.ends and lane.tokens.number >= CHAT_TOKENS else "length"
