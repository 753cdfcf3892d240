from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.clock import Clock

EPOCH_MS = 1_764_000_000_000.0
AHEAD_MS = EPOCH_MS - 5_000.0
"""What the broker's clock shows at second 0 of ours, in these tests."""


def asked(clock: Clock, at: float, there: float, back: float, ahead_ms: float = AHEAD_MS) -> None:
    """A question at second `at`, and seconds on its way and on the answer's."""
    clock.told(at, (at + there) * 1000 + ahead_ms, at + there + back)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=20))
def test_it_is_right_to_half_of_the_quickest_answers_way(ways: list[tuple[float, float]]) -> None:
    clock = Clock()
    for number, (there, back) in enumerate(ways):
        asked(clock, 100.0 * number, there, back)
        quickest = min(there + back for there, back in ways[: number + 1])
        assert clock.at_ms(1e4) == pytest.approx(AHEAD_MS + 1e7, abs=quickest * 1000 / 2 + 0.01)


def test_it_is_known_once_it_was_told() -> None:
    clock = Clock()
    known = [clock.known]
    asked(clock, 0.0, 0.1, 0.1)
    assert [*known, clock.known] == [False, True]


@given(st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.1)), min_size=1, max_size=50), st.floats(-1, 1))
def test_one_that_drifts_is_followed(ways: list[tuple[float, float]], drift_ms: float) -> None:
    """Of clocks that run apart by up to 1 ms between two answers the last answer's way is the bound."""
    clock = Clock()
    for number, (there, back) in enumerate(ways):
        ahead_ms = AHEAD_MS + number * drift_ms
        asked(clock, 30.0 * number, there, back, ahead_ms)
        bound = (there + back) * 1000 + 0.01
        assert clock.at_ms(1e4) == pytest.approx(ahead_ms + 1e7, abs=bound)


def test_several_answers_say_more_than_the_quickest() -> None:
    clock = Clock()
    asked(clock, 0.0, there=0.010, back=0.0)
    asked(clock, 1.0, there=0.0, back=0.010)
    assert clock.at_ms(2.0) == pytest.approx(AHEAD_MS + 2000, abs=0.01)


@pytest.mark.parametrize("by_ms", [-3_600_000.0, -2.5, 2.5, 3_600_000.0])
def test_a_clock_that_was_set_is_believed_at_once(by_ms: float) -> None:
    clock = Clock()
    asked(clock, 0.0, 0.001, 0.001)
    asked(clock, 30.0, 0.001, 0.001, AHEAD_MS + by_ms)
    assert clock.at_ms(60.0) == pytest.approx(AHEAD_MS + by_ms + 60_000, abs=0.01)
    asked(clock, 90.0, 0.5, 0.5, AHEAD_MS + by_ms)
    assert clock.at_ms(90.0) == pytest.approx(AHEAD_MS + by_ms + 90_000, abs=0.01)
