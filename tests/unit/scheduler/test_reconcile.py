"""From a plan to commands: one load a worker, room made first, and patience with what fails."""

from __future__ import annotations

from typing import Any

import pytest

from broker.messages import AdapterState, Credit, Heartbeat
from broker.placement import Assignment, Placement
from scheduler.config import SchedulerConfig
from scheduler.reconcile import Order, Orders
from scheduler.view import Wanted

CONFIG = SchedulerConfig(retry_load=5, retry_load_most=60, load_timeout=30)


def beat(worker: str = "w1", seq: int = 1, slots: int = 2, started_ms: int = 1, **adapters: str) -> Heartbeat:
    """`a1="ready"`: version 1 of adapter `a` is ready."""
    return Heartbeat(
        worker=worker,
        engine="sim",
        base="llama",
        models=(),
        started_ms=started_ms,
        seq=seq,
        state="serving",
        credit=Credit(),
        slots=slots,
        max_rank=64,
        adapters=tuple(
            AdapterState(model=f"{key[0]}@{key[1:]}", state=state.split()[0], reason=state.partition(" ")[2])
            for key, state in adapters.items()
        ),
    )


def placed(**workers: str) -> Placement:
    """`a1="w1 w2"`."""
    return Placement(
        base="llama",
        assignments=tuple(
            Assignment(model=f"{key[0]}@{key[1:]}", workers=tuple(names.split()))
            for key, names in workers.items()
        ),
    )


def due(
    orders: Orders,
    plan: Placement,
    *beats: Heartbeat,
    now: float = 0.0,
    demand: Any = None,
    known: Any = None,
) -> list[tuple[str, str, str]]:
    known = {each.model: True for each in plan.assignments} if known is None else known
    found = orders.due(plan, beats, demand or {}, known, now)
    return [(order.worker, order.command.do, order.command.model) for order in found]


@pytest.fixture
def orders() -> Orders:
    return Orders(CONFIG)


def test_one_load_at_a_time_what_is_asked_for_most_first(orders: Orders) -> None:
    plan = placed(a1="w1", b1="w1 w2")
    demand = {"b@1": Wanted(3.0, 3), "a@1": Wanted(1.0, 1)}
    assert due(orders, plan, beat(), beat("w2"), demand=demand) == [
        ("w1", "load", "b@1"),
        ("w2", "load", "b@1"),
    ]
    assert due(orders, plan, beat(), beat("w2"), demand=demand, now=1) == []
    for state in ("fetching", "on_disk", "loading"):
        orders.heard(beat(seq=3, b1=state), 2.0)
        assert due(orders, plan, beat(b1=state), demand=demand, now=2) == []
    orders.heard(beat(seq=4, b1="ready"), 3.0)
    assert due(orders, plan, beat(b1="ready"), now=3) == [("w1", "load", "a@1")]
    orders.heard(beat(seq=5, b1="ready", a1="ready"), 4.0)
    assert due(orders, plan, beat(b1="ready", a1="ready"), now=4) == []


def test_nothing_is_loaded_while_the_worker_loads_by_itself(orders: Orders) -> None:
    assert due(orders, placed(a1="w1"), beat(x1="loading"), known={"x@1": True, "a@1": True}) == []


def test_a_worker_that_drains_or_takes_no_adapters_is_told_nothing(orders: Orders) -> None:
    draining = beat().model_copy(update={"state": "draining"})
    assert due(orders, placed(a1="w1 w2"), draining, beat("w2", slots=0)) == []


def test_room_is_made_by_an_idle_adapter_that_is_not_planned_here(orders: Orders) -> None:
    plan, known = placed(a1="w1", b1="w1"), {"a@1": True, "b@1": True, "x@1": True, "y@1": True}
    full = beat(a1="ready", x1="ready")
    assert due(orders, plan, full, known=known) == [("w1", "unload", "x@1")]
    orders.heard(beat(seq=3, a1="ready", x1="on_disk"), 1.0)
    assert due(orders, plan, beat(a1="ready", x1="on_disk"), known=known, now=1) == [("w1", "load", "b@1")]


def test_no_room_is_made_while_the_engine_has_memory_for_one_more(orders: Orders) -> None:
    known = {"a@1": True, "b@1": True, "x@1": True}
    roomy = beat(a1="ready", x1="ready").model_copy(update={"adapters_in_memory": 3})
    assert due(orders, placed(a1="w1", b1="w1"), roomy, known=known) == [("w1", "load", "b@1")]
    full = beat("w2", a1="ready", x1="ready", y1="ready").model_copy(update={"adapters_in_memory": 3})
    assert due(orders, placed(a1="w2", b1="w2"), full, known=known) == [("w2", "unload", "x@1")]


def test_one_that_runs_is_not_unloaded_for_room(orders: Orders) -> None:
    """The worker has it wait for its end, or holds more in memory than run at once."""
    busy = beat(a1="ready", x1="ready")
    states = (busy.adapters[0], busy.adapters[1].model_copy(update={"running": 1}))
    busy = busy.model_copy(update={"adapters": states})
    known = {"a@1": True, "b@1": True, "x@1": True}
    assert due(orders, placed(a1="w1", b1="w1"), busy, known=known) == [("w1", "load", "b@1")]


def test_what_is_loaded_and_not_planned_stays_while_there_is_room(orders: Orders) -> None:
    assert due(orders, placed(), beat(x1="ready"), known={"x@1": True}) == []


def test_an_old_version_is_unloaded_once_nobody_asks_for_it(orders: Orders) -> None:
    asked = {"x@1": Wanted(1.0, 1)}
    assert due(orders, placed(), beat(x1="ready"), known={"x@1": False}, demand=asked) == []
    assert due(orders, placed(), beat(x1="ready"), known={"x@1": False}) == [("w1", "unload", "x@1")]
    assert due(orders, placed(), beat("w2", x1="ready"), known={}) == [("w2", "unload", "x@1")]


def test_a_failed_load_is_tried_again_after_a_pause_that_doubles(orders: Orders) -> None:
    plan, now = placed(a1="w1"), 0.0
    for pause in (5, 10, 20, 40, 60, 60):
        assert due(orders, plan, beat(), now=now) == [("w1", "load", "a@1")]
        orders.heard(beat(seq=9, a1="failed truncated"), now)
        assert orders.barred(now) == {"a@1": {"w1": "truncated"}}
        assert due(orders, plan, beat(seq=10, a1="failed truncated"), now=now + pause - 0.1) == []
        now += pause
        assert orders.barred(now) == {}
    assert due(orders, plan, beat(seq=11), now=now) == [("w1", "load", "a@1")]
    orders.heard(beat(seq=12, a1="ready"), now)
    orders.heard(beat(seq=13, a1="failed again"), now)
    assert orders.barred(now + 5.1) == {}  # it was well in between: the pause is the first one


def test_an_old_failure_in_a_heartbeat_is_none_of_the_new_order(orders: Orders) -> None:
    plan = placed(a1="w1")
    orders.heard(beat(seq=1, a1="failed once"), 0.0)
    (order,) = orders.due(plan, [beat(seq=7, a1="failed once")], {}, {"a@1": True}, 6.0)
    orders.heard(beat(seq=8, a1="failed once"), 6.0)
    orders.answered(order, True, "", 8, 6.0)
    orders.heard(beat(seq=9, a1="failed once"), 6.1)
    assert orders.barred(6.1) == {}
    orders.heard(beat(seq=10, a1="failed twice"), 6.2)
    assert orders.barred(6.2) == {"a@1": {"w1": "twice"}}


def test_a_worker_that_refuses_or_does_not_answer_is_left_alone_with_it(orders: Orders) -> None:
    plan = placed(a1="w1", b1="w1")
    (order,) = orders.due(plan, [beat()], {}, {"a@1": True, "b@1": True}, 0.0)
    orders.answered(order, False, "over-rank", 1, 0.1)
    assert orders.barred(0.1) == {"a@1": {"w1": "over-rank"}}
    assert due(orders, plan, beat(), now=0.2) == [("w1", "load", "b@1")]


def test_a_load_that_never_ends_counts_as_failed(orders: Orders) -> None:
    due(orders, placed(a1="w1"), beat(), now=0.0)
    orders.heard(beat(seq=99, a1="loading"), 30.0)
    assert orders.barred(30.0) == {}
    orders.heard(beat(seq=99, a1="loading"), 30.1)
    assert orders.barred(30.1) == {"a@1": {"w1": "not loaded within 30 s"}}


@pytest.mark.parametrize("state", [{}, {"a1": "on_disk"}])
def test_a_load_that_the_worker_is_not_at_is_told_again_and_is_no_failure(
    orders: Orders, state: dict[str, Any]
) -> None:
    """It took the order on, and all that its engine holds was in use then."""
    plan = placed(a1="w1")
    for now in (0.0, 5.1, 10.2):
        assert due(orders, plan, beat(**state), now=now) == [("w1", "load", "a@1")]
        orders.heard(beat(seq=99, **state), now + 5.0)
        assert due(orders, plan, beat(**state), now=now + 5.0) == []
        orders.heard(beat(seq=99, **state), now + 5.1)
    assert orders.barred(15.3) == {}


def test_nothing_is_kept_of_workers_that_are_gone_or_well_again(orders: Orders) -> None:
    for number in range(3):
        orders.heard(beat(f"w{number}", a1="failed", b1="failed"), 0.0)
    orders.heard(beat("w0", a1="ready", b1="ready"), 1.0)
    orders.gone("w1")
    orders.gone("w2")
    assert orders._failures == {}


def test_a_changed_entry_and_a_new_life_are_given_another_try(orders: Orders) -> None:
    orders.heard(beat(a1="failed", b1="failed"), 0.0)
    assert orders.barred(0.0) == {
        "a@1": {"w1": "it did not say why"},
        "b@1": {"w1": "it did not say why"},
    }
    orders.changed("a")
    assert set(orders.barred(0.0)) == {"b@1"}
    orders.heard(beat(a1="failed", b1="failed"), 0.1)  # that was the entry before
    assert set(orders.barred(0.1)) == {"b@1"}
    assert due(orders, placed(a1="w1"), beat(a1="failed"), now=0.1) == [("w1", "load", "a@1")]
    orders.heard(beat(seq=9, a1="failed anew"), 0.2)
    assert orders.barred(0.2)["a@1"] == {"w1": "anew"}
    orders.gone("w1")
    assert orders.barred(0.0) == {}


def test_an_order_to_an_earlier_life_is_given_again(orders: Orders) -> None:
    plan = placed(a1="w1")
    assert due(orders, plan, beat()) == [("w1", "load", "a@1")]
    orders.heard(beat(started_ms=2), 1.0)
    assert due(orders, plan, beat(started_ms=2), now=1) == [("w1", "load", "a@1")]


def test_an_answer_that_comes_too_late_changes_nothing(orders: Orders) -> None:
    plan = placed(a1="w1")
    (order,) = orders.due(plan, [beat()], {}, {"a@1": True}, 0.0)
    orders.heard(beat(seq=5, a1="ready"), 0.5)
    orders.answered(order, False, "nobody answered", 5, 2.0)
    assert orders.barred(2.0) == {}
    orders.answered(Order("w9", order.command), False, "who?", 0, 2.0)
    assert orders.barred(2.0) == {}
