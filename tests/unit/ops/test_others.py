"""Whom a pool leaves a base to."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import BaseModel

from broker import base
from broker.messages import Credit, Heartbeat, Instance, PoolBeat
from ops.others import Others


@pytest.fixture
def others() -> Others:
    return Others("ours", {"ours-a"}, lost_after=1.0)


def message(told: BaseModel) -> base.Message:
    return base.Message("x", told.model_dump_json().encode())


def worker(name: str = "w", state: str = "serving", **credit: int) -> base.Message:
    told: dict[str, Any] = {"engine": "sim", "base": "a", "models": (), "started_ms": 1, "seq": 0}
    return message(
        Heartbeat.model_validate(told | {"worker": name, "state": state, "credit": Credit(**credit)})
    )


def pool(state: str, name: str = "theirs", failing: bool = False) -> base.Message:
    instance = Instance.model_validate({"base": "a", "state": state, "failing": failing})
    return message(PoolBeat(host="h", name=name, memory=1, used=0, instances=(instance,)))


def test_a_worker_that_serves_it_does(others: Others) -> None:
    others.on_heartbeat(worker())
    now = time.monotonic()
    assert others.serve("a", 5, now)
    assert not others.serve("b", 5, now)
    assert not others.serve("a", 5, now + 2)


def test_our_own_are_not_others(others: Others) -> None:
    others.on_heartbeat(worker("ours-a"))
    others.on_pool(pool("hot", "ours"))
    assert not others.serve("a", 1, time.monotonic())


@pytest.mark.parametrize(("running", "served"), [(2, False), (3, True)])
def test_one_that_drains_sees_to_what_it_has(others: Others, running: int, served: bool) -> None:
    others.on_heartbeat(worker(state="draining", running=running - 1, waiting=1))
    assert others.serve("a", 3, time.monotonic()) is served


def test_one_that_sleeps_serves_nothing(others: Others) -> None:
    others.on_heartbeat(worker(state="asleep"))
    assert not others.serve("a", 1, time.monotonic())


@pytest.mark.parametrize(
    ("state", "served"),
    [
        ("cold", False),
        ("starting", True),
        ("waking", True),
        ("hot", True),
        ("draining", False),
        ("failed", False),
    ],
)
def test_a_pool_that_has_or_starts_it_does(others: Others, state: str, served: bool) -> None:
    others.on_pool(pool(state))
    assert others.serve("a", 1, time.monotonic()) is served


def test_a_pool_that_fell_silent_does_not(others: Others) -> None:
    others.on_pool(pool("hot"))
    assert not others.serve("a", 1, time.monotonic() + 4)
    others.expire(time.monotonic() + 4)
    assert not others.serve("a", 1, time.monotonic())


def test_garbage_is_left_out(others: Others) -> None:
    others.on_pool(base.Message("pool.x", b"{"))
    others.on_heartbeat(base.Message("fleet.x", b"{"))
    assert not others.serve("a", 1, time.monotonic())


def test_a_pool_that_tries_again_what_failed_there_is_not_waited_for(others: Others) -> None:
    others.on_pool(pool("starting", failing=True))
    assert not others.serve("a", 5, time.monotonic())
    others.on_pool(pool("starting"))
    assert others.serve("a", 5, time.monotonic())
