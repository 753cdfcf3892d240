"""The time to the first token is learned from those that came."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.dispatch.ttft import ERRORS, STEPS, Predictor

STEP, TOKENS = 0.03, 512


def predictor() -> Predictor:
    made = Predictor(STEP)
    made.join(0, TOKENS)
    made.join(1, TOKENS)
    return made


def test_before_anything_is_known_a_full_step_takes_what_was_assumed() -> None:
    made = predictor()
    assert made.after(0, 0) == pytest.approx(STEPS * STEP)
    assert made.after(0, TOKENS) - made.after(0, 0) == pytest.approx(STEP)
    assert made.behind(1, np.array([10.0 * TOKENS, 0.0])) == pytest.approx([10 * STEP, 0.0])
    assert made.rate == pytest.approx([0.8 * TOKENS / STEP] * 2)  # as if each came just too late for a step


@given(st.floats(0.001, 1.0), st.floats(1e-6, 1e-3), st.integers(0, 1000))
def test_it_learns_each_workers_own_line(base: float, slope: float, seed: int) -> None:
    made, draw = predictor(), random.Random(seed)
    for _ in range(600):
        tokens = draw.uniform(1, 2000)
        made.first(0, tokens, base + slope * tokens)
    for tokens in (1.0, 500.0, 2000.0):
        assert made.after(0, tokens) == pytest.approx(base + slope * tokens, rel=0.05)
    assert made.after(1, 0) == pytest.approx(STEPS * STEP)


@given(st.lists(st.tuples(st.floats(1, 1e5), st.floats(0, 100)), max_size=100))
def test_more_before_it_is_never_predicted_to_be_faster(seen: list[tuple[float, float]]) -> None:
    made = predictor()
    for tokens, elapsed in seen:
        made.first(0, tokens, elapsed)
    times = [made.after(0, tokens) for tokens in (0.0, 1.0, 100.0, 1e6)]
    assert times == sorted(times)
    assert times[0] > 0


def test_it_learns_how_fast_lanes_move() -> None:
    made = predictor()
    for _ in range(600):
        made.sent(0, 1, ahead=1000, waited=0.5)
    assert made.behind(1, np.array([2000.0, 0.0]))[0] == pytest.approx(1.0, rel=0.01)
    # Who goes before those does not wait as they do.
    assert made.behind(0, np.array([2000.0, 0.0]))[0] == pytest.approx(2000 * STEP / TOKENS)


def test_it_learns_how_long_slots_are_taken() -> None:
    made = predictor()
    assert not made.for_slots(np.array([3.0, 3.0])).any()
    for _ in range(600):
        made.ended(0, held=2.0, slots=4)
    assert made.for_slots(np.array([3.0, 3.0])) == pytest.approx([1.5, 0.0], rel=0.01)


def test_it_says_how_far_off_it_was_lately() -> None:
    made = predictor()
    assert made.error_p90() == 0.0
    for _ in range(ERRORS):
        made.erred(-100.0)
    for number in range(ERRORS):
        made.erred(number / ERRORS)
    assert made.error_p90() == pytest.approx(0.9, abs=0.01)
