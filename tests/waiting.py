"""Wait for a state that no signal tells: another process's, a server's, a library's."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

LIMIT = 60.0
"""Seconds for anything to happen, on a busy machine."""


@overload
async def until(condition: Callable[[], Awaitable[T | None]], limit: float = LIMIT) -> T: ...
@overload
async def until(condition: Callable[[], T | None], limit: float = LIMIT) -> T: ...
async def until(condition: Callable[[], object], limit: float = LIMIT) -> object:
    """Poll `condition`, a plain or a coroutine function, until it is true, and return what it found.

    Fails after `limit` seconds with the condition's source.
    """
    end = time.monotonic() + limit
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < end, f"never came true: {inspect.getsource(condition).strip()}"
        await asyncio.sleep(0.005)
