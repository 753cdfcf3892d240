"""Two minutes of faults: nothing lost, nothing doubled, nothing hung. `make chaos` runs ten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.chaos import driver, report

SEED = 7
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
