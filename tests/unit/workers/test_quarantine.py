"""A worker that fails what it takes, and how it comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.quarantine import FIRST, MOST, Quarantine


def test_failures_in_a_row_begin_a_pause_and_a_trial_ends_it() -> None:
    health = Quarantine(3)
    assert [health.failed(0.0), health.failed(0.1)] == [0, 0]
    assert health.room(0.2, 5) is None
    assert health.failed(1.0) == FIRST
    assert (health.room(1.5, 0), health.left(1.5)) == (0, FIRST - 0.5)
    assert (health.room(1.0 + FIRST, 0), health.room(1.0 + FIRST, 1)) == (1, 0)
    health.succeeded()
    assert health.room(1.0 + FIRST, 9) is None


def test_a_success_between_them_forgives_failures() -> None:
    health = Quarantine(2)
    for now in range(20):
        assert health.failed(now) == 0
        health.succeeded()


def test_what_was_taken_before_the_pause_does_not_make_it_longer() -> None:
    health = Quarantine(1)
    assert health.failed(0.0) == FIRST
    assert [health.failed(0.5) for _ in range(9)] == [0] * 9
    assert health.failed(FIRST) == 2 * FIRST


@given(st.integers(1, 5), st.integers(1, 40))
def test_each_failed_trial_doubles_the_pause_to_a_limit(limit: int, trials: int) -> None:
    health, now, pauses = Quarantine(limit), 0.0, []
    for _ in range(limit - 1):
        assert health.failed(now) == 0
    for _ in range(trials):
        pauses.append(health.failed(now))
        assert health.room(now, 0) == 0
        now += health.left(now)
        assert health.room(now, 0) == 1
    assert pauses == [min(FIRST * 2**n, MOST) for n in range(trials)]
