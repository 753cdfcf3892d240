"""The benchmark for GPUs, on an engine that takes none: what it has a worker do, and what it sees of it."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks import adapters, gpu_adapters, stages
from tests.adapters import TINY
from workers.config import SimConfig
from workers.engines import sim
from workers.engines.base import Engine

WAKE_MS = 50.0


@pytest.fixture
async def engine(anyio_backend: object) -> AsyncIterator[Engine]:
    made = await sim.start(SimConfig(adapter_slots=2, beta0=1.0, sleep=True, wake_ms=WAKE_MS))
    yield made
    await made.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


async def test_a_nap_frees_memory_and_ends_with_a_token(
    engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asked by turns, before and asleep, the driver tells 90 and 20 MiB in use."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f'#!/bin/sh\ncd {tmp_path}\nif rmdir asked 2>/dev/null; then echo "A, 1, 99, 20"\n'
        'else mkdir asked; echo "A, 1, 99, 90"; fi\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    async with stages.staged(engine) as stage:
        taken = await gpu_adapters.naps(stage, model, 2)
    assert [(nap.before_mib, nap.asleep_mib) for nap in taken] == [(90, 20)] * 2
    for nap in taken:  # what the engine takes to wake comes before either, but for a timer's grain
        assert min(nap.awake_s, nap.token_s) > 0.9 * WAKE_MS / 1000


async def test_an_engine_that_can_not_sleep_is_told_of(anyio_backend: object, model: Path) -> None:
    engine = await sim.start(SimConfig(beta0=1.0))
    async with stages.staged(engine) as stage:
        with pytest.raises(RuntimeError, match="can't sleep"):
            await gpu_adapters._command(stage, "sleep")
    await engine.close()


async def test_each_client_asks_and_swaps_are_seen(engine: Engine, model: Path) -> None:
    size = gpu_adapters.Size(count=5, slots=2, in_flight=8, seconds=0.2)
    async with stages.staged(engine) as stage:
        found = await gpu_adapters.traffic(stage, engine, model, size)
    assert found["requests"] >= size.in_flight
    assert found["swaps_per_minute"] > 0
    assert found["skipped"] == 0


async def test_first_steps_of_all_kinds_are_measured(engine: Engine, model: Path) -> None:
    async with stages.staged(engine) as stage:
        found = await adapters.first_steps(stage, model, 4, 3)
    assert {name: step["count"] for name, step in found["wait_ms"].items()} == {
        "base": 12,
        "slotted": 12,
        "swap": 12,
        "wanted": 4,
        "cold": 4,
    }
    assert found["swaps"] == 12, "by turns, each finds another in the slot"
    assert all(found["first_token_ms"][name]["p50"] > step["p50"] for name, step in found["wait_ms"].items())


async def test_a_request_ends_with_its_worker(anyio_backend: object) -> None:
    async with stages.queued("sim") as stage:
        stage.alive = lambda: False
        with pytest.raises(RuntimeError, match="the worker ended"):
            await stage.first_token("sim")
