"""What a run's figures and its table say of the goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos import report
from tests.chaos.clients import Manner
from tests.chaos.plan import Fault, Kind
from tests.chaos.stage import JOURNAL, QUEUE, SCHEDULERS, Span, Struck
from tests.chaos.test_check import answer


def told(
    *gaps: float,
    journal: Sequence[Span] = (),
    queue: Sequence[Span] = (),
    schedulers: Sequence[Span] = (),
    struck: Sequence[Struck] = (),
    takeovers: Sequence[Span] = (),
) -> dict[str, Any]:
    tally = report.Tally()
    for gap in gaps:
        tally.gaps.append(report.Gap(Kind.KILL_WORKER, 10.0, gap, 10.0 + gap, "c1", Manner.CHAT))
    run = {
        "seed": 1,
        "minutes": 1,
        "date": "",
        "machine": {"cores": 2, "cpu": "a"},
        "failures": [],
        "preempted": 0,
    }
    leaderless = {JOURNAL: journal, QUEUE: queue, SCHEDULERS: schedulers}
    return run | report.figures(tally, struck, leaderless, takeovers)


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
    assert report.table(run).splitlines()[-4] == f"  goal: p99 with leaders <= 1 s: {word}"


def test_what_a_change_of_leaders_held_up_stands_in_rows_of_its_own() -> None:
    journal, queue = [Span(14.0, 14.5), Span(30.0, 35.0)], [Span(10.5, 11.0)]
    run = told(0.2, 0.8, 2.5, 5.0, journal=journal, queue=queue, schedulers=[Span(11.9, 12.1)])
    rows = ("all", "with leaders", "batch", JOURNAL, QUEUE, SCHEDULERS)
    assert [run["recovery_gap_s"][name]["n"] for name in rows] == [4, 1, 0, 1, 2, 0]
    run = told(0.2, 2.5, journal=journal, schedulers=[Span(11.9, 12.1)])
    assert [run["recovery_gap_s"][name]["n"] for name in rows] == [2, 1, 0, 0, 0, 1]
    assert run["recovery_gap_goal"]["met"]


def test_gaps_of_batch_stand_in_a_row_of_their_own() -> None:
    tally, struck = report.Tally(), []
    for number, service_class in enumerate(("batch", "interactive", "batch")):
        seen = answer()
        seen.ask = replace(seen.ask, service_class=service_class)
        seen.tokens[10:] = [part._replace(at=part.at + 0.5 + number) for part in seen.tokens[10:]]
        at = seen.tokens[9].at
        struck = [Struck(at, Fault(at, Kind.KILL_WORKER, 1, 1.0), seen.worker)]
        tally.add(Manner.CHAT, seen, struck)
    found = report.figures(tally, struck, {JOURNAL: [], QUEUE: [], SCHEDULERS: []}, [])["recovery_gap_s"]
    rows = {name: (found[name]["n"], found[name]["max"]) for name in ("with leaders", "batch")}
    assert rows == {"with leaders": (1, 1.5), "batch": (2, 2.5)}


def test_a_connection_that_breaks_before_an_answer_breaks_no_stream() -> None:
    """A server may close one that is kept alive just as the next request is on its way."""
    seen, tally = answer(), report.Tally()
    seen.breaks = [seen.started]
    tally.add(Manner.CHAT, seen, ())
    assert tally.broken == 0
    seen.breaks.append(seen.tokens[0].at)
    seen.cut = 1
    tally.add(Manner.CHAT, seen, ())
    assert tally.broken == 1


def test_no_recovery_is_charged_with_an_ingress_that_stands_still() -> None:
    """Nor is it held against a stream that had left that one before."""
    seen = answer()
    seen.worker, seen.visits = "w1", [(100.0, "http://a"), (100.5, "http://b")]
    seen.tokens[10:] = [part._replace(at=part.at + 2.5) for part in seen.tokens[10:]]
    at = seen.tokens[9].at
    struck = [
        Struck(at, Fault(at, Kind.STOP_INGRESS, 1, 2.0), "http://b"),
        Struck(at + 0.1, Fault(at + 0.1, Kind.STOP_INGRESS, 0, 2.0), "http://a"),
        Struck(at + 0.2, Fault(at + 0.2, Kind.KILL_WORKER, 1, 1.0), "w1"),
    ]
    tally = report.Tally()
    tally.add(Manner.CHAT, seen, struck)
    assert [(gap.kind, round(gap.seconds, 3)) for gap in tally.gaps] == [
        (Kind.KILL_WORKER, 0.5),
        (Kind.STOP_INGRESS, 0.5),
    ]


def test_takeovers_beside_a_lost_node_stand_apart() -> None:
    struck = [Struck(20.0, Fault(20.0, Kind.KILL_NATS, 0, 1.0), "n0")]
    run = told(
        struck=struck, takeovers=[Span(5.0, 5.75), Span(18.0, 26.0), Span(29.0, 30.0), Span(31.0, 31.5)]
    )
    assert run["takeover_s"] == {
        "takeover": {"n": 2, "p50": 0.625, "p99": 0.748, "max": 0.75},
        "and a node is lost": {"n": 2, "p50": 4.5, "p99": 7.93, "max": 8.0},
    }
    assert report.table(run).splitlines()[-1].split() == [
        "and",
        "a",
        "node",
        "is",
        "lost",
        "2",
        *["4.500", "7.930", "8.000"],
    ]
