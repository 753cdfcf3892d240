"""`headrace up --autoscale`: a spike's requests are held and served, and the fleet shrinks again after it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ops import cli
from tests.integration.test_up import Up, alive, complete, running, wait

PACE = {
    "sim.max_num_seqs": 2,
    "sim.ttft_ms": 20,
    "sim.itl_ms": 20,
    "scheduler.plan_interval": 0.1,
    "scheduler.dwell": 0.5,
    "scheduler.demand_window": 0.5,
}
SETTINGS = [word for key, value in PACE.items() for word in ("--set", f"{key}={value}")]


def workers(up: Up) -> int:
    found = 0
    for process in up.tree():
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += "worker" in process.cmdline() and alive(process)
    return found


def parts(data: Path) -> list[str]:
    """Those of which Prometheus is told."""
    return [each["labels"]["part"] for each in json.loads((data / "metrics.json").read_text())]


def log(data: Path) -> Iterator[dict[str, object]]:
    return (json.loads(line) for line in (data / "stderr").read_text().splitlines() if line[:1] == "{")


def grow(up: Up, clients: int, most: int) -> None:
    """So many ask at once, again and again until there are `most` workers, and are all answered."""
    grown = threading.Event()

    def ask() -> None:
        while True:
            assert complete(up.urls[0], up.model, 25)["usage"]["completion_tokens"] == 25
            if grown.is_set():
                return

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            wait(lambda: workers(up) == most)
        finally:
            grown.set()
        for each in asking:
            each.result()


def test_a_spike_is_served_by_more_workers_which_then_go(tmp_path: Path) -> None:
    """Two at once on one worker, and sixty come together."""
    data = tmp_path / "data"
    with running(data, "--autoscale", "1:3", *SETTINGS) as up:
        assert workers(up) == 1
        grow(up, 60, 3)
        wait(lambda: workers(up) == 1)
        wait(lambda: parts(data) == ["ingress", "scheduler", "worker"])
        up.process.kill()
    grown = [line for line in log(data) if "wanted" in line]
    assert (grown[0]["workers"], grown[-1]["wanted"]) == (1, 1)
    assert max(int(str(line["wanted"])) for line in grown) == 3
    assert "in use or queued" in str(grown[0]["reason"])


def test_what_the_last_run_was_asked_for_counts_for_nothing(tmp_path: Path) -> None:
    """It was killed at its largest, with the queue full."""
    data = tmp_path / "data"
    with running(data, "--autoscale", "1:2", *SETTINGS) as up:
        grow(up, 40, 2)
        up.process.kill()
    slow = ["--set", "scheduler.dwell=600"]  # whatever it had, it would keep
    with running(data, "--autoscale", "1:2", *SETTINGS, *slow) as up:
        complete(up.urls[0], up.model)
        assert workers(up) == 1
        assert not [line for line in log(data) if "wanted" in line]


def test_workers_within_the_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parser().parse_args(["up", "--autoscale", "1:4"]).autoscale == (1, 4)
    for wrong in ("3", "0:4", "4:1", "1:", "a:b"):
        with pytest.raises(SystemExit):
            cli.parser().parse_args(["up", "--autoscale", wrong])
        assert "--autoscale" in capsys.readouterr().err
