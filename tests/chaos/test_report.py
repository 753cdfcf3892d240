"""What a run's figures and its table say of the goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.chaos import report
from tests.chaos.plan import Kind
from tests.chaos.stage import Span


def told(*gaps: float, elections: Sequence[Span] = (), unled: Sequence[Span] = ()) -> dict[str, Any]:
    tally = report.Tally()
    for gap in gaps:
        tally.gaps.append(report.Gap(Kind.KILL_WORKER, 10.0, gap))
    run = {"seed": 1, "minutes": 1, "date": "", "machine": {"cores": 2, "cpu": "a"}, "failures": []}
    return run | report.figures(tally, [], elections, unled)


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
    assert report.table(run).splitlines()[-1] == f"  goal: p99 with leaders <= 1 s: {word}"


def test_what_a_change_of_leaders_held_up_stands_in_rows_of_its_own() -> None:
    run = told(0.2, 2.5, 5.0, elections=[Span(14.0, 14.5), Span(30.0, 35.0)], unled=[Span(11.9, 12.1)])
    rows = ("all", "with leaders", "journal elects", "no scheduler leads")
    assert [run["recovery_gap_s"][name]["n"] for name in rows] == [3, 1, 1, 1]
    assert run["recovery_gap_goal"]["met"]
