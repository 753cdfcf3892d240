"""A simulation's figures: as a table, as JSON, as plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ops.errors import SimulationError
from ops.letters import table
from ops.simulate.fleet_file import FleetFile
from ops.simulate.record import Record

Figures = dict[str, Any]
_Mask = NDArray[np.bool_]
_Floats = NDArray[np.float64]


class _Columns:
    """A record as arrays. `counted`: those that came after the warm-up."""

    def __init__(self, fleet: FleetFile, record: Record) -> None:
        self.at = np.array(record.at)
        self.source = np.array(record.source)
        self.tenant = np.array(record.tenant)
        self.prompt = np.array(record.prompt)
        self.shareable = np.array(record.shareable)
        self.cached = np.array(record.cached)
        self.made = np.array(record.made)
        self.preempted = np.array(record.preempted)
        self.sent = np.array(record.sent)
        self.first = np.array(record.first)
        self.predicted = np.array(record.predicted)
        self.shed = ~np.isnan(np.array(record.shed))
        self.retry = np.array(record.retry)
        self.ttft: _Floats = self.first - self.at
        goals = np.array([source.goal_ms / 1000 or np.inf for source in fleet.sources])
        classes = list(fleet.sources)
        self.classes = np.array([source.service_class.value for source in classes])[self.source]
        self.good = ~np.isnan(np.array(record.end)) & (self.ttft <= goals[self.source])
        self.counted: _Mask = self.at >= fleet.warmup
        self.seconds = fleet.duration - fleet.warmup


def figures(fleet: FleetFile, record: Record) -> Figures:
    """Of the requests that came after the warm-up; times in ms, rates in requests a second.

    `hit_rate` is of what a cache that forgets nothing would have had, `cached_share` of all prompt tokens.
    `goodput` counts requests that ended and whose first token met their goal. `prediction_error_p90_ms` is
    what the time to the first token was off what was foretold at the send; `kv_use_while_queued` the mean
    over workers that ran while requests waited somewhere, in the warm-up too. `adapter_loads` are those of
    the whole run, and `without_adapter` its requests that came to a worker which had yet to load theirs.
    """
    columns = _Columns(fleet, record)
    overall = _of(columns, columns.counted)
    seconds, counts = np.array(record.step_seconds), np.array(record.step_counts)
    return {
        **overall,
        "adapter_loads": record.loads,
        "without_adapter": record.cold,
        "engine_preemptions": record.recomputed,
        "kv_use_while_queued": _share(record.kv_s, record.busy_s),
        "step_ms": {f"p{p}": _ms(_weighted(seconds, counts, p)) if len(seconds) else None for p in (50, 99)},
        "classes": {
            str(name): _of(columns, columns.counted & (columns.classes == name))
            for name in np.unique(columns.classes)
        },
        "tenants": {
            name: _of(columns, columns.counted & (columns.tenant == number))
            for number, name in enumerate(record.tenants)
        },
    }


def _of(columns: _Columns, mask: _Mask) -> Figures:
    ttft = columns.ttft[mask & ~np.isnan(columns.ttft)]
    count, seconds = int(mask.sum()), columns.seconds
    served = mask & (columns.cached >= 0)
    hits = np.minimum(columns.cached, columns.shareable)
    foretold = mask & (columns.predicted > 0) & ~np.isnan(columns.ttft) & (columns.preempted == 0)
    errors = np.abs(columns.first - columns.sent - columns.predicted)[foretold]
    return {
        "requests": count,
        "rate": round(count / seconds, 1),
        "ttft_ms": {f"p{p}": _ms(np.percentile(ttft, p)) if len(ttft) else None for p in (50, 90, 99)},
        "hit_rate": _share(hits[served].sum(), columns.shareable[served].sum()),
        "cached_share": _share(columns.cached[served].sum(), columns.prompt[served].sum()),
        "goodput": round(float((mask & columns.good).sum()) / seconds, 1),
        "tokens_per_s": round(float(columns.made[mask].sum()) / seconds, 1),
        "shed": int((mask & columns.shed).sum()),
        "preempted": int(columns.preempted[mask].sum()),
        "retry_after_p50_s": _median(columns.retry[mask & columns.shed]),
        "prediction_error_p90_ms": _ms(np.percentile(errors, 90)) if len(errors) else None,
    }


def _ms(seconds: Any) -> float:
    return round(float(seconds) * 1000, 2)


def _median(seconds: _Floats) -> float | None:
    return round(float(np.median(seconds)), 2) if len(seconds) else None


def _share(part: Any, whole: Any) -> float | None:
    return round(float(part / whole), 4) if whole else None


def _weighted(values: _Floats, counts: NDArray[np.int64], percent: float) -> float:
    """The smallest value that so many percent of all are not above. At least one is needed."""
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(reached, reached[-1] * percent / 100)])


def text(found: Mapping[str, Figures]) -> str:
    """A row a policy; where there are several classes, a row for each below it."""
    rows = []
    for policy, figures in found.items():
        rows.append([policy, *_cells(figures), _number(figures["step_ms"]["p99"])])
        if len(figures["classes"]) > 1:
            rows += [[f"  {name}", *_cells(of), ""] for name, of in figures["classes"].items()]
    head = ("policy", "req/s", "TTFT p50 ms", "p99 ms", "hits", "good/s", "shed", "preempted", "step p99 ms")
    return table(head, rows)


def _cells(figures: Figures) -> list[str]:
    ttft, hits = figures["ttft_ms"], figures["hit_rate"]
    return [
        _number(figures["rate"]),
        _number(ttft["p50"]),
        _number(ttft["p99"]),
        "" if hits is None else f"{hits:.3f}",
        _number(figures["goodput"]),
        f"{figures['shed'] / max(1, figures['requests']):.1%}",
        str(figures["preempted"]),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def plot(fleet: FleetFile, records: Mapping[str, Record], folder: Path) -> list[Path]:
    """The files written. Raises SimulationError where matplotlib is not installed, or the folder can't be."""
    try:
        import matplotlib
    except ImportError as exc:
        raise SimulationError("plots need matplotlib: pip install matplotlib") from exc
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = {policy: _Columns(fleet, record) for policy, record in records.items()}
    ttft, waiting = Figure(figsize=(8, 5), layout="tight"), Figure(figsize=(8, 5), layout="tight")
    _plot_ttft(ttft.subplots(), columns)
    _plot_waiting(waiting.subplots(), columns)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in (("ttft.png", ttft), ("waiting.png", waiting)):
            figure.savefig(folder / name, dpi=120)
    except OSError as exc:
        raise SimulationError(f"{folder} can't be written: {exc.strerror}") from exc
    return [folder / "ttft.png", folder / "waiting.png"]


def _plot_ttft(axes: Any, columns: Mapping[str, _Columns]) -> None:
    for policy, of in columns.items():
        ttft = np.sort(of.ttft[of.counted & ~np.isnan(of.ttft)]) * 1000
        axes.plot(ttft, np.arange(1, len(ttft) + 1) / max(1, len(ttft)), label=policy)
    axes.set(xscale="log", xlabel="time to the first token, ms", ylabel="share of the requests served")
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_waiting(axes: Any, columns: Mapping[str, _Columns]) -> None:
    for policy, of in columns.items():
        served = ~np.isnan(of.first)
        moments = np.linspace(0, float(of.at.max(initial=0.0)), 400)
        came = np.searchsorted(of.at[served], moments, side="right")
        went = np.searchsorted(np.sort(of.first[served]), moments, side="right")
        axes.plot(moments, came - went, label=policy)
    axes.set(xlabel="s", ylabel="requests that wait for their first token", yscale="symlog")
    axes.grid(alpha=0.3)
    axes.legend()
