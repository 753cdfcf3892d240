"""A tenant that floods a scheduler and workers under a virtual clock: the others are served as the simulator
foretells (`tests/unit/ops/simulate/test_dispatch.py` has what that is)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import dispatch_policies, fidelity
from benchmarks.fidelity import Answer
from ops.simulate import command
from ops.simulate.calls import Call
from tests.model.test_fidelity import replay
from tests.unit.ops.simulate.fleets import fleet

WARM = 1.0

FAIR: dict[str, Any] = dispatch_policies.FAIR | {"rate": 30.0}
FLOOD: dict[str, Any] = dispatch_policies.FLOOD | {"rate": 375.0}
"""A hundred times as much as each of the eight, and more than the fleet does."""


def test_a_flood_moves_the_others_by_as_little_as_is_foretold() -> None:
    file = fleet(FAIR, FLOOD, count=4, duration=4.0)
    asked = [dataclasses.replace(call, max_tokens=call.output) for call in command.calls(file)]
    found, foretold = (_ttft(asked, of) for of in (replay(file, asked), fidelity.simulated(file, asked)))
    for percent in (50, 90):
        assert np.percentile(found[0], percent) < 1.15 * np.percentile(foretold[0], percent)
    assert np.median(found[1]) > 10 * np.median(found[0])


def _ttft(asked: Sequence[Call], answers: Sequence[Answer]) -> list[list[float]]:
    """By stream."""
    counted = [(call, each) for call, each in zip(asked, answers, strict=True) if call.at >= WARM]
    return [[each.ttft for call, each in counted if call.source == source] for source in (0, 1)]
