"""What became of each request of a simulation: one number a request and question, in columns."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from ops.simulate.calls import Call


def _floats() -> array[float]:
    return array("d")


def _ints() -> array[int]:
    return array("q")


@dataclass(slots=True)
class Record:
    """Columns by the request's number, from 0; times in seconds, nan where a thing did not come about.

    Attributes:
        shed: when it was refused. `retry`: after how long it was told to come again.
        sent: when it was last given to a worker. `predicted`: time from then to its first token, as told.
        cached: of its prompt, tokens that the worker's cache had; -1 before its first token.
        preempted: how often it was taken back from a worker.
        step_seconds, step_counts: engine steps, all of one entry as long as each other.
        loads: how often a worker loaded an adapter. `cold`: requests that came to a worker without theirs.
        recomputed: how often an engine threw a request back for want of KV room.
        busy_s: seconds of workers' steps while requests waited anywhere. `kv_s`: the same by the share of the
            KV room that running requests held.
    """

    tenants: list[str] = field(default_factory=list)
    at: array[float] = field(default_factory=_floats)
    source: array[int] = field(default_factory=_ints)
    tenant: array[int] = field(default_factory=_ints)
    prompt: array[int] = field(default_factory=_ints)
    shareable: array[int] = field(default_factory=_ints)
    sent: array[float] = field(default_factory=_floats)
    predicted: array[float] = field(default_factory=_floats)
    first: array[float] = field(default_factory=_floats)
    end: array[float] = field(default_factory=_floats)
    shed: array[float] = field(default_factory=_floats)
    retry: array[float] = field(default_factory=_floats)
    cached: array[int] = field(default_factory=_ints)
    made: array[int] = field(default_factory=_ints)
    preempted: array[int] = field(default_factory=_ints)
    step_seconds: array[float] = field(default_factory=_floats)
    step_counts: array[int] = field(default_factory=_ints)
    loads: int = 0
    cold: int = 0
    recomputed: int = 0
    busy_s: float = 0.0
    kv_s: float = 0.0
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, call: Call) -> int:
        """Its number."""
        number = len(self.at)
        if (tenant := self._numbers.get(call.tenant)) is None:
            tenant = self._numbers[call.tenant] = len(self.tenants)
            self.tenants.append(call.tenant)
        self.at.append(call.at)
        self.source.append(call.source)
        self.tenant.append(tenant)
        self.prompt.append(call.prompt)
        self.shareable.append(call.shareable)
        self.cached.append(-1)
        self.made.append(0)
        self.preempted.append(0)
        for column in (self.sent, self.predicted, self.first, self.end, self.shed, self.retry):
            column.append(math.nan)
        return number

    def step(self, seconds: float, steps: int) -> None:
        self.step_seconds.append(seconds)
        self.step_counts.append(steps)
