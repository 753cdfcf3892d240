"""What the dispatcher promises, over minutes of a fleet: budgets, KV room, shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import dispatch_policies
from ops.simulate import command, report
from ops.simulate.fleet_file import FleetFile, PolicyName
from ops.simulate.record import Record
from tests.unit.ops.simulate.fleets import ENGINE, fleet


def figures(file: FleetFile, policy: PolicyName = "lanes") -> dict[str, Any]:
    return report.figures(file, command.play(file, policy))


def test_interactive_requests_meet_their_budget_and_batch_ones_keep_their_progress() -> None:
    bursts = {"arrivals": "bursts", "peak": 4.0, "burst": 0.2, "period": 10.0}
    chat = {"name": "chat", "class": "interactive", "rate": 7.0, "goal_ms": 1000.0, **bursts}
    chat |= {"prompt": {"mean": 190}, "output": {"mean": 50, "sigma": 0.5, "most": 200}}
    work = {
        "name": "work",
        "class": "batch",
        "rate": 4.0,
        "output": {"mean": 800, "sigma": 0.8, "most": 4000},
    }
    file = fleet(chat, work, count=4, duration=30.0, engine={"max_num_seqs": 8, "kv_blocks": 2048})
    record = command.play(file, "lanes")
    found = report.figures(file, record)
    chatting, working = found["classes"]["interactive"], found["classes"]["batch"]
    assert chatting["goodput"] > 0.95 * chatting["rate"]
    assert working["preempted"] > 0
    assert list(record.made) == [call.output for call in command.calls(file)]
    assert figures(file, "fifo")["classes"]["interactive"]["goodput"] < 0.7 * chatting["rate"]


HOSTILE: dict[str, Any] = {
    "rate": 25.0,
    "arrivals": "bursts",
    "peak": 4.0,
    "prompt": {"mean": 700, "sigma": 1.0, "most": 3000},
    "output": {"mean": 250, "sigma": 1.0},
}
"""Long prompts, long outputs, bursts; `SMALL` caches hold a few of them."""

SMALL = {"kv_blocks": 1024, "context_tokens": 6000}


def test_no_engine_runs_out_of_kv_room_and_none_lets_it_lie_while_requests_wait() -> None:
    file = fleet(HOSTILE, count=4, engine=SMALL, duration=60.0)
    found = figures(file)
    assert found["kv_use_while_queued"] >= 0.85
    assert found["engine_preemptions"] <= 0.02 * found["requests"]
    assert figures(file, "push_fresh")["engine_preemptions"] > 0.5 * found["requests"]


def test_room_is_kept_for_more_urgent_requests_while_such_come() -> None:
    chat = {"name": "chat", "class": "interactive", "goal_ms": 200.0}
    found = figures(fleet(HOSTILE, chat, count=4, engine=SMALL, duration=30.0))
    chatting = found["classes"]["interactive"]
    assert chatting["goodput"] > 0.95 * chatting["rate"]
    assert found["kv_use_while_queued"] >= 0.82
    assert found["engine_preemptions"] <= 0.01 * found["requests"]


FAIR = dispatch_policies.FAIR | {"rate": 210.0}
HOG = dispatch_policies.FLOOD | {"name": "hog"}


def ttft(record: Record, stream: str, since: float) -> tuple[float, float]:
    """p50 and p99 of a stream's tenants, of those that came `since` then."""
    tenants = [number for number, name in enumerate(record.tenants) if name.startswith(stream)]
    at, first = np.array(record.at), np.array(record.first)
    p50, p99 = np.percentile((first - at)[(at >= since) & np.isin(record.tenant, tenants)], [50, 99])
    return float(p50), float(p99)


def test_a_tenant_that_floods_the_fleet_waits_for_itself() -> None:
    """A hundred times the others' share each: they are about as fast as alone. It has what they leave."""
    flooded = fleet(FAIR, HOG, count=8, duration=5.0)
    record = command.play(flooded, "lanes")
    before, after = (
        ttft(each, "fair", 2.0)
        for each in (command.play(flooded.model_copy(update={"stream": flooded.stream[:1]}), "lanes"), record)
    )
    assert after[0] < 1.15 * before[0]
    assert after[1] < 1.2 * before[1]
    assert ttft(record, "hog", 2.0)[0] > 50 * after[0]
    first = np.array(record.first)
    served = np.count_nonzero((first >= 2.0) & (first < 5.0))
    lone = np.array(command.play(flooded.model_copy(update={"stream": flooded.stream[1:]}), "lanes").first)
    assert served > 0.6 * np.count_nonzero((lone >= 2.0) & (lone < 5.0))


def test_where_all_workers_are_needed_a_flood_finds_each_full_a_little_sooner() -> None:
    """Steps are full that had been half empty: that nobody can take from the others."""
    fair, hog = FAIR | {"rate": 60.0}, HOG | {"rate": 1000.0}
    alone = ttft(command.play(fleet(fair, duration=4.0), "lanes"), "fair", 1.0)
    beside = ttft(command.play(fleet(fair, hog, duration=4.0), "lanes"), "fair", 1.0)
    assert beside[0] < 2 * alone[0]
    assert beside[1] < 1.6 * alone[1]


def test_pools_keep_interactive_requests_out_of_long_steps() -> None:
    """Half the workers make small steps, for interactive requests; long prompts go to the others."""
    small, large = ({**ENGINE, "kv_blocks": 4096, "max_num_batched_tokens": tokens} for tokens in (256, 4096))
    chat = {"name": "chat", "class": "interactive", "rate": 30.0, "output": {"mean": 20}}
    work = {"name": "work", "class": "batch", "rate": 4.0, "prompt": {"mean": 6000}, "output": {"mean": 20}}
    pools = {"interactive": {"most_step_tokens": 256}, "batch": {"least_step_tokens": 4096}}
    workers = [{"name": name, "count": 2, "engine": engine} for name, engine in (("s", small), ("l", large))]
    waits = {
        name: ttft(command.play(file, "lanes"), "chat", 2.0)[1]
        for name, file in (
            ("pools", fleet(chat, work, workers=workers, dispatch={"pools": pools})),
            ("none", fleet(chat, work, workers=workers)),
        )
    }
    assert waits["pools"] < 0.6 * waits["none"]


def test_tenants_are_served_by_their_weights() -> None:
    both = FAIR | {"rate": 600.0, "tenants": 1}
    streams = both | {"name": "a", "weight": 3.0}, both | {"name": "b"}
    record = command.play(fleet(*streams, duration=8.0), "lanes")
    first, tenant = np.array(record.first), np.array(record.tenant)
    served = {
        name: np.count_nonzero((tenant == number) & (first >= 3.0) & (first < 8.0))
        for number, name in enumerate(record.tenants)
    }
    assert 2.5 < served["a-0"] / served["b-0"] < 3.5
