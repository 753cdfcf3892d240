"""A real engine with a small KV cache, before which far more waits than it has room for."""

from __future__ import annotations

import pytest

from benchmarks import hostile

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
    # vLLM's, of its own protocol fields and of FastAPI's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:ORJSONResponse is deprecated"),
]

KV_BYTES = 56 * 2**20
"""Room for 2,500 tokens: fewer requests than the benchmark's fill it."""


async def test_a_small_cache_is_kept_full_and_seldom_overrun() -> None:
    asks = hostile.mix(2)
    async with hostile.engine(KV_BYTES) as engine:
        found = await hostile.measured(engine, asks, dispatched=True)
    assert found["requests"] == len(asks)  # each with all its tokens, or it would have raised
    assert found["queued_steps"] > 30  # else it says nothing
    assert found["preemptions"] <= len(asks) / 8
    assert found["kv_use"] > 0.3  # where it finds few enough that fit, by how its steps fall
    assert found["waiting"] < 3
