"""The scenario of examples/fleet.toml, for a shorter time: which policies lose their prefixes as it gets
full, and with them the capacity that they would have needed; and that the dispatcher does not.

Ratios alone are held, and they are the same on every machine: no time of its own goes in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ops.simulate import command, fleet_file, report
from ops.simulate.fleet_file import PolicyName

EXAMPLE = Path(__file__).parents[4] / "examples/fleet.toml"


def figures(policy: PolicyName, scale: float = 1.0, duration: float = 7.0) -> dict[str, Any]:
    fleet = fleet_file.load(EXAMPLE, {"duration": duration, "warmup": duration / 2})
    fleet = command.scaled(fleet, scale)
    return report.figures(fleet, command.play(fleet, policy))


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What nobody can have: the state of every worker, at once."""
    return figures("push_fresh")


@pytest.mark.parametrize("policy", ["fifo", "round_robin", "least_loaded", "greedy", "push_stale_blind"])
def test_these_collapse(policy: PolicyName, fresh: dict[str, Any]) -> None:
    found = figures(policy)
    assert found["hit_rate"] < 0.65 * fresh["hit_rate"]
    assert found["ttft_ms"]["p50"] > 10 * fresh["ttft_ms"]["p50"]
    assert found["goodput"] < 0.5 * fresh["goodput"]


@pytest.mark.parametrize("policy", ["lanes", "push_stale"])
def test_these_do_not(policy: PolicyName, fresh: dict[str, Any]) -> None:
    found = figures(policy)
    assert found["hit_rate"] > 0.95 * fresh["hit_rate"]
    assert found["ttft_ms"]["p50"] < 1.25 * fresh["ttft_ms"]["p50"]
    assert found["ttft_ms"]["p99"] < 1.25 * fresh["ttft_ms"]["p99"]
    assert found["goodput"] == fresh["goodput"]


def test_greedy_does_well_while_there_is_room() -> None:
    assert figures("greedy", 0.7)["hit_rate"] > 0.9


@pytest.mark.parametrize("scale", [1150 / 950, 1300 / 950])
def test_lanes_stay_with_their_prefixes_as_load_rises(scale: float) -> None:
    found = figures("lanes", scale)
    assert found["hit_rate"] > 0.9
    assert found["goodput"] > 0.98 * found["rate"]


def test_at_twice_the_capacity_lanes_shed_and_serve_as_much_as_ever() -> None:
    most = figures("lanes", 2.5, 4.0)["goodput"]
    twice = figures("lanes", 5.0, 4.0)
    assert twice["shed"] > 0.3 * twice["requests"]
    assert twice["goodput"] > 0.95 * most
