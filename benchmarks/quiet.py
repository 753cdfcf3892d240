"""Is anything else running here? A measurement beside somebody's build is none."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psutil

from benchmarks import results

T = TypeVar("T")

FOREIGN = 0.1
"""Cores that others may use during a run that counts."""
TRIES = 2
LOOK, PATIENCE = 2.0, 60.0
"""Seconds in which the machine must be quiet before a run, and for which that is waited for."""


def undisturbed(run: Callable[[], T]) -> tuple[T, float]:
    """The first of TRIES runs in which the machine was ours, else the last; and the cores others used."""
    for _ in range(TRIES):
        until = time.monotonic() + PATIENCE
        while _watched(lambda: time.sleep(LOOK))[1] > FOREIGN and time.monotonic() < until:
            pass
        result, cores = _watched(run)
        if cores <= FOREIGN:
            break
        results.say(f"  disturbed: others used {cores:.2f} cores")
    return result, cores


def noted(run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What `run` found, and the cores that others used meanwhile: where counts matter more than times."""
    found, cores = _watched(run)
    return {**found, "cores_used_by_others": cores}


def _watched(run: Callable[[], T]) -> tuple[T, float]:
    """What `run` returns, and the cores that others used meanwhile."""
    started, foreign = time.monotonic(), _foreign_seconds()
    result = run()
    return result, max(0.0, (_foreign_seconds() - foreign) / (time.monotonic() - started))


def _foreign_seconds() -> float:
    """CPU seconds ever spent by processes that are not ours; kernel threads count as others."""
    busy = psutil.cpu_times()
    own = psutil.Process()
    ours = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) + sum(own.cpu_times()[:2])
    for child in own.children(recursive=True):
        ours += sum(child.cpu_times()[:4])  # those that it has waited for included
    return float(busy.user + busy.nice + busy.system - ours)
