"""The simulated world: every request ends once, news takes its time, and the same seed gives the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

from ops.errors import SimulationError
from ops.simulate import command
from ops.simulate.calls import Call
from ops.simulate.fleet_file import POLICIES, FleetFile, PolicyName
from ops.simulate.policies import News, RoundRobin
from ops.simulate.record import Record
from ops.simulate.run import simulate
from scheduler.dispatch.types import Decision, Item, Preempt, Send, Shed, WorkerState
from tests.unit.ops.simulate.fleets import fleet

MIXED: tuple[dict[str, Any], ...] = (
    {"name": "i", "class": "interactive", "rate": 40.0, "groups": 8, "prefix": 256, "tenants": 3},
    {"name": "b", "class": "batch", "rate": 8.0, "output": {"mean": 60, "sigma": 1.0, "most": 400}},
)


def columns(record: Record) -> list[list[float]]:
    """Comparable: nan is not what it was."""
    each = (record.at, record.sent, record.first, record.end, record.shed, record.cached, record.made)
    return [[-1.0 if math.isnan(value) else value for value in column] for column in each]


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_once_and_alike_on_every_run(name: PolicyName) -> None:
    file = fleet(*MIXED, engine={"kv_blocks": 512})
    record = command.play(file, name)
    calls = list(command.calls(file))
    assert list(record.at) == [call.at for call in calls]
    for number, call in enumerate(calls):
        if math.isnan(record.shed[number]):
            assert call.at <= record.sent[number] < record.first[number] <= record.end[number]
            assert record.made[number] == call.output
            assert 0 <= record.cached[number] < call.prompt
        else:
            assert math.isnan(record.sent[number])
    assert columns(command.play(file, name)) == columns(record)


class _Spy(RoundRobin):
    """Notes what it is told, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[float, WorkerState]] = []
        self.firsts: list[float] = []
        self.ends: list[tuple[int, int, int]] = []

    def state(self, state: WorkerState, now: float) -> None:
        super().state(state, now)
        self.told.append((now, state))

    def first(self, key: int, now: float, cached_tokens: int) -> None:
        self.firsts.append(now)

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int, output_tokens: int
    ) -> None:
        self.ends.append((prompt_tokens, cached_tokens, output_tokens))


def one(prompt: int = 160, output: int = 30, at: float = 1.0) -> Call:
    return Call(at, 0, "s-0", prompt, output, tuple(range(prompt // 16)))


def test_a_request_takes_the_way_there_its_steps_and_the_way_back() -> None:
    spy = _Spy()
    file = fleet(count=1, network={"send": 2.0, "news": 5.0, "heartbeat": 50.0})
    record = simulate(file, spy, iter([one(), one(at=3.0)]))  # the other one, that news of the end comes
    prefill = (16.5 + 0.01518 * 160 + 4.21e-7 * 160**2) / 1000
    assert record.first[0] == pytest.approx(1.002 + prefill)
    assert record.end[0] == pytest.approx(1.002 + prefill + 29 * 0.0165)
    assert spy.firsts[0] == pytest.approx(record.first[0] + 0.005)
    assert spy.ends == [(160, 0, 30)]
    assert all(now == pytest.approx(state.seen + 0.005) for now, state in spy.told[1:])
    quiet = [b.seen - a.seen for (_, a), (_, b) in itertools.pairwise(spy.told)]
    assert max(quiet) <= 0.05 + 1e-9


def test_fresh_news_comes_at_once() -> None:
    spy = _Spy()
    simulate(fleet(count=1), spy, iter([one(), one(at=1.1)]), News(0.0, 0.1))
    assert all(now == state.seen for now, state in spy.told)


def test_a_state_tells_what_is_not_yet_computed_and_which_sends_it_counts() -> None:
    spy = _Spy()
    calls = [one(1000, 2), one(600, 2, at=1.001), one(at=2.0)]
    simulate(fleet(count=1), spy, iter(calls), News(0.0, 10.0))
    figures = [(s.prefill_held, s.running, s.sends) for _, s in spy.told if s.sends]
    # A step has begun with 512 of 1000 tokens; the second one came after that.
    assert figures[0] == (488, 1, 1)
    # Then the rest of the first, and the second, nearly all of which was cached, though nobody foretold it.
    assert figures[1] == (0, 2, 2)
    assert (0, 0, 2) in figures


class _Never(RoundRobin):
    def decide(self, now: float) -> Sequence[Decision]:
        return []


def test_a_policy_that_leaves_requests_lying_is_an_error() -> None:
    with pytest.raises(SimulationError, match="2 requests wait"):
        simulate(fleet(), _Never(), iter([one(), one()]))


def test_a_time_without_requests_is_none() -> None:
    record = simulate(fleet(), RoundRobin(), iter([one(), one(at=1000.0)]))
    assert record.end[1] > 1000


def test_a_long_answer_is_none() -> None:
    file = fleet(engine={"kv_blocks": 2048, "context_tokens": 30_000})
    record = simulate(file, RoundRobin(), iter([one(output=20_000)]))
    assert record.end[0] == pytest.approx(20_000 * 0.0165, rel=0.01)


class _TakesBack(RoundRobin):
    """Takes request 0 back half a second after it was sent, and refuses request 1."""

    def __init__(self) -> None:
        super().__init__()
        self.back: list[Item] = []
        self.log: list[str] = []
        self.ends: list[tuple[int, int]] = []

    def arrive(self, item: Item, now: float) -> None:
        super().arrive(item, now)
        self.log.append(f"arrive {item.key} with {item.done_tokens}")
        if item.done_tokens:
            self.back.append(item)

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int, output_tokens: int
    ) -> None:
        self.ends.append((prompt_tokens, output_tokens))

    def returned(self, key: int, now: float) -> None:
        self.log.append(f"returned {key}")

    def next_due(self, now: float) -> float:
        return 1.5 if now < 1.5 else math.inf

    def decide(self, now: float) -> Sequence[Decision]:
        out: list[Decision] = []
        for decision in super().decide(now):
            if isinstance(decision, Send) and decision.key == 1:
                out.append(Shed(1, 2.5, ""))
            else:
                out.append(decision)
        if now == 1.5:
            out += [Preempt(0, "worker-0", ""), Preempt(0, "worker-0", "")]
        return out


def test_a_request_that_is_taken_back_goes_on_from_where_it_was() -> None:
    policy = _TakesBack()
    record = simulate(fleet(), policy, iter([one(output=60), one(at=1.2)]))
    (item,) = policy.back
    assert policy.log == [
        "arrive 0 with 0",
        "arrive 1 with 0",
        "returned 0",
        f"arrive 0 with {item.done_tokens}",
    ]
    assert 28 <= item.done_tokens <= 31  # half a second's steps
    assert (record.preempted[0], record.made[0]) == (1, 60)
    assert record.first[0] < 1.1  # of the first attempt
    assert record.end[0] > 1.5
    assert (record.shed[1], record.retry[1]) == (1.2, 2.5)


def test_one_that_has_begun_has_no_deadline_any_more_and_ends_with_its_last_attempts_counts() -> None:
    policy = _TakesBack()
    simulate(fleet({"deadline_ms": 300.0}), policy, iter([one(output=60), one(at=1.2), one(at=5.0)]))
    (item,) = policy.back
    assert item.deadline == math.inf
    assert policy.ends == [(160 + item.done_tokens, 60 - item.done_tokens)]


def test_requests_come_until_the_duration_is_over() -> None:
    assert max(command.play(fleet(duration=3.0), "fifo").at) < 3.0


def test_scaled_asks_for_so_many_times_as_much() -> None:
    file: FleetFile = fleet(duration=60.0)
    twice = list(command.calls(command.scaled(file, 2.0)))
    assert len(twice) / len(list(command.calls(file))) == pytest.approx(2, rel=0.1)


def test_kv_use_is_of_the_time_in_which_requests_wait() -> None:
    # Two requests of 480 tokens, 30 blocks of 128 each, and one slot: the second one waits for the first.
    file = fleet(count=1, engine={"max_num_seqs": 1, "kv_blocks": 128, "context_tokens": 1024})
    record = simulate(file, RoundRobin(), iter([one(480, 2), Call(1.0, 0, "s-0", 480, 2)]))
    assert record.busy_s == pytest.approx(record.end[0] - 1.0005)
    assert record.kv_s / record.busy_s == pytest.approx((30 + 31) / 2 / 128, rel=0.1)
