"""The dispatcher against other policies in the simulator: the scenario of examples/fleet.toml at several
rates, up to more than the fleet can do. And what the simulator takes for 1,000 workers and a million of them.

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

FILE = Path(__file__).parent.parent / "examples/fleet.toml"
RATES = (950, 1150, 1300)
BEYOND = (1600, 2400, 4800)
STURDY: tuple[PolicyName, ...] = ("lanes", "push_fresh", "consistent_hashing")
WORKERS, REQUESTS = 1000, 1_000_000


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
