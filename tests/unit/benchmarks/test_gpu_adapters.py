"""What is made of the measurements on a GPU, and what is said where there is none."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import adapters, gpu_adapters, report, results, stages
from benchmarks.gpu_adapters import Gpu, Nap
from broker.messages import Latency, UsageEvent
from tests.unit.benchmarks import usage
from workers import metrics
from workers.engines.base import EngineStats

TITLE = "Adapters and sleep on a GPU"


def event(wait: float, prefill: float) -> UsageEvent:
    return usage.event(Latency(engine_wait=wait, prefill=prefill))


NAPS = [Nap(0.5, 0.2, 0.3, 70_000, 3_000), Nap(0.7, 0.1, 0.2, 70_002, 3_002)]


def measured() -> dict[str, Any]:
    """As `gpu_adapters` would save it."""
    times = {"count": 1000, "p50": 2.0, "p99": 120.0}
    return {
        "gpu": "1 x GPU-9, driver 1.2",
        "model": "tiny",
        "slots": 8,
        "tokens": 32,
        "seconds": 60.0,
        "in_flight": 32,
        "start_s": results.spread([40.0, 20.0, 21.0]),
        "starts": 3,
        "adapters": 20,
        "swaps": 1000.0,
        "wait_ms": {"base": times, "swap": times},
        "first_token_ms": {"base": times, "swap": times | {"p99": 133.3}},
        "zipf": stages.Watch(skipped=0, swaps=30, seconds=60.0).figures([event(0.01, 0.1)] * 3),
        "sleep": gpu_adapters.summary(NAPS),
    }


@pytest.fixture
def results_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    return tmp_path


def test_gpus_are_read_as_the_driver_tells_them() -> None:
    text = "NVIDIA H200, 550.90, 143771, 12\nNVIDIA H200, 550.90, 143771, 0\n"
    assert gpu_adapters.parse(text) == [
        Gpu("NVIDIA H200", "550.90", 143771, 12),
        Gpu("NVIDIA H200", "550.90", 143771, 0),
    ]


def nvidia_smi(directory: Path, script: str) -> None:
    tool = directory / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "nvidia-smi, which comes with its driver, is not found"),
        ("echo 'no devices were found'; exit 6", "no devices were found"),
        ("echo 'could not communicate\nwith the driver' >&2; exit 9", "communicate with the driver"),
        (":", "there is no GPU here"),
    ],
)
def test_without_a_gpu_it_is_said_in_one_line(
    script: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        nvidia_smi(tmp_path, script)
    with pytest.raises(results.NotHere) as said:
        gpu_adapters.run(None, gpu_adapters.Size(), cpu=False)
    assert reason in str(said.value)
    assert "\n" not in str(said.value)


def test_memory_in_use_is_that_of_all_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nvidia_smi(tmp_path, "echo 'A, 1, 100, 30'; echo 'A, 1, 100, 12'")
    assert gpu_adapters._used() == 42


def test_what_this_machine_can_not_run_saves_nothing_and_has_a_status_of_its_own(results_here: Path) -> None:
    def run() -> Mapping[str, Any]:
        raise results.NotHere("no such thing here")

    with pytest.raises(SystemExit) as ended:
        results.measure("gpu_adapters", run, quick=False)
    assert ended.value.code == results.SKIPPED
    assert not (results_here / "results").exists()


@pytest.mark.parametrize(("arguments", "failed"), [([], False), (["gpu_adapters"], True)])
def test_left_out_it_has_failed_only_where_it_was_asked_for(
    arguments: list[str], failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, list[str]] = {}

    def run(name: str, flags: list[str]) -> int:
        ran[name] = flags
        return results.SKIPPED if name == "gpu_adapters" else 0

    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--quick", "--model", "/m"])
    assert command.main() == failed
    assert ran.pop("gpu_adapters") == ["--quick", "--model", "/m"]
    assert all(flags == ["--quick"] for flags in ran.values())


def test_a_broken_benchmark_fails_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_run", lambda name, flags: int(name == "planner"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick"])
    assert command.main() == 1


def test_times_to_the_first_token_begin_where_those_to_the_first_step_do() -> None:
    found = adapters.times([event(0.002, 0.010), event(0.004, 0.020)])
    assert found["wait"] == {"p50": pytest.approx(3.0), "p99": pytest.approx(3.98)}
    assert found["first_token"] == {"p50": pytest.approx(18.0), "p99": pytest.approx(23.88)}


def test_swaps_are_the_workers_count() -> None:
    before = stages.swaps()
    metrics.ADAPTER_SWAPS.inc(3)
    assert stages.swaps() - before == 3


def test_what_the_engine_skips_adds_up_over_its_steps_while_it_is_watched() -> None:
    heard: list[str] = []
    stats = EngineStats(1, 0, 1, 1, 0, 0, skipped=2)
    engine: Any = SimpleNamespace(on_change=lambda: heard.append("step"), stats=lambda: stats)
    with stages.watched(engine) as watch:
        engine.on_change()
        engine.on_change()
    engine.on_change()
    assert (watch.skipped, len(heard)) == (4, 3)


def test_zipf_draws_the_first_most_often_and_the_same_each_time() -> None:
    drawn = [adapters.Zipf(["a", "b", "c"]).draw() for _ in range(2)]
    assert drawn[0] == drawn[1]
    dice = adapters.Zipf(["a", "b", "c"])
    counts = [[dice.draw() for _ in range(3000)].count(name) for name in "abc"]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.15)
    assert counts[0] / counts[2] == pytest.approx(3, rel=0.15)


def test_naps_are_told_by_their_medians() -> None:
    found = gpu_adapters.summary(NAPS)
    assert found["token_s"] == {"median": 0.25, "low": 0.2, "high": 0.3}
    assert (found["naps"], found["before_mib"], found["asleep_mib"]) == (2, 70_001, 3_001)


def test_unmeasured_until_a_results_file_is_there(results_here: Path) -> None:
    page = report.write().read_text()
    assert "Not measured yet" in report.sections(page)[TITLE]
    assert report.write().read_text() == page

    results.save("gpu_adapters", measured(), quick=True)
    assert report.write().read_text() == page

    results.save("gpu_adapters", measured(), quick=False)
    section = report.sections(report.write().read_text())[TITLE]
    assert "Not measured" not in section
    assert "tiny on 1 x GPU-9" in section
    assert "| swap | 1000 | 2.0 | 120.0 | 2.0 | 133.3 | ≤ 100: **missed** |" in section
    assert re.search(r"\| 3 \| 30 \| 0 \| .* \| ≤ 0: met \|", section)
    assert "67,000 MiB came free" in section
    assert "| start of a process, until the first token | 21.00 (20.00 to 40.00) |" in section

    (results_here / "results" / "gpu_adapters.json").unlink()
    kept = report.sections(report.write().read_text())[TITLE]
    assert kept == section, "what another machine measured stays"


def test_the_page_says_that_it_is_unmeasured_or_what_was_measured() -> None:
    section = report.sections((report.DOCS / "benchmarks.md").read_text())[TITLE]
    unmeasured = report.sections(report._GPU_UNMEASURED)[TITLE]
    assert section == unmeasured or "`python -m benchmarks.gpu_adapters" in section
