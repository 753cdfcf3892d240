"""Who was given up too soon is given more time, for a while."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.patience import MEMORY, MOST, Patience

LIFE = "w1", 1
LIMIT = 0.3


def silence(patience: Patience, seen: float, seconds: float) -> None:
    """A worker is given up as soon as may be, and heard again after `seconds` of silence."""
    patience.give_up(LIFE, seen, LIMIT * patience.factor(LIFE, seen))
    patience.heard(LIFE, seen + seconds)


def test_every_second_false_alarm_doubles_it_to_a_limit_and_is_forgotten() -> None:
    patience = Patience()
    factors = []
    for now in range(9):
        factors.append(patience.factor(LIFE, now))
        silence(patience, now, 0.5)
    assert factors == [1, 1, 2, 2, 4, 4, 8, 8, 8]
    assert patience.factor(("w2", 1), 9) == patience.factor(("w1", 2), 9) == 1
    assert patience.factor(LIFE, 8.5 + MEMORY) == 1


def test_one_that_did_hang_is_given_no_more_time() -> None:
    patience = Patience()
    silence(patience, 0, 3 * LIMIT + 0.01)
    patience.heard(LIFE, 10)
    assert patience.factor(LIFE, 10) == 1


@given(st.lists(st.tuples(st.floats(0.3, 20), st.floats(0, 100)), max_size=200))
def test_it_is_bounded_and_so_is_what_is_kept(silences: list[tuple[float, float]]) -> None:
    patience, now = Patience(), 0.0
    for seconds, between in silences:
        silence(patience, now, seconds)
        now += seconds + between
        assert patience.factor(LIFE, now) <= 1 << MOST
    assert len(patience._alarms) + len(patience._given_up) <= 2
    assert sum(map(len, patience._alarms.values())) <= MEMORY / LIMIT + 1


def test_workers_that_never_come_back_are_forgotten() -> None:
    patience = Patience()
    for now in range(1000):
        patience.give_up((f"w{now}", now), float(now), LIMIT)
    assert len(patience._given_up) <= MEMORY + 1
