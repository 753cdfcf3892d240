"""The broker's time of day, as a client of it knows it. Pure."""

from __future__ import annotations

import math


class Clock:
    """What the broker's clock shows, from answers that tell it.

    An answer told the time between its question and itself, so that each bounds how far the clocks are
    apart; what all of them allow is narrower than what one does. One that contradicts them says that a
    clock was set, or has drifted: it counts alone.
    """

    def __init__(self) -> None:
        self._least, self._most = -math.inf, math.inf

    def told(self, asked: float, at_ms: float, answered: float) -> None:
        """`at_ms`: what the broker's clock showed between `asked` and `answered`, seconds of ours."""
        least, most = at_ms - answered * 1000, at_ms - asked * 1000
        if least <= self._most and most >= self._least:
            least, most = max(least, self._least), min(most, self._most)
        self._least, self._most = least, most

    @property
    def known(self) -> bool:
        return self._most < math.inf

    def at_ms(self, now: float) -> float:
        """Unix time in ms at `now`, seconds of our clock; for one that is known."""
        return now * 1000 + (self._least + self._most) / 2
