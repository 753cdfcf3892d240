"""When a request's first token would come, for each worker, learned from when others' came. Pure.

`TTFT = residual step + (pending + uncached) / prefill rate` once it is sent: a line over those tokens,
fitted for each worker with the newest counting most. What waits for the worker and goes first takes a
time for each token, and where all slots are taken, for each request: both are learned too.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

KEEP = 0.98
"""How much of an older observation's weight remains after a newer one."""

PRIOR = 8.0
"""Observations that the values assumed for a new worker weigh as much as."""

ERRORS = 512
"""Predictions whose errors are remembered."""

STEPS = 1.5
"""Steps to the first token of a short request on an idle worker: half of the one under way, and its own."""

_FIELDS = ("count", "x", "y", "xx", "xy", "intercept", "slope", "waited", "ahead", "held", "ended")


class Predictor:
    """By worker slot. `step`: seconds of a step where nothing is known."""

    def __init__(self, step: float) -> None:
        self._step = step
        self._errors: deque[float] = deque(maxlen=ERRORS)
        self._of: dict[str, Vector] = {name: np.zeros(0) for name in _FIELDS}

    def join(self, slot: int, step_tokens: int) -> None:
        """A worker is new in `slot`, or its steps have changed: it is taken to compute a full one in `step`.

        Args:
            step_tokens: token budget of a step; one with none computes nothing, and is taken to have 1.
        """
        step_tokens = max(1, step_tokens)
        of = self._of
        if slot >= len(of["count"]):
            for name in _FIELDS:
                of[name] = np.concatenate([of[name], np.zeros(slot + 1 - len(of[name]))])
        most, base, slope = float(step_tokens), STEPS * self._step, self._step / step_tokens
        half = PRIOR / 2
        of["count"][slot], of["x"][slot], of["xx"][slot] = PRIOR, half * most, half * most * most
        of["y"][slot] = PRIOR * base + half * most * slope
        of["xy"][slot] = half * most * (base + most * slope)
        of["waited"][slot], of["ahead"][slot] = PRIOR * most * slope, PRIOR * most
        of["held"][slot], of["ended"][slot] = 0.0, 0.0
        self._fit(slot)

    def after_send(self, tokens: Vector) -> Vector:
        """Seconds from sending to the first token, with `tokens` uncomputed, its own included."""
        seconds: Vector = self._of["intercept"] + self._of["slope"] * tokens
        return seconds

    def after(self, slot: int, tokens: float) -> float:
        """`after_send` of one worker."""
        return float(self._of["intercept"][slot] + self._of["slope"][slot] * tokens)

    def behind(self, ahead: Vector) -> Vector:
        """Seconds until those with `ahead` tokens have been sent."""
        seconds: Vector = ahead * (self._of["waited"] / self._of["ahead"])
        return seconds

    def for_slots(self, short: Vector) -> Vector:
        """Seconds until `short` slots have fallen free."""
        seconds: Vector = short * (self._of["held"] / np.maximum(self._of["ended"], 1.0))
        return seconds

    def rate(self, step_tokens: Vector) -> Vector:
        """Prompt tokens that a worker computes in a second."""
        short = self._of["intercept"] / STEPS
        tokens: Vector = step_tokens / np.maximum(short, self._of["slope"] * step_tokens)
        return tokens

    def first(self, slot: int, tokens: float, elapsed: float) -> None:
        """The first token came `elapsed` after sending; `tokens` were uncomputed then, its own included."""
        of = self._of
        for name, value in (("x", tokens), ("y", elapsed), ("xx", tokens * tokens), ("xy", tokens * elapsed)):
            of[name][slot] = KEEP * of[name][slot] + value
        of["count"][slot] = KEEP * of["count"][slot] + 1.0
        self._fit(slot)

    def sent(self, slot: int, ahead: float, waited: float) -> None:
        """A request waited `waited` behind `ahead` tokens that were to go first."""
        of = self._of
        of["ahead"][slot] = KEEP * of["ahead"][slot] + ahead
        of["waited"][slot] = KEEP * of["waited"][slot] + waited

    def ended(self, slot: int, held: float, slots: int) -> None:
        """A request was held for `held` on one of `slots` slots."""
        of = self._of
        of["held"][slot] = KEEP * of["held"][slot] + held / max(1, slots)
        of["ended"][slot] = KEEP * of["ended"][slot] + 1.0

    def erred(self, error: float) -> None:
        self._errors.append(abs(error))

    def error_p90(self) -> float:
        """Seconds by which the last predictions were off, nine of ten at most; 0 where none were made."""
        return float(np.quantile(self._errors, 0.9)) if self._errors else 0.0

    def _fit(self, slot: int) -> None:
        """Least squares; neither part may be negative: waiting is never rewarded."""
        of = self._of
        n, x, y = of["count"][slot], of["x"][slot], of["y"][slot]
        spread = of["xx"][slot] - x * x / n
        slope = max(0.0, (of["xy"][slot] - x * y / n) / spread) if spread > 1.0 else 0.0
        of["intercept"][slot] = max(1e-4, (y - slope * x) / n)
        of["slope"][slot] = slope
