"""A request for an adapter waits here until that is loaded and has a slot, before it reaches the engine.

While it waits it can be cancelled, pass its deadline, or be handed back, as one that runs. It has nothing of
the engine, and counts against nothing that the engine may take; how many wait is bounded apart, in all and
for each adapter, and one too many goes back into the queue for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from broker import errors
from workers import metrics
from workers.adapters import Adapters
from workers.job import HandBack, Job
from workers.slots import Slots

_log = logging.getLogger(__name__)

FULL = 0.5
"""Seconds for which a request goes back that finds too many waiting."""


async def before_stop(job: Job, wanted: asyncio.Future[Any], what: str) -> bool:
    """Wait until `wanted` is done, or `job` is stopped, or its deadline passes, which stops it. Whether
    `wanted` is done then; else it has been cancelled."""
    stopped: asyncio.Future[Any] = asyncio.ensure_future(job.stopped.wait())
    await asyncio.wait([wanted, stopped], timeout=job.left(), return_when=asyncio.FIRST_COMPLETED)
    if not wanted.done() and not job.stopped.is_set():
        job.stop(errors.DeadlineExceeded(f"the request's deadline passed while it waited {what}"))
    stopped.cancel()
    if not wanted.done():
        wanted.cancel()
        await asyncio.wait([wanted])
    return not wanted.cancelled()


@dataclass(slots=True, eq=False)
class _Ticket:
    """One request's place in the queue for a slot. `started`: it has left it, and counts as running."""

    called: asyncio.Future[None]
    started: bool = False


class Turns:
    """See the module. Owned by the worker's event loop."""

    def __init__(self, adapters: Adapters, slots: int, turn: float, room: Callable[[], int]) -> None:
        """`room`: requests that may wait; half of them for one adapter. `on_wait`, when set, is called as one
        begins to wait."""
        self.adapters = adapters
        self.on_wait: Callable[[], None] = lambda: None
        self._room = room
        self._slots: Slots[_Ticket] = Slots(slots, turn)
        self._waiting: dict[Job, str] = {}
        adapters.loading.on_unload = self._slots.forget

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def full(self, model: str) -> bool:
        """Whether no further request of `model` may wait."""
        room = self._room()
        of_model = sum(each == model for each in self._waiting.values())
        return len(self._waiting) >= room or of_model >= max(1, room // 2)

    @contextlib.asynccontextmanager
    async def turn(self, job: Job) -> AsyncIterator[errors.HeadraceError | None]:
        """`job`'s time with its adapter; gives the reason why it can't be had, if so. One that was stopped
        meanwhile has none, and must not run."""
        model = job.request.subject.model
        entered = time.monotonic()
        had, fault = False, None
        try:
            entering = asyncio.create_task(self._enter(model))
            await asyncio.sleep(0)  # one whose adapter is loaded and has its slot is in by now
            if not entering.done():
                if self.full(model):
                    job.stop(HandBack("too many wait for adapters here", FULL))
                else:
                    self._wait(job, model)
            if await before_stop(job, entering, "for its adapter"):
                had = not (failed := entering.exception())
                if failed is None or isinstance(failed, errors.HeadraceError):
                    fault = failed
                else:
                    _log.error("a request's adapter could not be had", exc_info=failed, extra=job.log_extra())
                    fault = errors.EngineFailed(f"the worker failed on its adapter: {type(failed).__name__}")
            elif not job.stopped.is_set():
                fault = HandBack("drained")  # the adapters were closed under it
        finally:
            if self._waiting.pop(job, None) is not None:
                self.adapters.wait(model, -1)
            metrics.ADAPTER_WAIT.observe(time.monotonic() - entered)
            self._tell()
        try:
            yield fault
        finally:
            if had:
                self.adapters.release(model)
                self._leave(model)

    def _wait(self, job: Job, model: str) -> None:
        self._waiting[job] = model
        self.adapters.wait(model, +1)
        self._tell()
        self.on_wait()

    def hand_back(self) -> None:
        """Those that wait go to another worker at once."""
        for job in list(self._waiting):
            job.stop(HandBack("drained"))

    async def _enter(self, model: str) -> None:
        # On disk first: a slot must not stand idle while files come over the network.
        await self.adapters.fetched(model)
        await self._slot(model)
        try:
            await self.adapters.hold(model)
        except BaseException:
            self._leave(model)
            raise

    async def _slot(self, model: str) -> None:
        ticket = _Ticket(asyncio.get_running_loop().create_future())
        self._slots.enter(model, ticket, self._now())
        self._start()
        try:
            await ticket.called
        except asyncio.CancelledError:
            if ticket.started:
                self._leave(model)
            else:
                self._slots.give_up(model, ticket)
                self._start()
            raise

    def _leave(self, model: str) -> None:
        self._slots.leave(model)
        self._start()

    def _start(self) -> None:
        swaps = self._slots.swaps
        for ticket in self._slots.start(self._now()):
            ticket.started = True
            if not ticket.called.done():  # else it is being given up, and leaves at once
                ticket.called.set_result(None)
        metrics.ADAPTER_SWAPS.inc(self._slots.swaps - swaps)
        self._tell()

    def _tell(self) -> None:
        metrics.ADAPTER_SLOTS.set(self._slots.used)
        metrics.ADAPTER_WAITING.set(len(self._waiting))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
