"""What is made of an engine's steps while far more is asked of it than it has room for."""

from __future__ import annotations

import pytest

from benchmarks import hostile
from broker.messages import Latency
from tests.unit.benchmarks import usage


@pytest.mark.parametrize(
    ("taken", "first", "steps"),
    [
        (10.30, 10.31, 0),  # it begins at once
        (10.25, 10.401, 1),
        (10.25, 10.395, 1),  # the worker is told of a step a moment after it ended
        (10.25, 10.65, 3),
    ],
)
def test_a_wait_counts_the_steps_that_ended_meanwhile(taken: float, first: float, steps: int) -> None:
    told = hostile.Steps(at=[10.1, 10.2, 10.4, 10.5, 10.6])
    latency = Latency(queue=7.0, engine_wait=first - taken, total=7.0 + 20.0 - taken)
    assert told.between(usage.event(latency), ended=20.0) == steps
