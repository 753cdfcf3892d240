"""One base's engine process in a pool: from cold to hot, to sleep, and back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from broker import processes
from broker.messages import Answer, Command
from ops import pool_metrics
from ops.child import STEADY, Child, Facts
from ops.pool_file import Base
from workers.pool import Seat, State

logger = logging.getLogger(__name__)

PAUSE, PAUSE_MOST = 0.5, 60.0
"""Seconds before one that ended by itself is started again, doubled each time; and the most."""
RETRY = 1.0
"""Seconds before a command that was not answered is told again."""
GRACE = 5.0
"""Seconds beyond the drain limit before a process that does not end is killed."""

Tell = Callable[[str, Command], Awaitable[Answer | None]]
"""Sends a command to a worker; what it answered, None where it can't be reached."""


class Instance:
    """See the module. All state belongs to the event loop; `changed` is called whenever it changed.

    Attributes:
        since: `time.monotonic()` when it came into its state.
        reason: why it is in it.
        failing: it failed, and has not served since.
        metrics_url: of its worker, while there is a process that was ready.
        heard_at: when its worker gave a heartbeat, or one could have been missed.
    """

    def __init__(
        self,
        base: Base,
        worker: str,
        arguments: Sequence[str],
        log: Path,
        drain: float,
        tell: Tell,
        changed: Callable[[], None],
    ) -> None:
        self.base = base
        self.worker = worker
        self.state: State = "cold"
        self.since = time.monotonic()
        self.reason = ""
        self.failing = False
        self.metrics_url = ""
        self.heard_at = 0.0
        self._arguments = arguments
        self._log = log
        self._drain = drain
        self._tell = tell
        self._changed = changed
        self._can_sleep = base.can_sleep
        self._start_took = base.start
        self._wake_took = base.start / 4  # a guess, until it was measured
        self._to_warm = self._was_warm = False
        self._not_before = 0.0
        self._failures = 0
        self._gave_up = ""  # why it was ended by us, as one that failed
        self._hot_at = 0.0
        self._child: Child | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def resident(self) -> int:
        """Bytes of the machine's memory that its processes take, measured."""
        return processes.resident(self.pid) if self.pid is not None else 0

    def seat(self, wanted: float | None, busy: bool, busy_at: float, elsewhere: bool) -> Seat:
        """As the decisions see it. `busy_at`: when it last had something to do."""
        return Seat(
            base=self.base.name,
            state=self.state,
            hot=self.base.hot,
            since=self.since,
            warm=self.base.warm,
            asleep=self.base.asleep,
            can_sleep=self._can_sleep,
            start=self._start_took,
            wake=self._wake_took,
            to_warm=self._to_warm,
            was_warm=self._was_warm,
            wanted=wanted,
            busy=busy,
            idle=max(busy_at, self._hot_at),
            keep=self.base.keep,
            elsewhere=elsewhere,
            not_before=self._not_before,
        )

    def start(self, reason: str) -> None:
        """From cold or failed."""
        self._child = Child(self.worker, self._arguments, self._log, self._on_ready)
        self._become("starting", reason)
        self._spawn(self._live(self._child))

    def sleep(self, reason: str) -> None:
        """From hot."""
        self._to_warm = True
        self._become("draining", reason)
        self._spawn(self._command("sleep", reason))

    def wake(self, reason: str) -> None:
        """From warm."""
        self._become("waking", reason)
        self._spawn(self._command("wake", reason))

    def stop(self, reason: str) -> None:
        """From whatever it is in; what runs has the drain limit to finish."""
        if self._child is None or (self.state == "draining" and not self._to_warm):
            return
        self._was_warm = self.state == "warm"
        self._to_warm = False
        self._become("draining", reason)
        self._spawn(self._child.stop(self._drain + GRACE))

    def heard(self, state: str) -> None:
        """Its worker's heartbeat tells this state."""
        self.heard_at = now = time.monotonic()
        if state == "asleep" and self.state == "draining" and self._to_warm:
            self._to_warm = False
            self._become("warm", self.reason)
        elif state == "asleep" and self.state == "hot":
            self._become("warm", "it sleeps, though not by the pool's word")
        elif state == "serving" and self.state == "warm":
            self._hot_at = now
            self._become("hot", "it woke, though not by the pool's word")
        elif state == "serving" and self.state == "waking":
            self._wake_took = now - self.since
            pool_metrics.START.labels(self.base.name, "warm").set(self._wake_took)
            self._hot_at = now
            self._become("hot", self.reason)

    def overdue(self, limit: float, hung_after: float) -> None:
        """End it where a start, a wake or the way to sleep takes longer than `limit`, or where it hangs."""
        now = time.monotonic()
        took = now - self.since
        silent = now - max(self.since, self.heard_at)
        if self.state in ("hot", "warm") and silent > hung_after and self._child is not None:
            logger.error("%s gives no heartbeat: it is killed", self.worker, extra={"state": self.state})
            self._was_warm = self.state == "warm"
            self._steady()
            self._give_up(f"it gave no heartbeat for {hung_after:g} s")
            self._become("draining", self._gave_up)
            self._spawn(self._child.stop(0))
            return
        slow = self.state in ("starting", "waking") and took > limit
        if slow or (self.state == "draining" and self._to_warm and took > self._drain + limit):
            logger.error("%s takes too long: it is stopped", self.worker, extra={"state": self.state})
            self._give_up(f"{self.state} took more than {limit:g} s")
            self.stop(self._gave_up)

    async def ended(self) -> None:
        """Until nothing of it runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _on_ready(self, name: str, facts: Facts) -> None:
        self.metrics_url = facts["metrics"]
        if self.state == "starting":
            self._hot_at = time.monotonic()
            self._start_took = self._hot_at - self.since
            self.failing = False
            pool_metrics.START.labels(self.base.name, "cold").set(self._start_took)
            self._become("hot", self.reason)

    async def _live(self, child: Child) -> None:
        try:
            processes.rotate(self._log)
            status = await child.run()
        except Exception as exc:  # whatever it is: its place is free again, and it is tried later
            status, why = -1, f"it could not be run: {type(exc).__name__}: {exc}"
        else:
            why = f"its process ended with status {status}; its log is {self._log}"
        self._child = None
        self.metrics_url = ""
        stopped = self.state == "draining" and not self._to_warm
        self._to_warm = self._was_warm = False
        gave_up, self._gave_up = self._gave_up, ""
        if stopped and not gave_up:
            self._failures = 0
            self.failing = False
            self._become("cold", self.reason)
            return
        logger.warning("%s: %s", self.worker, gave_up or why, extra={"status": status, "state": self.state})
        self._steady()
        self._failures += 1
        self.failing = True
        # Its pause begins now: to end it may have taken longer than that.
        doubled = min(self._failures - 1, 10)
        self._not_before = time.monotonic() + min(PAUSE_MOST, PAUSE * 2**doubled)
        self._become("failed", gave_up or why)

    def _give_up(self, why: str) -> None:
        """It failed, and is ended: nobody shall count on it any more."""
        self._gave_up = why
        self.failing = True

    def _steady(self) -> None:
        """One that lived for long has its earlier failures forgiven."""
        if self.state in ("hot", "warm") and time.monotonic() - self._hot_at > STEADY:
            self._failures = 0

    async def _command(self, do: str, reason: str) -> None:
        command = Command(do="sleep" if do == "sleep" else "wake", model=self.base.name, reason=reason)
        told = self.since
        while (answer := await self._tell(self.worker, command)) is None:
            # A command got lost, or the broker is away. It is told until something came of it; `overdue`
            # ends what never answers.
            await asyncio.sleep(RETRY)
            if self.since != told or self._child is None:
                return
        if answer.ok or self.since != told:
            return
        if do == "sleep":
            self._can_sleep = False  # as on a CPU: it is stopped from now on
        if self.state in ("waking", "draining"):
            self.stop(f"it did not {do} when it was told to")

    def _become(self, state: State, reason: str) -> None:
        self.state, self.reason, self.since = state, reason, time.monotonic()
        self._changed()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("a task of %s failed", self.worker, exc_info=exc)
