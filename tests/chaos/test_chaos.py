"""Two minutes of faults, and an update of the whole fleet: nothing lost, nothing doubled, nothing hung.
`make chaos` runs ten minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.chaos import driver, report
from tests.chaos.plan import rolling
from tests.chaos.stage import SIZES

SEED = 117
"""One with faults of every kind, and one loss of a broker node: a worker's death within an election may, now
and then, cost a stream whose reader was cut off too (docs/faults.md). `make chaos` takes any seed."""
MINUTES = 2.0


@pytest.mark.chaos
@pytest.mark.timeout(MINUTES * 60 + 240)
async def test_two_minutes_of_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, trouble = await driver.run(SEED, MINUTES, tmp_path / "run")
    with capsys.disabled():
        sys.stdout.write(f"\n{report.table(told)}\n")
    assert not trouble, trouble
    assert told["requests"] >= 1000
    assert told["faults"] >= 40


@pytest.mark.chaos
@pytest.mark.timeout(240)
async def test_a_rolling_update_of_workers_and_ingresses_breaks_no_stream(tmp_path: Path) -> None:
    faults = rolling(SIZES)
    told, trouble = await driver.run(SEED, (faults[-1].at + 3) / 60, tmp_path / "run", faults=faults)
    assert not trouble, trouble
    assert told["faults_by_kind"] == {"drain worker": SIZES["worker"], "drain ingress": SIZES["ingress"]}
    assert told["broken"] == 0
    assert told["requests"] >= 100
