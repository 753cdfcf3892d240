"""An event loop whose time is its own: it stands still while anything can run, and jumps to the next timer
when nothing can. Minutes pass in milliseconds, and one program runs in one order."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, TypeVarTuple, Unpack
from unittest import mock

T = TypeVar("T")
Args = TypeVarTuple("Args")

UNIX = 1_800_000_000.0
"""Unix time in seconds at which a loop's time is 0."""


class _Selector(selectors.SelectSelector):
    """Instead of waiting, lets time pass. No file is watched: what is tested has no I/O."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is left that could happen: whoever waits would wait for ever")
        self.loop.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`now` is the loop's time in seconds. An executor's work is done at once: nothing runs beside it."""

    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def unix(self) -> float:
        return UNIX + self.now

    def run_in_executor(
        self, executor: Any, func: Callable[[Unpack[Args]], T], *args: *Args
    ) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        done.set_result(func(*args))
        return done

    def wind_up(self) -> None:
        """Cancel what still runs, and close."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.close()


@contextlib.contextmanager
def virtual_time() -> Iterator[VirtualLoop]:
    """A loop, with `time.time` and `time.monotonic` by its clock."""
    loop = VirtualLoop()
    with mock.patch.object(time, "time", loop.unix), mock.patch.object(time, "monotonic", loop.time):
        try:
            yield loop
        finally:
            loop.wind_up()
