"""What a run amounts to: counted as requests end, and told as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.results import percentile
from tests.chaos.check import End, Problem, Silence, Transcript, check, recovery_gap
from tests.chaos.clients import Manner
from tests.chaos.plan import ELECTION, Kind
from tests.chaos.stage import JOURNAL, PACE, SCHEDULERS, Span, Struck

GOAL = 1.0
"""Seconds within which 99 in 100 recovery gaps end, while journal, queue and schedulers have leaders; but
those of batch, which leaves the room to others."""

_TOKENS = ("lost", "doubled", "reordered", "foreign")
_WITHIN = 0.5
"""Seconds after a fault in which the silence begins that is laid to it: buffers run empty first."""
_STILL = Kind.STOP_INGRESS, Kind.CUT_INGRESS
"""While these last nothing can come to whoever reads there: that is no recovery's time."""
_NEAR = 15.0
_LED, _BATCH = "with leaders", "batch"
_LEASED, _NODE_LOST = "takeover", "and a node is lost"
_SHOWN = 20


class Gap(NamedTuple):
    """A stream's silence of so many seconds after a fault; `at` and `until` are monotonic time. `of_batch`:
    it may as well have given way to others."""

    kind: Kind
    at: float
    seconds: float
    until: float
    request: str
    manner: Manner
    of_batch: bool = False

    def meets(self, spans: Sequence[Span]) -> bool:
        return any(self.at <= span.until and span.since <= self.until for span in spans)


class Tally:
    """Takes transcripts in as they end; keeps only those that something is wrong with."""

    def __init__(self) -> None:
        self.manners: Counter[Manner] = Counter()
        self.ends: Counter[End | None] = Counter()
        self.problems: Counter[str] = Counter()
        self.resumed = 0
        self.broken = 0
        self.gaps: list[Gap] = []
        self.bad: list[tuple[Manner, Transcript, list[Problem]]] = []

    def add(self, manner: Manner, seen: Transcript, struck: Sequence[Struck]) -> None:
        self.manners[manner] += 1
        self.ends[seen.end] += 1
        self.resumed += len(seen.ingresses) > 1 and seen.end is not End.REFUSED
        self.broken += bool(seen.cut)
        problems = check(seen)
        if problems:
            self.bad.append((manner, seen, problems))
        for problem in problems:
            self.problems[problem.kind] += problem.tokens if problem.kind in _TOKENS else 1
        still = [
            Silence(one.fault.lasts, one.at + one.fault.lasts)
            for one in struck
            if one.fault.kind in _STILL and hit(seen, one)
        ]
        for one in reversed(struck):
            if one.at < seen.started:
                break
            gap = recovery_gap(seen, one.at, PACE, _WITHIN, still) if hit(seen, one) else None
            if gap is not None:
                of_batch = seen.ask.service_class == "batch"
                self.gaps.append(Gap(one.fault.kind, one.at, *gap, seen.ask.request_id, manner, of_batch))


def hit(seen: Transcript, struck: Struck) -> bool:
    """Whether a fault was to a process that the stream went through."""
    match struck.fault.kind.part:
        case "worker":
            return struck.target == seen.worker
        case "ingress":
            return struck.target == seen.ingress(struck.at)
        case part:
            return part == "nats"


def figures(
    tally: Tally,
    struck: Sequence[Struck],
    leaderless: Mapping[str, Sequence[Span]],
    takeovers: Sequence[Span],
) -> dict[str, Any]:
    gaps: dict[str, list[float]] = {name: [] for name in ("all", _LED, _BATCH, *leaderless)}
    for gap in sorted(tally.gaps):
        row = _row(gap, leaderless)
        for name in "all", row, str(gap.kind):
            gaps.setdefault(name, []).append(gap.seconds)
    spread = {kind: _distribution(found) for kind, found in gaps.items()}
    return {
        "requests": tally.manners.total(),
        "manners": {str(manner): n for manner, n in tally.manners.items()},
        "ends": {str(end): tally.ends[end] for end in End},
        "resumed": tally.resumed,
        "broken": tally.broken,
        "faults": len(struck),
        "faults_by_kind": dict(Counter(str(one.fault.kind) for one in struck)),
        "interrupted": tally.problems["interrupted"],
        "hung": tally.problems["hung"],
        **{f"tokens_{kind}": tally.problems[kind] for kind in _TOKENS},
        "otherwise_wrong": {
            kind: n for kind, n in tally.problems.items() if kind not in (*_TOKENS, "interrupted", "hung")
        },
        "elections": len(leaderless[JOURNAL]),
        "changes_of_scheduler": len(leaderless[SCHEDULERS]),
        "takeover_s": _takeovers(takeovers, struck),
        "recovery_gap_s": spread,
        "recovery_gap_goal": {"p99_s": GOAL, "met": spread[_LED]["p99"] <= GOAL if gaps[_LED] else None},
    }


def _row(gap: Gap, leaderless: Mapping[str, Sequence[Span]]) -> str:
    """That of the table in which it counts."""
    leaderless_then = (name for name, spans in leaderless.items() if gap.meets(spans))
    return next(leaderless_then, _BATCH if gap.of_batch else _LED)


def longest(
    tally: Tally, leaderless: Mapping[str, Sequence[Span]], began: float
) -> dict[str, list[tuple[str, str, str, float, float]]]:
    """Of the gaps with leaders, and of all others: request, its manner, fault, when that struck in seconds
    since `began`, and how long."""
    found: dict[str, list[tuple[str, str, str, float, float]]] = {_LED: [], "others": []}
    for gap in sorted(tally.gaps, key=lambda gap: -gap.seconds):
        of = found[_LED if _row(gap, leaderless) == _LED else "others"]
        if len(of) < _SHOWN:
            times = round(gap.at - began, 3), round(gap.seconds, 3)
            of.append((gap.request, str(gap.manner), str(gap.kind), *times))
    return found


def _takeovers(spans: Sequence[Span], struck: Sequence[Struck]) -> dict[str, dict[str, float]]:
    """Apart from those in which the lease itself may have been without a leader."""
    lost = [one.at for one in struck if one.fault.kind is Kind.KILL_NATS]
    found: dict[str, list[float]] = {_LEASED: [], _NODE_LOST: []}
    for span in spans:
        electing = any(span.since - ELECTION <= at <= span.until for at in lost)
        found[_NODE_LOST if electing else _LEASED].append(span.until - span.since)
    return {name: _distribution(seconds) for name, seconds in found.items()}


def _distribution(gaps: Sequence[float]) -> dict[str, float]:
    if not gaps:
        return {"n": 0}
    shares = {f"p{p}": round(percentile(gaps, p), 3) for p in (50, 99)}
    return {"n": len(gaps), **shares, "max": round(max(gaps), 3)}


def table(told: dict[str, Any]) -> str:
    """For people."""
    ends = ", ".join(f"{n} {end}" for end, n in told["ends"].items() if n)
    faults = ", ".join(f"{n} {kind}" for kind, n in told["faults_by_kind"].items())
    wrong = told["otherwise_wrong"] or "nothing"
    rows = [
        f"seed {told['seed']}, {told['minutes']:g} minutes, {told['date']}, "
        f"{told['machine']['cores']} cores of {told['machine']['cpu']}",
        f"requests   {told['requests']}: {ends}; {told['resumed']} of them over several connections, "
        f"{told['broken']} of which broke in mid-stream",
        f"faults     {told['faults']}: {faults}; {told['elections']} elections of the journal's leader, "
        f"{told['changes_of_scheduler']} times no scheduler led",
        f"streams    {told['interrupted']} interrupted, {told['hung']} hung; "
        f"{told['preempted']} of batch were to give way",
        "tokens     " + ", ".join(f"{told[f'tokens_{kind}']} {kind}" for kind in _TOKENS),
        f"otherwise  {wrong} wrong; {len(told['failures'])} failures of the fleet",
        f"recovery gap, s      {'n':>6} {'p50':>7} {'p99':>7} {'max':>7}",
    ]
    rows += _rows(told["recovery_gap_s"])
    goal = told["recovery_gap_goal"]
    met = {True: "met", False: "MISSED", None: "nothing to measure it by"}[goal["met"]]
    rows.append(f"  goal: p99 {_LED} <= {goal['p99_s']:g} s: {met}")
    rows.append("from a scheduler's last word to the first request that the next one hands out, s")
    return "\n".join([*rows, *_rows(told["takeover_s"])])


def _rows(spread: dict[str, dict[str, float]]) -> Iterator[str]:
    for name, gaps in spread.items():
        shown = " ".join(
            f"{gaps[part]:7.3f}" if part in gaps else "      -" for part in ("p50", "p99", "max")
        )
        yield f"  {name:<18} {gaps['n']:>6} {shown}"


def bad_streams(tally: Tally, struck: Sequence[Struck], began: float) -> str:
    """What there is to know of the streams that went wrong; times in seconds since the run `began`."""
    shown = ["\n".join(_bad(*one, struck, began)) for one in tally.bad[:_SHOWN]]
    if len(tally.bad) > _SHOWN:
        shown.append(f"and {len(tally.bad) - _SHOWN} more")
    return "\n".join(shown)


def _bad(
    manner: Manner, seen: Transcript, problems: list[Problem], struck: Sequence[Struck], began: float
) -> Iterator[str]:
    times = [f"{part.at - began:.3f}" for part in seen.tokens]
    breaks = " ".join(f"{at - began:.3f}" for at in seen.breaks) or "none"
    yield f"{seen.ask.request_id} ({manner}, {seen.ask.path}): {seen.end} {seen.fault}"
    for problem in problems:
        yield f"  {problem.kind} {problem.tokens}: {problem.detail}"
    yield f"  asked {seen.started - began:.3f}, over {seen.ended - began:.3f}"
    yield f"  tokens {' '.join(times) or 'none'}"
    yield f"  by {seen.worker or '?'} through {' '.join(seen.ingresses)}, breaks: {breaks}"
    near = [one for one in struck if seen.started - _NEAR <= one.at <= seen.ended]
    for one in sorted(near, key=lambda one: (not hit(seen, one), -one.at))[:4]:
        yield f"  near: {one.at - began:.3f} {one.fault.kind} {one.target} for {one.fault.lasts:.1f} s"
