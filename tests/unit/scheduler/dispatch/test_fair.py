"""Tenants are served alike for their weights, and classes by their quanta."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.dispatch.fair import Rounds, Shares

MEMORY, BURST = 10.0, 1000.0
TENANTS = "abcd"


def shares() -> Shares:
    return Shares(MEMORY, BURST)


def used(fair: Shares, name: str, now: float) -> float:
    """Tokens that the tenant is held to have used, for its weight."""
    return math.exp(fair.counters[name] - now / MEMORY)


@given(
    st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 1)), min_size=1, max_size=200),
)
def test_tenants_that_always_wait_are_never_further_apart_than_one_request(
    weights: list[float], served: list[tuple[int, float]]
) -> None:
    fair, now = shares(), 0.0
    names = TENANTS[: len(weights)]
    for name, weight in zip(names, weights, strict=True):
        fair.enter(name, weight, 1, now)
    most = max(tokens for tokens, _ in served)
    for tokens, pause in served:
        now += pause
        fair.charge(min(names, key=lambda name: (fair.counters[name], name)), tokens, now)
        levels = [used(fair, name, now) for name in names]
        assert max(levels) - min(levels) <= most / min(weights) * (1 + 1e-9)


@given(
    st.lists(
        st.tuples(st.sampled_from(TENANTS), st.integers(1, 3000), st.floats(0, 0.7)), min_size=1, max_size=100
    ),
    st.floats(0, 1e6),
)
def test_a_successor_misses_at_most_what_was_served_since_the_last_entry(
    served: list[tuple[str, int, float]], clock: float
) -> None:
    """One entry a second; its own clock is `clock` ahead."""
    fair, now, weights = shares(), 0.0, {"a": 4.0}
    for name in TENANTS:
        fair.enter(name, weights.get(name, 1.0), 1, now)
    entry, noted, missed = fair.served(now), now, dict.fromkeys(TENANTS, 0)
    for name, tokens, pause in served:
        now += pause
        if now - noted >= 1.0:
            entry, noted, missed = fair.served(now), now, dict.fromkeys(TENANTS, 0)
        fair.charge(name, tokens, now)
        missed[name] += tokens
    successor = shares()
    successor.resume(entry, weights, noted + clock, now + clock)
    for name in TENANTS:
        weight = weights.get(name, 1.0)
        known = used(successor, name, now + clock) if name in entry else 0.0
        assert -1e-3 <= used(fair, name, now) - known <= missed[name] / weight + 1.0


def test_who_was_served_less_than_others_is_not_above_his_share_whatever_he_asks_for() -> None:
    """Else one that asks for little more than its share, and more than there is, would have all."""
    fair = Shares(memory=10.0, burst=0)
    fair.enter("a", 3.0, 100_000, 0.0)
    fair.enter("b", 1.0, 100_000, 0.0)
    fair.charge("a", 300.0, 0.0)
    fair.charge("b", 100.0, 0.0)
    assert fair.over("b", 0.0)
    fair.charge("a", 300.0, 0.0)
    assert not fair.over("b", 0.0)
    fair.charge("b", 200.0, 0.0)
    assert fair.over("b", 0.0)


def test_a_tenant_that_left_counts_in_nobodys_share() -> None:
    fair = Shares(memory=10.0, burst=0)
    for name in ("b", "c", "flooder"):  # who comes begins at the least of those there
        fair.enter(name, 1.0, 1, 0.0)
    fair.charge("flooder", 1e6, 0.0)
    fair.leave("flooder", 1)
    fair.charge("b", 30_000.0, 9.0)
    fair.charge("c", 100.0, 9.0)
    fair.enter("c", 1.0, 1, 11.0)
    assert fair.counters.keys() == {"b", "c"}
    assert fair.over("b", 11.0)


def test_a_successor_goes_on_with_the_same_turns() -> None:
    fair, successor, weights = shares(), shares(), {"c": 2.0}
    for number, name in enumerate("abc"):
        fair.enter(name, weights.get(name, 1.0), 1, 0.0)
        fair.charge(name, 5000.0 * (number + 1), 0.5)
    successor.resume(fair.served(1.0), weights, 101.0, 101.0)
    for each, now in ((fair, 1.0), (successor, 101.0)):
        each.enter("b", 1.0, 1, now)
        each.enter("c", 2.0, 1, now)
        each.enter("new", 1.0, 1, now)
        assert [each.over(name, now) for name in "abc"] == [False, True, False]
        assert sorted("abc", key=each.counters.__getitem__) == ["a", "c", "b"]
        assert each.counters["new"] == each.counters["a"]


def test_weights_are_shares() -> None:
    fair = shares()
    served = dict.fromkeys("ab", 0)
    fair.enter("a", 3.0, 1, 0.0)
    fair.enter("b", 1.0, 1, 0.0)
    for _ in range(400):
        name = min("ab", key=fair.counters.__getitem__)
        served[name] += 1
        fair.charge(name, 100, 0.0)
    assert served["a"] == pytest.approx(300, abs=2)


def test_one_that_comes_begins_at_the_least_of_those_there() -> None:
    fair = shares()
    for name in "ab":
        fair.enter(name, 1.0, 1, 0.0)
    fair.charge("a", 500.0, 0.0)
    fair.charge("b", 400.0, 0.0)
    fair.enter("new", 1.0, 1, 0.0)
    assert used(fair, "new", 0.0) == pytest.approx(400)


def test_what_was_used_is_forgotten_and_so_are_those_who_used_it() -> None:
    fair = shares()
    fair.enter("a", 1.0, 1, 0.0)
    fair.leave("a", 1)
    fair.charge("a", 1000.0, 0.0)
    assert used(fair, "a", MEMORY) == pytest.approx(1000 / math.e)
    fair.enter("b", 1.0, 1, MEMORY + 1)
    with pytest.raises(KeyError):
        fair.counters["a"]


def test_one_that_waits_is_not_forgotten() -> None:
    fair = shares()
    fair.enter("a", 1.0, 1, 0.0)
    for now in range(1, 50):
        fair.enter("b", 1.0, 1, float(now))
        fair.leave("b", 1)
    fair.counters["a"]
    fair.leave("a", 1)


def test_above_its_share_is_who_had_more_than_chance_explains() -> None:
    fair = shares()
    for name in TENANTS:
        fair.enter(name, 1.0, 1, 0.0)
    for name in TENANTS[:-1]:
        fair.charge(name, 10_000.0, 0.0)
    fair.charge(TENANTS[-1], 8_000.0, 0.0)
    fair.enter("late", 1.0, 1, 0.0)
    assert not any(fair.over(name, 0.0) for name in TENANTS)
    fair.charge("a", 10_000.0, 0.0)
    assert not fair.over("late", 0.0)
    assert [name for name in TENANTS if fair.over(name, 0.0)] == ["a"]


def test_above_its_share_is_who_asks_for_more_too() -> None:
    fair = shares()
    for name in TENANTS:
        fair.enter(name, 1.0, 100, 0.0)
    assert not fair.over("a", 0.0)
    fair.enter("a", 1.0, 100_000, 0.0)
    assert fair.over("a", 0.0)
    fair.leave("a", 100_000)
    assert not fair.over("a", 0.0)


def test_nobody_is_above_its_share_alone() -> None:
    fair = shares()
    fair.enter("a", 1.0, 1e6, 0.0)
    fair.charge("a", 1e6, 0.0)
    assert not fair.over("a", 0.0)


@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=4),
    st.lists(st.integers(1, 3000), min_size=300, max_size=300),
)
def test_classes_that_always_wait_are_served_by_their_quanta(quanta: list[int], costs: list[int]) -> None:
    rounds = Rounds(quanta)
    served = [0.0] * len(quanta)
    for cost in costs:
        rank = rounds.turn([float(cost)] * len(quanta))
        assert rank is not None
        rounds.charge(rank, cost)
        served[rank] += cost
    cycles = [tokens / quantum for tokens, quantum in zip(served, quanta, strict=True)]
    slack = [1 + 3000 / quantum for quantum in quanta]
    for mine, mine_slack in zip(cycles, slack, strict=True):
        for other, other_slack in zip(cycles, slack, strict=True):
            assert abs(mine - other) <= mine_slack + other_slack


def test_a_class_alone_is_served_always_and_saves_nothing_up() -> None:
    rounds = Rounds([100, 100])
    for _ in range(50):
        assert rounds.turn([None, 90.0]) == 1
        rounds.charge(1, 90.0)
    order = []
    for _ in range(20):
        rank = rounds.turn([50.0, 50.0])
        assert rank is not None
        rounds.charge(rank, 50.0)
        order.append(rank)
    assert sum(order) == pytest.approx(10, abs=2)
    assert rounds.turn([None, None]) is None


def test_the_most_urgent_class_goes_first_whoever_went_before_it_came() -> None:
    rounds = Rounds([100, 100, 100])
    for costs, turn in (
        ([None, None, 10.0], 2),
        ([None, 10.0, 10.0], 1),
        ([10.0, 10.0, 10.0], 0),
        ([None, 10.0, 10.0], 1),
        ([None, None, 10.0], 2),
    ):
        assert rounds.turn(costs) == turn
        rounds.charge(turn, 10.0)


def test_a_cost_of_a_thousand_million_quanta_takes_no_longer_than_one() -> None:
    rounds = Rounds([1, 1])
    assert rounds.turn([1e12, 2e12]) == 0
    rounds.charge(0, 1e12)
    assert rounds.turn([1e12, 2e12]) in (0, 1)


def test_those_who_came_once_are_not_kept() -> None:
    fair = shares()
    fair.enter("stays", 1.0, 1, 0.0)
    sizes = []
    for number in range(3000):
        fair.enter(f"tenant-{number}", 1.0, 1, number * 1.0)
        fair.charge(f"tenant-{number}", 100.0, number * 1.0)
        fair.leave(f"tenant-{number}", 1)
        sizes.append(len(pickle.dumps(fair)))
    assert max(sizes[1500:]) <= 1.1 * max(sizes[:1500])
