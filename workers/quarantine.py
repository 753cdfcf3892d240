"""An engine that fails request after request would draw the whole queue to itself, since nothing is as quick
as a failure. Its worker takes none for a while, then one on trial. Pure."""

from __future__ import annotations

FIRST, MOST = 1.0, 60.0
"""Seconds of the first pause, doubled with each failed trial; and the most."""


class Quarantine:
    """`limit`: failures in a row after which a pause begins. Times are in seconds on any one clock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._failures = 0
        self._until = 0.0
        self._pause = FIRST

    def failed(self, now: float) -> float:
        """Note that the engine failed on a request; the pause that this begins, 0 = none."""
        self._failures += 1
        if self._failures < self._limit or now < self._until:
            return 0.0  # what was taken before the pause says nothing new
        pause, self._pause = self._pause, min(2 * self._pause, MOST)
        self._until = now + pause
        return pause

    def succeeded(self) -> None:
        self._failures, self._until, self._pause = 0, 0.0, FIRST

    def left(self, now: float) -> float:
        """Seconds until a request may be taken."""
        return max(0.0, self._until - now)

    def room(self, now: float, running: int) -> int | None:
        """Requests that may be taken beside those which run; None = any number."""
        if self._failures < self._limit:
            return None
        return 0 if running or self.left(now) else 1
