"""How many workers those who go first need, so that whoever comes after them can fill the others. Pure.

Room that is kept for newcomers on every worker lies idle on every worker, and what runs beside them makes
every step longer. Kept on some, it costs less, and those who go first have these nearly for themselves.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from scheduler.dispatch.lanes import ROWS

SPAN = 1.0
"""Time constant of the prompt tokens that are sent in a second, in seconds."""


class Reserve:
    """What workers were sent and hold, by row (`lanes.ROWS`), the first to be served first."""

    def __init__(self) -> None:
        self._sent = [0.0] * ROWS  # prompt tokens in the last `SPAN`, about
        self._at = -math.inf
        self._held = [0] * ROWS
        self._room = [0.0] * ROWS

    def add(self, row: int, cost: float, room: float, now: float) -> None:
        """A worker was sent one that computes `cost` prompt tokens and will take `room` of its KV cache."""
        self._fade(now)
        self._sent[row] += cost
        self._held[row] += 1
        self._room[row] += room

    def remove(self, row: int, room: float) -> None:
        """It is there no more."""
        self._held[row] -= 1
        self._room[row] -= room

    def needs(self, rate: float, slots: float, kv_total: float, now: float) -> NDArray[np.float64]:
        """By row: how many workers all rows before it are filling.

        Args:
            rate: prompt tokens that a worker computes in a second.
            slots: requests that one holds.
            kv_total: tokens of one's KV room; 0 = unknown.
        """
        self._fade(now)
        parts = [
            np.array(self._sent) / (SPAN * max(rate, 1.0)),
            np.array(self._held) / max(slots, 1.0),
            np.array(self._room) / (kv_total or math.inf),
        ]
        before = np.cumsum(parts, axis=1).max(axis=0)
        return np.concatenate([[0.0], before[:-1]])

    def _fade(self, now: float) -> None:
        if now > self._at:
            fade = math.exp((self._at - now) / SPAN)
            self._sent = [fade * tokens for tokens in self._sent]
            self._at = now
