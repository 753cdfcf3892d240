from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstate.peak import Forecast, peak

requests = st.tuples(st.integers(0, 5000), st.integers(0, 50))


def room_over_time(held: list[tuple[int, int]]) -> list[int]:
    """Tokens held after each step; a request's last token is there before it goes."""
    longest = max((remaining for _, remaining in held), default=0)
    return [
        sum(tokens + step for tokens, remaining in held if remaining >= step) for step in range(longest + 1)
    ]


@given(st.lists(requests, max_size=20))
def test_the_peak_is_the_most_there_ever_is(held: list[tuple[int, int]]) -> None:
    assert peak(held) == Forecast(held).peak == max(room_over_time(held))


@given(st.lists(requests, max_size=20), requests)
def test_one_more_is_forecast_without_going_over_all_again(
    held: list[tuple[int, int]], one: tuple[int, int]
) -> None:
    assert Forecast(held).after(*one) == peak([*held, one])


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(10, 50)), min_size=1, max_size=20),
    st.integers(0, 10),
)
def test_steps_that_go_as_forecast_do_not_change_it(held: list[tuple[int, int]], steps: int) -> None:
    assert peak([(tokens + steps, remaining - steps) for tokens, remaining in held]) == peak(held)


@given(st.lists(requests, max_size=20), requests, st.integers(0, 12_000))
def test_it_is_known_when_there_is_room_for_one_more(
    held: list[tuple[int, int]], one: tuple[int, int], limit: int
) -> None:
    def left_at(moment: int) -> list[tuple[int, int]]:
        return [(tokens + moment, rest - moment) for tokens, rest in held if rest > moment]

    moments = [(0, held), *((end, left_at(end)) for end in sorted(rest for _, rest in held))]
    first = next((moment for moment, left in moments if peak([*left, one]) <= limit), math.inf)
    assert Forecast(held).until(*one, limit) == first


def test_the_peak_by_example() -> None:
    # The longest alone 10 + 100, two of them 10 + 80 + 2 * 20, all three 10 + 80 + 5 + 3 * 10.
    assert peak([(80, 20), (10, 100), (5, 10)]) == 130
    assert Forecast([]).peak == 0
    assert Forecast([(80, 20)]).after(10, 100) == pytest.approx(130)
