"""Percentiles, and what a measurement must say about itself: when, where, by which command."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psutil

FOLDER = Path(__file__).parent / "results"

SKIPPED = 77
"""Exit status of a benchmark that this machine can't run; the one that automake takes for that, too."""


def percentile(values: Sequence[float], p: float) -> float:
    """The `p`-th percentile, interpolated between closest ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * p / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median over rounds with its range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine()
    )


def save(name: str, measured: Mapping[str, Any], *, quick: bool) -> None:
    """Write `results/<name>.json`, a quick run's to a folder of its own: it is nothing to publish."""
    folder = FOLDER / "quick" if quick else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        **measured,
    }
    (folder / f"{name}.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))


class NotHere(Exception):
    """This machine lacks what the benchmark measures. The message says what, in a line."""


def main(name: str, run: Callable[[bool], Mapping[str, Any]]) -> None:
    """The command line of one benchmark."""
    quick = parser(name).parse_args().quick
    measure(name, lambda: run(quick), quick=quick)


def parser(name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    made.add_argument("--quick", action="store_true", help="fewer and shorter runs: does it work?")
    return made


def measure(name: str, run: Callable[[], Mapping[str, Any]], *, quick: bool) -> None:
    """Run and save. Exits with SKIPPED where the machine has not what it takes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    say(f"{name}:")
    try:
        save(name, run(), quick=quick)
    except NotHere as exc:
        say(f"  not measured: {exc}")
        sys.exit(SKIPPED)


def load(name: str) -> dict[str, Any] | None:
    path = FOLDER / f"{name}.json"
    return orjson.loads(path.read_bytes()) if path.exists() else None


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
