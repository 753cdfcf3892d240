"""When the simulated model's tokens fall due, in real time.

`StepPacer` drives the step model: requests share the engine as they share a GPU. `ClockPacer` gives
each request a clock of its own (first token after `ttft_ms`, each next after `itl_ms`): a baseline
whose timing no load changes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from workers.config import SimConfig
from workers.engines.base import EngineStats, Tap
from workers.engines.step_model import Sequence, State, StepModel, fits


class Reader:
    """The task that sends a request's tokens on; it sleeps until some are due.

    Attributes:
        error: what ended the request before its time; None = its client went away.
    """

    def __init__(self, tap: Tap | None) -> None:
        self.tap = tap
        self.closed = False
        self.error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self, error: Exception | None = None) -> None:
        if not self.closed:
            self.closed, self.error = True, error
            self.wake()

    async def wait(self) -> None:
        """Until the next `wake`. The caller has seen that nothing is due, without a suspension since."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def scheduled(self) -> None:
        if self.tap is not None and self.tap.scheduled_at is None:
            self.tap.scheduled_at = time.monotonic()


@dataclass(slots=True, eq=False, kw_only=True)
class Output(Sequence):
    """A sequence with its reader. `due`: tokens made and not yet taken; the reader resets it."""

    reader: Reader
    due: int = 0
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Pacer(Protocol):
    def add(self, output: Output) -> None: ...

    def abort(self, output: Output) -> None:
        """Drop it and free what it holds; what has ended is left alone. Idempotent."""
        ...

    def stats(self) -> EngineStats: ...

    async def run(self) -> None:
        """Make tokens fall due until cancelled."""
        ...


class StepPacer:
    """Runs the step model; the task in `run` alone begins and finishes steps."""

    def __init__(self, config: SimConfig, changed: Callable[[], None]) -> None:
        self._config = config
        self._changed = changed
        self._model: StepModel[Output] = StepModel(config)
        self._work = asyncio.Event()

    def add(self, output: Output) -> None:
        self._model.add(output)
        self._work.set()

    def abort(self, output: Output) -> None:
        if output.state in (State.WAITING, State.RUNNING):
            self._model.abort(output)
            self._changed()

    def stats(self) -> EngineStats:
        model, config = self._model, self._config
        return EngineStats(
            running=len(model.running),
            waiting=len(model.waiting),
            max_running=config.max_num_seqs,
            step_tokens=config.max_num_batched_tokens,
            kv_tokens_total=config.kv_blocks * config.block_size,
            kv_tokens_free=model.pool.available * config.block_size,
            kv_block_tokens=config.block_size,
            preemptions=model.preemptions,
            steps=model.steps,
            skipped=model.skipped,
        )

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        end = 0.0
        while True:
            step = self._model.begin()
            if step is None:
                self._changed()
                self._work.clear()
                await self._work.wait()
                end = loop.time()
                continue
            for output in step.admitted:
                output.reader.scheduled()
            self._changed()
            # From the planned end of the last step, so that lateness does not add up; but a loop that
            # was held up for long does not make good for it by steps that take no time.
            end = max(end + step.duration_ms / 1000, loop.time())
            await _until(end)
            for output in self._model.finish():
                output.due += 1
                output.reader.wake()


class ClockPacer:
    """Each request on its own clock; at most `max_num_seqs` run, of `adapter_slots` adapters, the others
    wait in order."""

    def __init__(self, config: SimConfig, changed: Callable[[], None]) -> None:
        self._config = config
        self._changed = changed
        self._ttft, self._itl = config.ttft_ms / 1000, config.itl_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._running = 0
        self._adapters: Counter[str] = Counter()  # running outputs of each
        self._waiting: deque[Output] = deque()
        self._skipped = 0

    def add(self, output: Output) -> None:
        output.state = State.WAITING
        self._waiting.append(output)
        self._admit()
        self._changed()

    def abort(self, output: Output) -> None:
        if output.state is State.WAITING:
            self._waiting.remove(output)
            output.state = State.ABORTED
        elif output.state is State.RUNNING:
            assert output.timer is not None
            output.timer.cancel()
            self._end(output, State.ABORTED)
        else:
            return
        self._changed()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            waiting=len(self._waiting),
            max_running=self._config.max_num_seqs,
            step_tokens=self._config.max_num_batched_tokens,
            kv_tokens_total=0,
            kv_tokens_free=0,
            skipped=self._skipped,
        )

    async def run(self) -> None:
        await self._loop.create_future()

    def _admit(self) -> None:
        passed: list[Output] = []
        active = set(self._adapters)
        while self._waiting and self._running < self._config.max_num_seqs:
            output = self._waiting.popleft()
            if not fits(output.adapter, active, self._config.adapter_slots):
                passed.append(output)
                continue
            output.state, output.cached = State.RUNNING, 0
            output.reader.scheduled()
            self._running += 1
            if output.adapter:
                self._adapters[output.adapter] += 1
            self._at(self._loop.time() + self._ttft, output)
        self._waiting.extendleft(reversed(passed))
        self._skipped = len(passed)

    def _at(self, when: float, output: Output) -> None:
        output.timer = self._loop.call_at(when, self._tick, when, output)

    def _tick(self, when: float, output: Output) -> None:
        output.generated += 1
        output.due += 1
        if output.generated == output.max_tokens:
            self._end(output, State.FINISHED)
            self._changed()
        else:
            # Absolute: one late tick does not delay the next.
            self._at(when + self._itl, output)
        output.reader.wake()

    def _end(self, output: Output, state: State) -> None:
        output.state, output.timer = state, None
        self._running -= 1
        if output.adapter:
            self._adapters[output.adapter] -= 1
            if not self._adapters[output.adapter]:
                del self._adapters[output.adapter]
        self._admit()


async def _until(when: float) -> None:
    loop = asyncio.get_running_loop()
    reached: asyncio.Future[None] = loop.create_future()
    timer = loop.call_at(when, _set, reached)
    try:
        await reached
    finally:
        timer.cancel()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
