"""What no step has begun to compute, against a list of what there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstate.uncomputed import Uncomputed


def test_steps_take_prompts_in_the_order_in_which_they_came() -> None:
    held: Uncomputed[str] = Uncomputed()
    held.add("a", 300)
    held.add("b", 700)
    held.step(512)
    assert held.tokens == 488
    held.drop("b")
    assert held.tokens == 0


def test_a_long_prompt_is_computed_by_several_steps() -> None:
    held: Uncomputed[str] = Uncomputed()
    held.add("a", 1200)
    left = []
    for _ in range(4):
        held.step(512)
        left.append(held.tokens)
    assert left == [688, 176, 0, 0]


def test_a_step_full_of_decodes_computes_no_prompt() -> None:
    held: Uncomputed[str] = Uncomputed()
    held.add("a", 10)
    held.step(0)
    held.step(-3)
    assert held.tokens == 10


_DO = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 5), st.integers(1, 2000)),
    st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.integers(-10, 1000)),
)


@given(st.lists(_DO, max_size=60))
def test_it_is_the_sum_of_what_is_left(actions: list[tuple[str, int, int]]) -> None:
    held: Uncomputed[int] = Uncomputed()
    naive: list[list[int]] = []  # key and tokens, in order
    for do, key, tokens in actions:
        if do == "step":
            held.step(tokens)
            for _ in range(tokens):
                first = next((each for each in naive if each[1]), None)
                if first is not None:
                    first[1] -= 1
        else:
            naive = [each for each in naive if each[0] != key]
            if do == "add":
                held.add(key, tokens)
                naive.append([key, tokens])
            else:
                held.drop(key)
        assert held.tokens == sum(left for _, left in naive)
