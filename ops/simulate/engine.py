"""The engine of one simulated worker: the sim engine's step model under a virtual clock.

Where nothing but decodes runs, and nothing else may start, the steps until the first of them ends are all
alike: they are done at once. Everything comes out as if they had been done one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Generic, TypeVar

from workers.config import SimConfig
from workers.engines.step_model import Sequence, State, StepModel

S = TypeVar("S", bound=Sequence)


@dataclass(slots=True)
class _Leap:
    """Decode steps from `start` on: the first takes `first` seconds, each next one `longer` more."""

    start: float
    steps: int
    first: float
    longer: float

    def end(self, steps: int) -> float:
        return self.start + steps * self.first + self.longer * steps * (steps - 1) / 2

    def step_at(self, now: float) -> int:
        """The step that runs at `now`, from 1; at the moment between two it is the earlier."""
        elapsed = max(0.0, now - self.start)
        rate = self.first + self.longer * elapsed / max(self.first, 1e-12) / 2
        step = max(1, math.ceil(elapsed / rate)) if rate else self.steps
        while step > 1 and self.end(step - 1) >= now:
            step -= 1
        while step < self.steps and self.end(step) < now:
            step += 1
        return step


class Engine(Generic[S]):
    """Who holds the clock calls `begin`, lets it reach `ends`, then calls `finish`. Times in seconds.

    Attributes:
        ends: when what has begun ends; inf = nothing runs. `add` and `abort` may bring it nearer.
        steps: how many steps have ended.
    """

    def __init__(self, config: SimConfig) -> None:
        self.model: StepModel[S] = StepModel(config)
        self.ends = math.inf
        self.steps = 0
        self._leap: _Leap | None = None
        self._stuck = False  # the last step admitted none of those that wait, nor will the next

    @property
    def idle(self) -> bool:
        return self.ends == math.inf

    def add(self, seq: S, now: float) -> None:
        """Queue it for the next step. Raises ValueError for one that could never run to its end."""
        self.model.add(seq)
        self._stuck = False
        self._halt(now)

    def abort(self, seq: S, now: float) -> None:
        """Drop it; `generated` is what it has made until now. Idempotent."""
        leap = self._leap
        if leap is not None and seq.state is State.RUNNING:
            step = leap.step_at(now)
            self._fill(step)  # with what was free before its own blocks are
            seq.generated += step - 1
        self.model.abort(seq)
        self._stuck = False
        self._halt(now)

    def begin(self, now: float) -> tuple[Items[S], Items[S]]:
        """Start the next step, or several: those of whose prompts something is computed in it, and those that
        were thrown back to the waiting ones."""
        if steps := self._alike():
            self._start_leap(now, steps)
            return (), ()
        step = self.model.begin()
        if step is None:
            self.ends = math.inf
            return (), ()
        self.ends = now + step.duration_ms / 1000
        prefills = [seq for seq in step.batch if not _decodes(seq)]
        self._stuck = bool(self.model.waiting) and not prefills and not step.preempted
        return prefills, step.preempted

    def finish(self) -> list[S]:
        """End what has begun: those that have their first token, or their last."""
        leap, self._leap = self._leap, None
        if leap is None:
            self.steps += 1
            told = [s for s in self.model.finish() if s.generated == 1 or s.state is State.FINISHED]
            if any(seq.state is State.FINISHED for seq in told):
                self._stuck = False
            return told
        self.steps += leap.steps
        return self._land(leap.steps)

    def kv_free(self, now: float) -> int:
        """Tokens of KV room, counting what a leap has filled by `now`."""
        config, pool = self.model.config, self.model.pool
        grown = 0
        if self._leap is not None:
            grown = (self._leap.step_at(now) - 1) * len(self.model.running)
        return max(0, pool.available * config.block_size - grown)

    def _alike(self) -> int:
        """Decode steps that are known to come, one after another; 0 = none."""
        model = self.model
        running, most = model.running, model.config.max_num_seqs
        if not running or len(running) > model.config.max_num_batched_tokens:
            return 0
        if model.waiting and not self._stuck and len(running) < most:
            return 0
        if not all(map(_decodes, running)):
            return 0
        steps = min([seq.max_tokens - seq.generated for seq in running])
        size, available = model.config.block_size, model.pool.available
        if len(running) * (steps // size + 1) > available:
            steps = _fitting(running, size, steps, available)
        return steps

    def _start_leap(self, now: float, steps: int) -> None:
        running, config = self.model.running, self.model.config
        read = sum([seq.computed for seq in running]) + len(running)
        first = config.beta0 + config.beta3 * read + config.beta4 * len(running)
        longer = config.beta3 * len(running)
        if config.kappa:
            factor = 1 + config.kappa * len({seq.adapter for seq in running} - {""})
            first, longer = first * factor, longer * factor
        self._leap = _Leap(now, steps, first / 1000, longer / 1000)
        self.ends = self._leap.end(steps)

    def _land(self, steps: int) -> list[S]:
        model = self.model
        self._fill(steps)
        ended: list[S] = []
        for seq in model.running:
            seq.computed += steps
            seq.generated += steps
            if seq.generated == seq.max_tokens:
                ended.append(seq)
        for seq in ended:
            seq.state = State.FINISHED
            model.pool.release(seq.held, seq.private)
            seq.held, seq.private = [], 0
        if ended:
            model.running = [seq for seq in model.running if seq.state is State.RUNNING]
            self._stuck = False
        return ended

    def _fill(self, steps: int) -> None:
        """Take the blocks that the first steps of a leap need."""
        size, pool = self.model.config.block_size, self.model.pool
        for seq in self.model.running:
            if fresh := -(-(seq.computed + steps) // size) - len(seq.held) - seq.private:
                pool.take(fresh)
                seq.private += fresh

    def _halt(self, now: float) -> None:
        """No step of a leap begins after `now`: what has changed must be looked at first."""
        if (leap := self._leap) is not None:
            leap.steps = leap.step_at(now)
            self.ends = leap.end(leap.steps)


def _decodes(seq: Sequence) -> bool:
    """Its next token, and no more, is to be computed."""
    return seq.generated > 0 and seq.computed == seq.prompt_tokens + seq.generated - 1


def _fitting(running: Items[Sequence], size: int, steps: int, available: int) -> int:
    """Of `steps`, those for which `available` blocks are enough."""
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        need = sum(-(-(s.computed + middle) // size) - len(s.held) - s.private for s in running)
        low, high = (middle, high) if need <= available else (low, middle - 1)
    return low
