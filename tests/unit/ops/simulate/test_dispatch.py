"""What the dispatcher promises, over minutes of a fleet: budgets, KV room, shares."""

from __future__ import annotations

from typing import Any

from ops.simulate import command, report
from ops.simulate.fleet_file import FleetFile, PolicyName
from tests.unit.ops.simulate.fleets import fleet


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


def test_a_tenant_that_floods_the_fleet_waits_for_itself() -> None:
    fair = {"name": "fair", "rate": 60.0, "tenants": 4, "prompt": {"mean": 300}}
    hog = {"name": "hog", "rate": 1500.0, "prompt": {"mean": 300}}
    alone = figures(fleet(fair, duration=4.0, warmup=1.0))
    beside = figures(fleet(fair, hog, duration=4.0, warmup=1.0))
    for tenant, before in alone["tenants"].items():
        after = beside["tenants"][tenant]["ttft_ms"]
        # The steps that they come into are full now, where they had been half empty.
        assert after["p50"] < 2 * before["ttft_ms"]["p50"]
        assert after["p99"] < 1.5 * before["ttft_ms"]["p99"]
    assert beside["tenants"]["hog-0"]["ttft_ms"]["p50"] > 50 * alone["ttft_ms"]["p50"]
