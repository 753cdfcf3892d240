"""When a request's first token would come, for each worker, learned from when others' came. Pure.

`TTFT = residual step + (pending + uncached) / prefill rate` once it is sent: a line over those tokens,
fitted for each worker with the newest counting most. What waits for the worker and goes first takes a
time for each token, and where all slots are taken, for each request: both are learned too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.dispatch.lanes import RANKS

Vector = NDArray[np.float64]

KEEP = 0.98
"""How much of an older observation's weight remains after a newer one."""

PRIOR = 8.0
"""Observations that the values assumed for a new worker weigh as much as."""

ERRORS = 512
"""Predictions whose errors are remembered."""

STEPS = 1.5
"""Steps to the first token of a short request on an idle worker: half of the one under way, and its own."""

_VECTORS = ("rate", "_intercept", "_slope", "_per_request")


@dataclass(slots=True)
class _Seen:
    """What was seen of a worker: sums in which the newest count most.

    Attributes:
        count, x, y, xx, xy: of times `y` to the first token with `x` tokens uncomputed.
        waited, ahead: seconds that requests waited, and the tokens that were to go before them, by rank: what
            goes last waits for others than those before it.
        held, ended: seconds by which requests that ended had taken the share of the worker that a slot is,
            and how many those were.
    """

    step_tokens: int
    count: float
    x: float
    y: float
    xx: float
    xy: float
    waited: list[float]
    ahead: list[float]
    held: float = 0.0
    ended: float = 0.0


class Predictor:
    """By worker slot. `step`: seconds of a step where nothing is known.

    Attributes:
        rate: prompt tokens that each worker computes in a second.
    """

    def __init__(self, step: float) -> None:
        self._step = step
        self._errors: deque[float] = deque(maxlen=ERRORS)
        self._seen: dict[int, _Seen] = {}
        self.rate: Vector = np.zeros(0)
        self._intercept: Vector = np.zeros(0)
        self._slope: Vector = np.zeros(0)
        # Seconds until one that goes first has been sent, by its tokens: by rank, and slot.
        self._per_token: Vector = np.zeros((len(RANKS), 0))
        self._per_request: Vector = np.zeros(0)  # seconds between two that end

    def join(self, slot: int, step_tokens: int) -> None:
        """A worker is new in `slot`, or its steps have changed: it is taken to compute a full one in `step`.

        Args:
            step_tokens: token budget of a step; one with none computes nothing, and is taken to have 1.
        """
        step_tokens = max(1, step_tokens)
        more = slot + 1 - len(self.rate)
        if more > 0:
            for name in _VECTORS:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more)]))
            self._per_token = np.pad(self._per_token, ((0, 0), (0, more)))
        most, base, slope = float(step_tokens), STEPS * self._step, self._step / step_tokens
        half = PRIOR / 2
        self._seen[slot] = seen = _Seen(
            step_tokens=step_tokens,
            count=PRIOR,
            x=half * most,
            y=PRIOR * base + half * most * slope,
            xx=half * most * most,
            xy=half * most * (base + most * slope),
            waited=[PRIOR * most * slope] * len(RANKS),
            ahead=[PRIOR * most] * len(RANKS),
        )
        self._per_token[:, slot], self._per_request[slot] = slope, 0.0
        self._fit(slot, seen)

    def after_send(self, tokens: Vector) -> Vector:
        """Seconds from sending to the first token, with `tokens` uncomputed, its own included."""
        seconds: Vector = self._intercept + self._slope * tokens
        return seconds

    def after(self, slot: int, tokens: float) -> float:
        """`after_send` of one worker."""
        return self._intercept.item(slot) + self._slope.item(slot) * tokens

    def behind(self, rank: int, ahead: Vector) -> Vector:
        """Seconds until those with `ahead` tokens, that go before one of the rank, have been sent."""
        seconds: Vector = ahead * self._per_token[rank]
        return seconds

    def for_slots(self, short: Vector) -> Vector:
        """Seconds until `short` slots have fallen free."""
        seconds: Vector = short * self._per_request
        return seconds

    def step(self, step_tokens: Vector) -> Vector:
        """Seconds of a full step."""
        seconds: Vector = np.maximum(self._intercept / STEPS, self._slope * step_tokens)
        return seconds

    def first(self, slot: int, tokens: float, elapsed: float) -> None:
        """The first token came `elapsed` after sending; `tokens` were uncomputed then, its own included."""
        seen = self._seen[slot]
        seen.count = KEEP * seen.count + 1.0
        seen.x = KEEP * seen.x + tokens
        seen.y = KEEP * seen.y + elapsed
        seen.xx = KEEP * seen.xx + tokens * tokens
        seen.xy = KEEP * seen.xy + tokens * elapsed
        self._fit(slot, seen)

    def sent(self, slot: int, rank: int, ahead: float, waited: float) -> None:
        """A request of the rank waited `waited` behind `ahead` tokens that were to go first."""
        seen = self._seen[slot]
        seen.ahead[rank] = KEEP * seen.ahead[rank] + ahead
        seen.waited[rank] = KEEP * seen.waited[rank] + waited
        self._per_token[rank, slot] = seen.waited[rank] / seen.ahead[rank]

    def ended(self, slot: int, held: float, slots: int) -> None:
        """A request was held for `held` on one of `slots` slots."""
        seen = self._seen[slot]
        seen.held = KEEP * seen.held + held / max(1, slots)
        seen.ended = KEEP * seen.ended + 1.0
        self._per_request[slot] = seen.held / max(seen.ended, 1.0)

    def erred(self, error: float) -> None:
        self._errors.append(abs(error))

    def error_p90(self) -> float:
        """Seconds by which the last predictions were off, nine of ten at most; 0 where none were made."""
        return float(np.quantile(self._errors, 0.9)) if self._errors else 0.0

    def _fit(self, slot: int, seen: _Seen) -> None:
        """Least squares; neither part may be negative: waiting is never rewarded."""
        n, x, y = seen.count, seen.x, seen.y
        spread = seen.xx - x * x / n
        slope = max(0.0, (seen.xy - x * y / n) / spread) if spread > 1.0 else 0.0
        intercept = max(1e-4, (y - slope * x) / n)
        self._intercept[slot], self._slope[slot] = intercept, slope
        # A full step's tokens have half of the one under way to wait for, their own, and half of another that
        # takes what did not fit: between no work and the budget alone, steps say little of a full one.
        self.rate[slot] = 2.0 * seen.step_tokens / (intercept + slope * seen.step_tokens)
