from __future__ import annotations

import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstate import lengths

names = st.sampled_from("abc")
tokens = st.integers(0, 60)
learned = st.builds(
    lambda few, times, last: few * times + last,
    st.lists(st.tuples(names, names, tokens), max_size=12),
    st.sampled_from([1, 10, 100, 300]),
    st.lists(st.tuples(names, names, tokens), max_size=30),
)
quantiles = st.sampled_from([0.01, 0.5, 0.9, 1.0])


def taught(history: list[tuple[str, str, int]], keys: int = lengths.KEYS) -> lengths.Lengths:
    book = lengths.Lengths(keys)
    for model, tenant, count in history:
        book.learn(model, tenant, count)
    return book


@given(learned, names, names, tokens, st.integers(0, 80), quantiles)
def test_a_forecast_is_a_quantile_of_the_first_history_that_knows_enough(
    history: list[tuple[str, str, int]], model: str, tenant: str, so_far: int, limit: int, quantile: float
) -> None:
    got = taught(history).remaining(model, tenant, so_far, limit, quantile)
    levels = [
        [n for m, t, n in history if (m, t) == (model, tenant)],
        [n for m, _, n in history if m == model],
        [n for *_, n in history],
    ]
    left = max(0, limit - so_far)
    for level in levels:
        longer = [n - so_far for n in level[-lengths.SAMPLES :] if n > so_far]
        if len(longer) >= lengths.ENOUGH:
            if limit and got == left:
                assert sum(n < left for n in longer) < quantile * len(longer)
            else:
                assert got in longer
                assert sum(n <= got for n in longer) >= quantile * len(longer)
                assert sum(n < got for n in longer) < quantile * len(longer)
            return
    drawn = -lengths.MEAN * math.log(1 - quantile) if quantile < 1 else math.inf
    assert min(drawn, lengths.WARM_RATIO * left) * (1 - 1e-9) <= got
    assert got * (1 - 1e-9) <= min(drawn, lengths.COLD_RATIO * (left or lengths.UNKNOWN_MAX))


@given(learned, names, names, tokens, st.integers(1, 80), quantiles)
def test_no_forecast_passes_the_requests_own_limit(
    history: list[tuple[str, str, int]], model: str, tenant: str, so_far: int, limit: int, quantile: float
) -> None:
    assert 0 <= taught(history).remaining(model, tenant, so_far, limit, quantile) <= max(0, limit - so_far)


@given(learned, names, names, tokens, st.tuples(quantiles | st.just(0.0), quantiles))
def test_a_higher_quantile_never_forecasts_less(
    history: list[tuple[str, str, int]], model: str, tenant: str, so_far: int, pair: tuple[float, float]
) -> None:
    book = taught(history)
    low, high = (book.remaining(model, tenant, so_far, 0, each) for each in sorted(pair))
    assert low <= high


def test_with_nothing_known_a_share_of_the_limit_is_assumed() -> None:
    assert lengths.Lengths().remaining("m", "t", 0, 1000, 0.99) == pytest.approx(700)
    assert lengths.Lengths().remaining("m", "t", 400, 1000, 0.99) == pytest.approx(420)
    assert lengths.Lengths().remaining("m", "t", 400, 0, 0.99) == pytest.approx(0.7 * lengths.UNKNOWN_MAX)


def test_of_many_of_which_nothing_is_known_the_mean_is_assumed() -> None:
    book = taught([("m", "t", 20)] * lengths.ENOUGH)
    for so_far in (40, 400):
        drawn = [book.remaining("m", "t", so_far, 10**6, n / 1000) for n in range(1000)]
        assert sum(drawn) / 1000 == pytest.approx(lengths.MEAN, rel=0.01)


def test_the_share_falls_with_the_outputs_seen() -> None:
    book = lengths.Lengths()
    shares = []
    for _ in range(700):
        shares.append(book.remaining("m", "t", 10, 1010, 1.0))
        book.learn("m", "t", 10)
    assert shares == sorted(shares, reverse=True)
    assert shares[300] == pytest.approx(399)
    assert shares[600] == shares[-1] == pytest.approx(98)


def test_a_tenant_of_its_own_kind_is_told_apart() -> None:
    book = taught([("m", "short", 5)] * 20 + [("m", "long", 500)] * 20)
    assert book.remaining("m", "short", 0, 0, 0.9) == 5
    assert book.remaining("m", "long", 100, 0, 0.9) == 400
    assert book.remaining("m", "new", 0, 0, 0.5) == 5
    assert book.remaining("new", "new", 0, 0, 0.9) == 500


def test_keys_unused_longest_are_forgotten() -> None:
    book = taught([("m", "first", 5)] * 20 + [("m", f"t{n % 3}", 50) for n in range(300)], keys=3)
    assert book.remaining("m", "first", 0, 0, 0.9) == 50
    assert book.remaining("m", "t1", 0, 0, 0.9) == 50
    used_since = [("m", tenant, 50) for tenant in "bc"] * 50 + [("m", "a", 5), ("m", "d", 50)]
    assert taught([("m", "a", 5)] * 20 + used_since, keys=3).remaining("m", "a", 0, 0, 0.5) == 5
    sizes: dict[str, int] = defaultdict(int)
    for n in range(50):
        book.learn(f"m{n}", "t", n)
        sizes["pairs"], sizes["models"] = len(book._pairs), len(book._models)
    assert sizes == {"pairs": 3, "models": 3}
