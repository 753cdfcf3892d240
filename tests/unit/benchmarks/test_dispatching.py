"""The sections about the dispatcher: what was measured, against its targets."""

from __future__ import annotations

from typing import Any

from benchmarks import dispatcher, report

ORIGIN = {
    "command": "python -m benchmarks",
    "date": "2026-01-01",
    "machine": {"cpu": "cpu", "cores": 2, "memory_gib": 4, "kernel": "6", "python": "3.11"},
}


def test_decisions_are_held_against_the_target_of_their_fleet_and_against_the_smallest() -> None:
    case = {
        "a_second": 4000,
        "heartbeat_ms": 0.012,
        "p50_ms": 0.2,
        "p99_ms": 0.4,
        "queued": 0,
        "slowest": 2999,
    }
    larger = case | {"a_second": 3200, "heartbeat_ms": 0.015}
    measured = {"10_credit": case, "100_credit": larger, "1000_credit": larger, "1000_deep": case}
    text = report._dispatcher({"decisions": 20_000, "rounds": 5, **measured, **ORIGIN})
    same = "2,999 | 0.20 | 0.40 | ≤ 1: met"
    for row in (
        f"| 10 | credit | 4,000 |  | {same} | 250 | 1.00 | 12.0 | 1.00 |",
        f"| 100 | credit | 3,200 | ≥ 5000: **missed** | {same} | 312 | 1.25 | 15.0 | 1.25 |",
        f"| 1,000 | credit | 3,200 | ≥ 1000: met | {same} | 312 | 1.25 | 15.0 | 1.25 |",
        f"| 1,000 | deep | 4,000 | ≥ 1000: met | {same} | 250 | 1.00 | 12.0 | 1.00 |",
    ):
        assert row in text


def test_what_handing_out_adds_is_held_against_half_a_millisecond() -> None:
    def spread(median: float) -> dict[str, float]:
        return {"median": median, "low": median, "high": median}

    found: dict[str, Any] = {}
    for p, added in ((50, 0.4), (99, 0.9)):
        found |= {
            f"on_ttft_p{p}_ms": spread(22.0 + added),
            f"off_ttft_p{p}_ms": spread(22.0),
            f"added_ttft_p{p}_ms": spread(added),
            f"floor_p{p}_ms": spread(0.3),
        }
    record = {"ttft_ms": 20, "itl_ms": 20, "tokens": 40, "rounds": 6, "cores_used_by_others": 0.1}
    text = report._handing({**record, "streams": {"32": found}, **ORIGIN})
    assert (
        "| 32 | TTFT p50, ms | 22.40 | 22.00 | 0.40 (0.40 to 0.40) | 0.30 (0.30 to 0.30) | ≤ 0.5: met |"
        in text
    )
    assert "| 32 | TTFT p99, ms | 22.90 | 22.00 | 0.90 (0.90 to 0.90) | 0.30 (0.30 to 0.30) |" in text


def test_a_takeover_is_held_against_a_second_at_its_longest() -> None:
    times = {
        name: {"median": 0.5, "low": 0.25, "high": high} for name, high in (("word", 0.9), ("sent", 1.1))
    }
    wait = {"wait": {"median": 0.1, "low": 0.05, "high": 0.4}}
    record = {
        "strikes": {"leader killed": 10, "standby killed": 3},
        "struck": {"leader killed": times | wait, "standby killed": wait},
        "rate": 50.0,
        "cores_used_by_others": 0.1,
    }
    text = report._takeover({**record, **ORIGIN})
    assert "| leader killed | 10 | 0.50 (0.25 to 0.90) | 0.50 (0.25 to 1.10) | 0.10 (0.05 to 0.40) |" in text
    assert "0.40) | ≤ 1: **missed** |" in text
    assert "| standby killed | 3 |  |  | 0.10 (0.05 to 0.40) |  |" in text


def test_the_benchmark_of_the_dispatcher_runs() -> None:
    found = dispatcher.measure(workers=4, deep=False, decisions=500)
    assert found["a_second"] > 0
    assert found["queued"] == 0


def test_the_simulator_is_held_against_a_fleet() -> None:
    side = {"requests": 1000, "p50_ms": 100.0, "p90_ms": 200.0, "p99_ms": 400.0, "hit_rate": 0.9}
    simulated = {**side, "error_p90_ms": 10.0}
    told = {"requests": 500, "refused": 80, "told_p50_s": 4.2, "waited_p50_s": 4.0, "right": 0.8}
    record = {
        "workers": 4,
        "simulated": simulated,
        "measured": {**simulated, "p50_ms": 105.0, "p99_ms": 480.0},
        "ratios": {"p50_ms": 1.05, "p99_ms": 1.2, "hit_rate": 1.0},
        "refusals": {"simulated": told, "measured": {**told, "right": 0.4}},
        "cores_used_by_others": 0.1,
    }
    text = report._fidelity({**record, **ORIGIN})
    assert "| TTFT p50, ms | 100.0 | 105.0 | 1.05 | within 10 %: met |" in text
    assert "| TTFT p99, ms | 400.0 | 480.0 | 1.20 | within 10 %: **missed** |" in text
    assert "| simulated | 500 | 80 | 4.2 | 4.0 | 80% | ≥ 0.5: met |" in text
    assert "| measured | 500 | 80 | 4.2 | 4.0 | 40% | ≥ 0.5: **missed** |" in text


def test_what_a_flood_does_to_the_others_is_held_against_a_tenth() -> None:
    alone = {"alone_p50_ms": 20.0, "alone_p99_ms": 60.0}
    rates = {
        "105": alone | {"beside_p50_ms": 22.0, "beside_p99_ms": 67.2, "served_s": 400.0},
        "330": alone | {"beside_p50_ms": 21.0, "beside_p99_ms": 63.0, "served_s": 379.6},
    }
    text = "\n".join(report._fairness({"alone_s": 520.0, "rates": rates}))
    assert "served 520 requests a second" in text
    assert "| 105 | 20.0 | 22.0 | 60.0 | 67.2 | 1.10 | 1.12 | ≤ 1.1: **missed** | 400 |" in text
    assert "| 330 | 20.0 | 21.0 | 60.0 | 63.0 | 1.05 | 1.05 | ≤ 1.1: met | 380 |" in text


def test_what_a_heartbeat_costs_is_held_against_the_smallest_fleet() -> None:
    few = {"heartbeats_per_s": 100, "cores": 0.041, "us": 410.0, "silence_s": 0.102}
    many = {"heartbeats_per_s": 10_000, "cores": 0.574, "us": 57.4, "silence_s": 0.104}
    measured = {"every_s": 0.1, "silence_s": 0.35, "cores_used_by_others": 0.0, **ORIGIN}
    text = report._heartbeats({"fleets": {"10": few, "1000": many}, **measured})
    assert "| 10 | 100 | 0.04 | 410 | 1.00 | 0.10 |" in text
    assert "| 1,000 | 10,000 | 0.57 | 57 | 0.14 | 0.10 |" in text
