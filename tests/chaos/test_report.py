"""What a run's figures and its table say of the goal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos import report
from tests.chaos.plan import Kind


def told(*gaps: float) -> dict[str, Any]:
    tally = report.Tally()
    for gap in gaps:
        tally.gaps[Kind.KILL_WORKER].append(gap)
    run = {"seed": 1, "minutes": 1, "date": "", "machine": {"cores": 2, "cpu": "a"}, "failures": []}
    return run | report.figures(tally, [])


@pytest.mark.parametrize(
    ("gaps", "met", "word"),
    [
        ((0.2, 0.9), True, "met"),
        ((0.2, 1.5), False, "MISSED"),
        ((), None, "nothing to measure it by"),
    ],
)
def test_the_goal_of_the_recovery_gaps_is_told(gaps: tuple[float, ...], met: bool | None, word: str) -> None:
    run = told(*gaps)
    assert run["recovery_gap_goal"] == {"p99_s": 1.0, "met": met}
    assert report.table(run).splitlines()[-1] == f"  goal: p99 of all <= 1 s: {word}"
