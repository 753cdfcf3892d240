"""The real engine, started once for all the tests that use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ops import demo_model
from workers.config import VllmConfig
from workers.engines import base, vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
async def vllm_engine() -> AsyncIterator[base.Engine]:
    model = demo_model.ensure(ROOT / ".data", progress=True)
    engine = await vllm.start(VllmConfig(model=str(model), max_num_seqs=8))
    yield engine
    await engine.close()
