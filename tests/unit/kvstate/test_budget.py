from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from kvstate import budget

lengths = st.floats(1, 20_000)


@st.composite
def loads(draw: st.DrawFn) -> budget.Load:
    total = draw(st.integers(0, 10**7))
    return budget.Load(
        slots_free=draw(st.integers(-5, 1000)),
        prefill_limit=draw(st.floats(1, 20_000)),
        prefill_held=draw(st.floats(0, 50_000)),
        kv_total=total,
        kv_free=draw(st.integers(0, total)),
        kv_promised=draw(st.floats(0, 10**7)),
        mean_prompt=draw(lengths),
        mean_output=draw(lengths),
    )


@given(loads())
def test_credit_never_exceeds_the_free_slots(load: budget.Load) -> None:
    assert 0 <= budget.requests(load) <= max(0, load.slots_free)


@given(loads())
def test_kv_is_never_promised_past_the_ceiling(load: budget.Load) -> None:
    assume(load.kv_total and not (load.kv_free == load.kv_total and load.kv_promised == 0))
    used = load.kv_total - load.kv_free
    taken = budget.requests(load) * (load.mean_prompt + load.mean_output)
    if taken:
        assert used + load.kv_promised + taken <= budget.KV_CEILING * load.kv_total * (1 + 1e-9)


@given(loads())
def test_the_last_request_starts_within_the_prefill_limit(load: budget.Load) -> None:
    credit = budget.requests(load)
    if credit:
        assert load.prefill_held + (credit - 1) * load.mean_prompt < load.prefill_limit * (1 + 1e-9)


@given(st.integers(1, 1000), st.floats(1, 20_000), st.integers(0, 10**7), lengths, lengths)
def test_an_empty_engine_always_takes_one(
    slots: int, limit: float, kv: int, prompt: float, output: float
) -> None:
    assert budget.requests(budget.Load(slots, limit, 0, kv, kv, 0, prompt, output)) >= 1


@given(loads(), st.integers(1, 10**6))
def test_more_room_never_means_less_credit(load: budget.Load, more: int) -> None:
    assume(load.kv_total)
    roomier = budget.Load(
        load.slots_free,
        load.prefill_limit,
        load.prefill_held,
        load.kv_total + more,
        load.kv_free + more,
        load.kv_promised,
        load.mean_prompt,
        load.mean_output,
    )
    assert budget.requests(roomier) >= budget.requests(load)


def test_an_unknown_kv_size_is_no_limit() -> None:
    load = budget.Load(7, 4096, 0, 0, 0, 10**9, 100, 100)
    assert budget.requests(load) == 7


def test_credit_by_example() -> None:
    # 1,000 tokens of prefill free = 4 prompts of 256; 9,500 - 4,000 - 1,000 KV = 11 of 384.
    load = budget.Load(32, 1024, 24, 10_000, 6_000, 0, 256, 128)
    assert budget.requests(load) == 4
    full = budget.Load(32, 1024, 24, 10_000, 1_000, 200, 256, 128)
    assert budget.requests(full) == 0
