"""Which workers have had no room for a while, from the credit in their heartbeats.

Pure: the clock is handed in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_MEMORY = 1.0
"""Seconds in which what was counts for less by a factor of e: a moment without room is no overload, nor does
the moment between two requests of a queue end one."""
_FULL = 0.9
"""Share of the last while that a worker was without room, from which on it counts as full."""


class _Worker(NamedTuple):
    at: float
    full: bool
    share: float


class Load:
    """How full each worker has been lately. Owned by the process's event loop."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}

    def observe(self, worker: str, full: bool, now: float) -> None:
        """A heartbeat; `full`: it has no room for one more request."""
        self._workers[worker] = _Worker(now, full, self.share(worker, now))

    def forget(self, worker: str) -> None:
        self._workers.pop(worker, None)

    def share(self, worker: str, now: float) -> float:
        """0 = it had room all the time, 1 = never; 0 for who was not heard."""
        known = self._workers.get(worker)
        if known is None:
            return 0.0
        kept = math.exp(-max(0.0, now - known.at) / _MEMORY)
        return known.share * kept + (1.0 - kept) * known.full

    def full(self, worker: str, now: float) -> bool:
        return self.share(worker, now) >= _FULL
