"""What is asked for of each model, as running means. Pure: the clock is handed in.

The queue's counts are samples of the requests that are in the system, waiting or running: their mean is the
concurrency. Requests that come and go between two samples show in the usage events only: their rate times
their time in an engine is the concurrency too (Little's law), and the larger of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from broker.messages import UsageEvent
from scheduler.view import Wanted

_FORGOTTEN = 1e-3
"""Concurrency below which a model that nobody asks for is let go of."""

_SMOOTHING = 0.05
"""Weight of the newest request in the means of lengths and times."""

MODELS = 10_000
"""Models that are kept; the subjects of direct publishers are theirs to make up."""

Key = tuple[str, str]
"""A base, and a model of it."""


class _Mean:
    """Of a value per request; None until there is one."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + _SMOOTHING * (value - self.value)


class _Asked:
    """One model."""

    __slots__ = ("ended", "mean", "present", "rate", "service")

    def __init__(self) -> None:
        self.present = 0
        self.mean: float | None = None
        self.ended = 0
        self.rate = 0.0
        self.service = _Mean()

    @property
    def concurrency(self) -> float:
        return max(self.mean or 0.0, self.rate * (self.service.value or 0.0))

    def sample(self, present: int, passed: float, weight: float) -> None:
        """`weight`: of this sample in the means, for the `passed` seconds since the one before."""
        self.present = present
        self.mean = float(present) if self.mean is None else self.mean + weight * (present - self.mean)
        if passed > 0:
            self.rate += weight * (self.ended / passed - self.rate)
            self.ended = 0


class Demand:
    """Owned by the scheduler's event loop.

    Args:
        window: time constant of the means over time, in seconds.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._asked: dict[Key, _Asked] = {}
        self._tokens: dict[str, _Mean] = {}
        self._sampled: float | None = None

    def sample(self, counts: Mapping[Key, int], now: float) -> None:
        """The requests that are in the system at `now`, by base and model."""
        passed = 0.0 if self._sampled is None else now - self._sampled
        self._sampled = now
        weight = 1 - math.exp(-passed / self._window)
        for key in counts.keys() - self._asked.keys():
            if len(self._asked) < MODELS:
                self._asked[key] = _Asked()
        for key, asked in list(self._asked.items()):
            asked.sample(counts.get(key, 0), passed, weight)
            if not asked.present and asked.concurrency < _FORGOTTEN:
                del self._asked[key]

    def ended(self, event: UsageEvent) -> None:
        """A request has ended; what never ran says nothing of lengths and times."""
        key = event.base, event.model
        if key not in self._asked:
            if len(self._asked) >= MODELS:
                return
            self._asked[key] = _Asked()
            self._asked[key].mean = 0.0
        asked = self._asked[key]
        asked.ended += 1
        if event.completion_tokens and event.latency.total is not None:
            asked.service.add(max(0.0, event.latency.total - (event.latency.queue or 0.0)))
            tokens = event.prompt_tokens + event.completion_tokens
            self._tokens.setdefault(event.base, _Mean()).add(float(tokens))

    def of(self, base: str) -> dict[str, Wanted]:
        """By model."""
        return {
            model: Wanted(asked.concurrency, asked.present)
            for (of, model), asked in self._asked.items()
            if of == base
        }

    def present(self, base: str) -> int:
        """Requests of a base in the system at the last sample."""
        return sum(asked.present for (of, _), asked in self._asked.items() if of == base)

    def tokens(self, base: str, unknown: float = 1.0) -> float:
        """KV tokens that a request takes at its end, on average."""
        mean = self._tokens.get(base)
        return unknown if mean is None or mean.value is None else max(1.0, mean.value)

    @property
    def bases(self) -> set[str]:
        return {base for base, _ in self._asked}
