"""Is anything else running here? A measurement beside somebody's build is none."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

from benchmarks import results

T = TypeVar("T")

FOREIGN = 0.1
"""Cores that others may use during a run that counts."""
TRIES = 6
PAUSE = 5.0
"""Seconds before a disturbed run is repeated."""


def undisturbed(run: Callable[[], T]) -> tuple[T, float]:
    """The first of TRIES runs in which the machine was ours, else the last; and the cores others used."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        started, foreign = time.monotonic(), _foreign_seconds()
        result = run()
        cores = (_foreign_seconds() - foreign) / (time.monotonic() - started)
        if cores <= FOREIGN:
            break
        results.say(f"  disturbed: others used {cores:.2f} cores")
    return result, max(0.0, cores)


def _foreign_seconds() -> float:
    """CPU seconds ever spent by processes that are not ours; kernel threads count as others."""
    busy = psutil.cpu_times()
    own = psutil.Process()
    ours = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) + sum(own.cpu_times()[:2])
    for child in own.children(recursive=True):
        ours += sum(child.cpu_times()[:4])  # those that it has waited for included
    return float(busy.user + busy.nice + busy.system - ours)
