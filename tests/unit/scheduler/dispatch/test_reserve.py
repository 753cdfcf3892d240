"""How many workers are kept for those who go first."""

from __future__ import annotations

import numpy as np
import pytest

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig, Pool
from scheduler.dispatch.fleet import Fleet
from scheduler.dispatch.lanes import ROWS
from scheduler.dispatch.reserve import SPAN, Reserve
from scheduler.dispatch.types import WorkerState
from tests.unit.scheduler.dispatch.world import BASE

INTERACTIVE, STANDARD, BATCH = ServiceClass
WORKERS = 10


def test_a_row_is_kept_from_what_those_before_it_fill() -> None:
    made = Reserve()
    for _ in range(4):
        made.add(0, 500.0, 100.0, 0.0)
    made.add(2, 0.0, 4000.0, 0.0)
    needs = made.needs(rate=1000.0, slots=8.0, kv_total=1000.0, now=0.0)
    # Of the prompts, the slots and the KV room each time what is shortest.
    assert needs == pytest.approx([0.0, 2.0, 2.0, 4.4, 4.4, 4.4])
    assert made.needs(1000.0, 8.0, 0.0, 0.0) == pytest.approx([0.0, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_what_was_sent_is_forgotten_and_what_has_ended_fills_nothing() -> None:
    made = Reserve()
    made.add(0, 1000.0, 500.0, 0.0)
    made.remove(0, 500.0)
    first, later = (made.needs(1000.0, 8.0, 1000.0, at)[1] for at in (0.0, SPAN))
    assert first == pytest.approx(1.0)
    assert later == pytest.approx(0.37, abs=0.01)
    assert made.needs(1000.0, 8.0, 1000.0, 100.0)[1] == pytest.approx(0.0)


def busy(load: int = 1) -> Fleet:
    made = Fleet(BASE, DispatchConfig(reserve=2.0))
    for slot in range(WORKERS):
        made.join(slot)
        made.state(slot, WorkerState(f"w{slot}", 0.0, 512, 64, load, 0, 0, 0))
    made.note_arrival(0, 0.0)
    return made


def taken_by(fleet: Fleet, service_class: ServiceClass, over: bool, model: str = BASE) -> list[int]:
    slots = range(len(fleet.seen))
    return [slot for slot in slots if fleet.takes(slot, service_class, over, 0.0, model)]


def keep(fleet: Fleet, workers: float, now: float = 0.0) -> None:
    """As if those who come first of all filled so many."""
    fleet.keep(np.array([0.0, *[workers] * (ROWS - 1)]), now)


def test_workers_that_others_need_are_closed_and_the_rest_is_for_whoever_comes() -> None:
    fleet = busy()
    keep(fleet, 3.0)
    everybody = list(range(WORKERS))
    assert taken_by(fleet, INTERACTIVE, over=False) == everybody
    for service_class, over in ((INTERACTIVE, True), (STANDARD, False), (BATCH, True)):
        assert taken_by(fleet, service_class, over) == everybody[6:]
    assert [fleet.fills_as(slot, BATCH, False) for slot in (6, 7)] == [BATCH, INTERACTIVE]
    assert taken_by(fleet, BATCH, False, "an adapter") == everybody


def test_one_is_left_while_those_who_go_first_have_enough_of_the_others() -> None:
    fleet = busy()
    keep(fleet, 7.0)
    assert taken_by(fleet, BATCH, over=False) == [9]
    keep(fleet, 8.0)
    assert taken_by(fleet, BATCH, over=False) == list(range(WORKERS))
    assert {fleet.fills_as(slot, BATCH, False) for slot in range(WORKERS)} == {BATCH}


def test_what_is_closed_to_those_before_is_not_open_to_those_after() -> None:
    fleet = busy()
    for row in (2, 3):
        fleet.note_arrival(row, 0.0)
    # Interactive fills three, standard five more: hardly any would be left for batch.
    fleet.keep(np.array([0.0, 3.0, 3.0, 8.0, 8.0, 8.0]), 0.0)
    assert taken_by(fleet, STANDARD, over=False) == [6, 7, 8, 9]
    for service_class, over in ((STANDARD, True), (BATCH, False), (BATCH, True)):
        assert taken_by(fleet, service_class, over) == [6, 7, 8, 9]
        assert {fleet.fills_as(slot, service_class, over) for slot in range(6, 10)} == {service_class}


def test_one_is_left_that_can_take_something() -> None:
    fleet = busy()
    fleet.state(9, WorkerState("w9", 0.0, 512, 0, 1, 0, 0, 0))
    keep(fleet, 6.0)
    assert taken_by(fleet, BATCH, over=False) == [8]


def test_nothing_is_kept_for_classes_that_run_elsewhere() -> None:
    pools = {INTERACTIVE: Pool(most_step_tokens=2048), BATCH: Pool(least_step_tokens=8192)}
    fleet = Fleet(BASE, DispatchConfig(reserve=2.0, pools=pools))
    for slot, step in enumerate([2048] * 4 + [8192] * 4):
        fleet.join(slot)
        fleet.state(slot, WorkerState(f"w{slot}", 0.0, step, 64, 1, 0, 0, 0))
    fleet.note_arrival(0, 0.0)
    keep(fleet, 2.0)
    assert taken_by(fleet, INTERACTIVE, over=True)[0] == 3
    assert {4, 5, 6, 7} <= set(taken_by(fleet, BATCH, over=False))


def test_a_closed_worker_that_has_nothing_to_do_takes_what_waits() -> None:
    fleet = busy(load=0)
    keep(fleet, 3.0)
    assert taken_by(fleet, BATCH, over=False) == list(range(WORKERS))


def test_nothing_is_kept_for_those_who_come_no_more_nor_from_those_before_them() -> None:
    fleet = busy()
    keep(fleet, 3.0, now=DispatchConfig().memory + 1.0)
    assert taken_by(fleet, BATCH, over=True) == list(range(WORKERS))


def test_who_is_left_when_workers_go_may_take_all_until_it_is_known_what_is_needed() -> None:
    fleet = busy()
    keep(fleet, 4.0)
    for slot in (8, 9):
        fleet.leave(slot)
    assert fleet.closed(BATCH, False) == 0
