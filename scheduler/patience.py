"""How much longer than others a worker may be silent: one that was given up and was only slow is given time.

On a machine, or a network, that can't keep up, heartbeats come late. Work that is taken from a worker for
that runs twice, which makes everything later still, until nothing gets done but handing over. Pure: the
clock is handed in.
"""

from __future__ import annotations

from typing import NamedTuple

Life = tuple[str, int]
"""A worker's name, and when it started."""

MOST = 3
"""Doublings."""

MEMORY = 60.0
"""Seconds after which a false alarm is forgotten."""

_SLOW = 3
"""One that is heard again within so many times its patience was slow; else it did hang."""


class _GivenUp(NamedTuple):
    seen: float
    patience: float


class Patience:
    """Bounded: what is older than MEMORY is let go of."""

    def __init__(self) -> None:
        self._alarms: dict[Life, list[float]] = {}
        self._given_up: dict[Life, _GivenUp] = {}

    def factor(self, life: Life, now: float) -> int:
        """Of the common limit."""
        alarms = sum(now - at < MEMORY for at in self._alarms.get(life, ()))
        return 1 << min(alarms // 2, MOST)

    def give_up(self, life: Life, seen: float, patience: float) -> None:
        """It was last heard at `seen`, and not for `patience` seconds since."""
        self._forget(seen + patience)
        self._given_up[life] = _GivenUp(seen, patience)

    def heard(self, life: Life, now: float) -> None:
        given_up = self._given_up.pop(life, None)
        if given_up is not None and now - given_up.seen <= _SLOW * given_up.patience:
            self._alarms.setdefault(life, []).append(now)

    def _forget(self, now: float) -> None:
        self._given_up = {life: it for life, it in self._given_up.items() if now - it.seen < MEMORY}
        kept = {life: [at for at in times if now - at < MEMORY] for life, times in self._alarms.items()}
        self._alarms = {life: times for life, times in kept.items() if times}
