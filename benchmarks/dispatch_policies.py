"""The dispatcher against other policies in the simulator: the scenario of examples/fleet.toml at several
rates, up to more than the fleet can do. How long eight tenants wait beside one that floods the fleet. And
what the simulator takes for 1,000 workers and a million of them.

The goals are at 950 requests a second: p50 at most 25 ms, p99 at most 85 ms, prefix hits at least .93, and
the times within 10 % of pushing with fresh state. They are the same on every machine; the simulator's speed
is not.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from kvstate import prefix
from ops.simulate import command, fleet_file, report
from ops.simulate.fleet_file import POLICIES, FleetFile, PolicyName
from ops.simulate.record import Record

FILE = Path(__file__).parent.parent / "examples/fleet.toml"
RATES = (950, 1150, 1300)
BEYOND = (1600, 2700, 5400)
STURDY: tuple[PolicyName, ...] = ("lanes", "push_fresh", "consistent_hashing")
WORKERS, REQUESTS = 1000, 1_000_000

FAIR_RATES = (30, 105, 210, 280, 330)
FAIR: dict[str, Any] = {
    "name": "fair",
    "tenants": 8,
    "prompt": {"mean": 300, "sigma": 0.5, "most": 2048},
    "output": {"mean": 8, "sigma": 0.5, "most": 64},
}
FLOOD = FAIR | {"name": "flood", "rate": 2600.0, "tenants": 1}
"""One tenant, who asks for some hundred times as much as each of the others."""
FLOODED: dict[str, Any] = {
    "workers": [
        {"count": 8, "engine": {"max_num_batched_tokens": 512, "max_num_seqs": 32, "kv_blocks": 1024}}
    ],
    "duration": 12.0,
    "warmup": 3.0,
}


def run(quick: bool) -> dict[str, Any]:
    fleet = fleet_file.load(FILE, {"duration": 2.0, "warmup": 1.0} if quick else {})
    rates = {str(rate): _at(fleet, rate, POLICIES) for rate in RATES}
    beyond = {str(rate): _at(fleet, rate, STURDY) for rate in BEYOND[: 1 if quick else None]}
    return {
        "workers": fleet.workers[0].count,
        "groups": fleet.stream[0].groups,
        "prefix": fleet.stream[0].prefix,
        "prompt": fleet.stream[0].prompt.mean,
        "step_tokens": fleet.workers[0].engine.max_num_batched_tokens,
        "kv_tokens": fleet.workers[0].engine.kv_blocks * fleet.block_size,
        "goal_ms": fleet.stream[0].goal_ms,
        "seconds": fleet.duration - fleet.warmup,
        "rates": rates,
        "beyond": beyond,
        "fairness": _fairness({"duration": 2.0, "warmup": 1.0} if quick else {}),
        "speed": _speed(REQUESTS // 100 if quick else REQUESTS),
    }


def _at(fleet: FleetFile, rate: int, policies: tuple[PolicyName, ...]) -> dict[str, report.Figures]:
    scaled = command.scaled(fleet, rate / fleet.stream[0].rate)
    found: dict[str, report.Figures] = {}
    for name in policies:
        figures = report.figures(scaled, command.play(scaled, name))
        found[name] = {key: figures[key] for key in ("requests", "ttft_ms", "hit_rate", "goodput", "shed")}
        results.say(f"  {rate}/s {name}: {found[name]}")
    return found


def _fairness(changes: dict[str, Any]) -> dict[str, Any]:
    """Of the eight, alone and beside the flood, at each of their rates; and what the flood has by itself."""

    def played(*streams: dict[str, Any]) -> tuple[FleetFile, Record]:
        file = FleetFile.model_validate(FLOODED | {"stream": streams} | changes)
        return file, command.play(file, "lanes")

    found: dict[str, Any] = {"alone_s": _served(*played(FLOOD)), "rates": {}}
    for rate in FAIR_RATES:
        fair = FAIR | {"rate": float(rate)}
        sides = {"alone": played(fair), "beside": played(fair, FLOOD)}
        of = {
            f"{side}_p{p}_ms": 1000 * results.percentile(_ttft(*run), p)
            for side, run in sides.items()
            for p in (50, 99)
        }
        found["rates"][str(rate)] = of | {"served_s": _served(*sides["beside"])}
        results.say(f"  {rate}/s beside a flood: {found['rates'][str(rate)]}")
    return found


def _served(file: FleetFile, record: Record) -> float:
    """First tokens a second."""
    counted = sum(file.warmup <= first < file.duration for first in record.first)
    return counted / (file.duration - file.warmup)


def _ttft(file: FleetFile, record: Record) -> list[float]:
    """Of the first stream's."""
    each = zip(record.at, record.source, record.first, strict=True)
    return [first - at for at, source, first in each if source == 0 and at >= file.warmup]


def large(requests: int) -> FleetFile:
    """The same scenario with `WORKERS` workers, and in proportion more prefixes and requests a second. The
    engines' blocks are as large as the dispatcher's: nothing is told apart by them here."""
    fleet = fleet_file.load(FILE)
    (workers,), (stream,) = fleet.workers, fleet.stream
    factor = WORKERS / workers.count
    engine = workers.engine
    blocks = engine.kv_blocks * engine.block_size // prefix.BLOCK_TOKENS
    coarse = engine.model_copy(update={"block_size": prefix.BLOCK_TOKENS, "kv_blocks": blocks})
    more = {"rate": stream.rate * factor, "groups": round(stream.groups * factor)}
    return fleet.model_copy(
        update={
            "duration": requests / (stream.rate * factor),
            "warmup": 0.0,
            "workers": (workers.model_copy(update={"count": WORKERS, "engine": coarse}),),
            "stream": (stream.model_copy(update=more),),
        }
    )


def _speed(requests: int) -> dict[str, Any]:
    fleet = large(requests)
    wall, cpu = time.perf_counter(), time.process_time()
    record = command.play(fleet, "lanes")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = report.figures(fleet, record)
    found = {
        "workers": WORKERS,
        "requests": len(record.at),
        "rate": fleet.stream[0].rate,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "p50_ms": figures["ttft_ms"]["p50"],
        "p99_ms": figures["ttft_ms"]["p99"],
        "hit_rate": figures["hit_rate"],
    }
    results.say(f"  {found}")
    return found


if __name__ == "__main__":
    results.main("dispatch_policies", run)
