"""Adapters in the simulated world: loaded when needed or placed, and never taken from who runs with them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker.messages import Command
from ops.simulate import command
from ops.simulate.adapters import Adapters
from ops.simulate.engine import Engine
from ops.simulate.fleet_file import FleetFile
from ops.simulate.planning import Planning
from ops.simulate.record import Record
from ops.simulate.run import Worker
from scheduler.config import SchedulerConfig
from tests.unit.ops.simulate.fleets import fleet
from workers.config import SimConfig

SLOTS = {"adapter_slots": 2, "adapters_in_memory": 3, "load_ms": 200.0}
TUNES: dict[str, Any] = {"name": "t", "rate": 20.0, "adapters": 8}


def tuned(*streams: dict[str, Any], **changes: Any) -> FleetFile:
    return fleet(*streams or (TUNES,), engine=SLOTS, **changes)


def asked(model: str) -> Command:
    return Command(do="load", model=model)


ACTS = ("need", "leave", "told", "load", "loaded")


class TestOneWorker:
    def test_loads_what_is_needed_before_what_is_placed_and_one_at_a_time(self) -> None:
        adapters = Adapters(SimConfig(**SLOTS))
        adapters.told(asked("a"))
        adapters.told(asked("b"))
        assert adapters.load() == "a"
        assert not adapters.need("c")
        assert adapters.load() == ""
        assert adapters.loaded() == "a"
        turns = [adapters.load(), adapters.loaded(), adapters.load(), adapters.loaded()]
        assert turns == ["c", "c", "b", "b"]
        assert adapters.need("c")
        assert adapters.loads == 3

    def test_what_was_used_longest_ago_makes_room(self) -> None:
        adapters = Adapters(SimConfig(**SLOTS))
        for model in "abc":
            adapters.told(asked(model))
            adapters.load()
            adapters.loaded()
        assert adapters.need("a")
        adapters.leave("a")
        adapters.told(asked("d"))
        assert adapters.load() == "d"
        assert adapters.there == {"a", "c", "d"}

    def test_unloads_nothing_that_is_needed(self) -> None:
        adapters = Adapters(SimConfig(**SLOTS))
        adapters.need("a")
        adapters.load()
        adapters.loaded()
        adapters.told(Command(do="unload", model="a"))
        assert adapters.there == {"a"}
        adapters.leave("a")
        adapters.told(Command(do="unload", model="a"))
        assert adapters.there == set()

    @given(st.lists(st.tuples(st.sampled_from(ACTS), st.sampled_from("abcdef"))))
    def test_holds_no_more_than_it_may_and_all_that_runs(self, acts: list[tuple[str, str]]) -> None:
        adapters, running, waiting = Adapters(SimConfig(**SLOTS)), Counter[str](), Counter[str]()
        for act, model in acts:
            if act == "need":
                (running if adapters.need(model) else waiting)[model] += 1
            elif act == "leave" and running[model]:
                adapters.leave(model)
                running[model] -= 1
            elif act == "told":
                adapters.told(asked(model))
            elif act == "load":
                adapters.load()
            elif act == "loaded" and adapters.loading:
                there = adapters.loaded()
                running[there] += waiting.pop(there, 0)
            assert {model for model, count in running.items() if count} <= adapters.there
            assert len(adapters.there) <= SLOTS["adapters_in_memory"]
            states = {state.model: state for state in adapters.states()}
            assert {state.model for state in states.values()} == adapters.there
            assert sum(state.running for state in states.values()) == running.total()


def ttft(record: Record) -> NDArray[np.float64]:
    waited: NDArray[np.float64] = np.array(record.first) - np.array(record.at)
    return waited


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("name", ["lanes", "fifo", "push_fresh"])
def test_every_request_ends_once_and_alike_on_every_run(name: Any, plan: bool) -> None:
    file = tuned(TUNES, {"name": "base", "rate": 10.0}, plan=plan)
    record = command.play(file, name)
    assert not np.isnan(np.array(record.end)).any()
    assert record.made.tolist() == [call.output for call in command.calls(file)]
    assert record.loads >= 8
    again = command.play(file, name)
    assert (record.end, record.loads, record.cold) == (again.end, again.loads, again.cold)


def test_only_who_finds_no_adapter_waits_for_it() -> None:
    record = command.play(tuned({**TUNES, "adapters": 1, "rate": 2.0}, count=1, plan=False), "lanes")
    loading = np.array(record.at) < record.at[0] + 0.2
    assert (record.loads, record.cold) == (1, loading.sum())
    assert ttft(record)[0] >= 0.2
    assert ttft(record)[~loading].max() < 0.2


def test_a_batch_request_that_waits_for_its_adapter_may_be_taken_back() -> None:
    streams = (
        {**TUNES, "class": "batch", "rate": 40.0, "output": {"mean": 200}},
        {"name": "i", "class": "interactive", "rate": 10.0},
    )
    record = command.play(fleet(*streams, engine={**SLOTS, "load_ms": 3000.0, "max_num_seqs": 4}), "lanes")
    assert record.preempted.tolist().count(0) < len(record.preempted)
    assert not np.isnan(np.array(record.end)).any()


def test_the_planner_places_what_is_asked_for() -> None:
    """What is asked for most has several workers, and all have one at least, where there is room."""
    file = tuned({**TUNES, "rate": 60.0, "adapter_zipf": 2.0, "output": {"mean": 60}}, count=4, duration=60.0)
    file = file.model_copy(update={"scheduler": SchedulerConfig(dwell=5.0)})
    planned, alone = (command.play(file.model_copy(update={"plan": plan}), "lanes") for plan in (True, False))
    late = np.array(planned.at) >= 20.0
    assert np.percentile(ttft(planned)[late], 99) <= np.percentile(ttft(alone)[late], 99) * 1.05
    assert planned.loads > 8


def test_the_plan_is_the_schedulers() -> None:
    file = tuned()
    planning = Planning("sim", file.adapters, file.scheduler)
    (section,) = file.workers
    workers = [
        Worker(name, section.engine, Engine(section.engine), Adapters(section.engine))
        for name in ("w0", "w1")
    ]
    orders = planning.round({"t-0@1": 3, "t-1@1": 1}, [each.heartbeat() for each in workers], 1.0)
    assert orders[0].command.model == "t-0@1"
    assert planning.places("t-0@1")
    assert planning.places("t-1@1")
    assert not planning.places("t-7@1")


def test_a_fleet_that_takes_no_adapters_is_told() -> None:
    with pytest.raises(ValueError, match=r"no worker takes adapters: give one engine\.adapter_slots"):
        fleet(TUNES, engine={"adapter_slots": 0})


def test_no_cache_is_shared_between_adapters() -> None:
    made = list(command.calls(tuned({**TUNES, "groups": 1, "prefix": 256, "rate": 100.0})))
    firsts = {call.model: call.hashes[0] for call in made}
    assert len(set(firsts.values())) == len(firsts) == 8
    assert all(call.hashes[0] == firsts[call.model] for call in made)
    known = {call.model for call in made if not math.isclose(call.shareable, 0)}
    assert known == firsts.keys()
