"""Figures of a record that can be counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ops.errors import SimulationError
from ops.simulate import report
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile
from ops.simulate.record import Record
from tests.unit.ops.simulate.fleets import fleet

NORMAL = {"name": "a", "goal_ms": 100.0}
BATCH = {"name": "b", "class": "batch"}


def file() -> FleetFile:
    return fleet(NORMAL, BATCH, warmup=5.0)


def record() -> Record:
    """Of `a`: one before the warm-up, then first tokens after 50, 90, 110 and 150 ms, and one refused; of `b`
    one after 4 s."""
    made = Record()
    for number, ttft in enumerate([9.0, 0.05, 0.09, 0.11, 0.15, None]):
        made.add(Call(number and 5.0 + number / 2, 0, f"a-{number % 2}", 100, 10, shareable=64))
        if ttft is None:
            made.shed[number], made.retry[number] = 7.5, 2.0
        else:
            made.sent[number] = made.at[number] + 0.01
            made.predicted[number] = ttft - 0.01 + number / 1000
            made.first[number] = made.at[number] + ttft
            made.end[number] = made.at[number] + ttft + 1.0
            made.cached[number], made.made[number] = 32, 10
    late = made.add(Call(9.0, 1, "b-0", 200, 40))
    made.first[late], made.end[late], made.cached[late], made.made[late] = 13.0, 14.0, 0, 40
    made.preempted[late] = 3
    made.step(0.010, 98)
    made.step(0.050, 2)
    made.recomputed, made.busy_s, made.kv_s = 7, 8.0, 6.0
    return made


def test_figures() -> None:
    found = report.figures(file(), record())
    normal = found["classes"]["standard"]
    assert (normal["requests"], normal["rate"], normal["shed"]) == (5, 1.0, 1)
    assert normal["ttft_ms"]["p50"] == pytest.approx(100)
    assert (normal["hit_rate"], normal["cached_share"]) == (0.5, 0.32)
    assert (normal["goodput"], normal["tokens_per_s"]) == (0.4, 8.0)
    assert normal["prediction_error_p90_ms"] == pytest.approx(3.7)
    batch = found["classes"]["batch"]
    assert (batch["goodput"], batch["preempted"], batch["hit_rate"]) == (0.2, 3, None)
    assert (found["requests"], found["goodput"], found["engine_preemptions"]) == (6, 0.6, 7)
    assert (found["kv_use_while_queued"], normal["retry_after_p50_s"], batch["retry_after_p50_s"]) == (
        0.75,
        2.0,
        None,
    )
    assert found["step_ms"] == {"p50": 10.0, "p99": 50.0}
    assert {name: of["requests"] for name, of in found["tenants"].items()} == {"a-0": 2, "a-1": 3, "b-0": 1}


def test_the_table_has_a_row_a_policy_and_one_a_class() -> None:
    lines = report.text({"lanes": report.figures(file(), record())}).splitlines()
    assert [line.split()[0] for line in lines] == ["policy", "lanes", "batch", "standard"]
    assert lines[3].split() == ["standard", "1.0", "100", "149", "0.500", "0.4", "20.0%", "0", "-"]


def test_nothing_was_served() -> None:
    made = Record()
    number = made.add(Call(6.0, 0, "a", 10, 10))
    made.shed[number] = 6.0
    for record in (made, Record()):
        found = report.figures(file(), record)
        assert (found["ttft_ms"]["p99"], found["hit_rate"], found["goodput"]) == (None, None, 0.0)
        assert found["step_ms"] == {"p50": None, "p99": None}
        assert "lanes" in report.text({"lanes": found})


def test_plots(tmp_path: Path) -> None:
    written = report.plot(file(), {"lanes": record(), "fifo": record()}, tmp_path / "new")
    assert [path.name for path in written] == ["ttft.png", "waiting.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SimulationError, match="need matplotlib"):
        report.plot(file(), {}, tmp_path)


def test_plots_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SimulationError, match="can't be written"):
        report.plot(file(), {"lanes": record()}, tmp_path / "taken")
