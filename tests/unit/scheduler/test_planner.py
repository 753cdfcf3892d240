"""The planner: what it promises whatever the fleet, and what it does in plain cases."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.placement import Placement
from scheduler import planner
from scheduler.config import SchedulerConfig
from scheduler.view import Adapter, Snapshot, Wanted, Worker

CONFIG = SchedulerConfig()
DWELL_MS = int(CONFIG.dwell * 1000)
RANKS = (8, 16, 64)


def fleet(count: int, slots: int = 4, max_rank: int = 64, sequences: int = 10) -> tuple[Worker, ...]:
    return tuple(Worker(f"w{n}", slots, max_rank, sequences) for n in range(count))


def adapters(count: int, rank: int = 8) -> dict[str, Adapter]:
    return {f"a{n}@1": Adapter(f"a{n}@1", rank) for n in range(count)}


def asked(*models: str, concurrency: float = 1.0) -> dict[str, Wanted]:
    return {model: Wanted(concurrency, 1) for model in models}


def plan(
    snapshot: Snapshot,
    demand: Mapping[str, Wanted],
    previous: Placement | None = None,
    now_ms: int = 0,
) -> Placement:
    return planner.plan(snapshot, demand, previous, now_ms, CONFIG)


def settle(
    snapshot: Snapshot, demand: Mapping[str, Wanted], previous: Placement | None = None, rounds: int = 40
) -> Placement:
    """The plan after so many rounds, each past the dwell of the one before."""
    start = max((each.since_ms for each in previous.assignments), default=0) if previous else 0
    for number in range(1, rounds + 1):
        previous = plan(snapshot, demand, previous, start + number * DWELL_MS)
    assert previous is not None
    return previous


def test_what_finds_no_place_costs_no_look_at_every_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    may_go = planner._Plan._may_go

    def counted(self: planner._Plan, *model: str) -> bool:
        nonlocal looks
        looks += 1
        return may_go(self, *model)

    monkeypatch.setattr(planner._Plan, "_may_go", counted)
    seen = Snapshot("b", fleet(50), adapters(1000))
    demand = asked(*seen.adapters)
    packed = plan(seen, demand)
    assert sum(len(each.workers) for each in packed.assignments) == 200
    looks = 0
    assert where(plan(seen, demand, packed, DWELL_MS)) == where(packed)
    assert looks <= 200 + 1000


def where(placed: Placement) -> dict[str, frozenset[str]]:
    return {each.model: frozenset(each.workers) for each in placed.assignments}


def check(snapshot: Snapshot, placed: Placement) -> None:
    """What holds of every plan."""
    workers = {worker.name: worker for worker in snapshot.workers}
    held: Counter[str] = Counter()
    for each in placed.assignments:
        assert each.reason, each
        assert len(set(each.workers)) == len(each.workers)
        for name in each.workers:
            held[name] += 1
            assert snapshot.adapters[each.model].rank <= workers[name].max_rank
            assert name not in snapshot.barred.get(each.model, {})
    assert all(count <= workers[name].slots for name, count in held.items())


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    workers = tuple(
        Worker(f"w{n}", draw(st.integers(0, 3)), draw(st.sampled_from(RANKS)), draw(st.integers(1, 8)))
        for n in range(draw(st.integers(0, 6)))
    )
    known = {}
    for n in range(draw(st.integers(0, 8))):
        model = f"a{n}@1"
        known[model] = Adapter(
            model, draw(st.sampled_from(RANKS)), draw(st.booleans()), draw(st.sampled_from((0, 0, 0, 1, 2)))
        )
    barred: dict[str, dict[str, str]] = {}
    for model in known:
        if draw(st.integers(0, 4)) == 0:
            names = draw(st.sets(st.sampled_from([f"w{n}" for n in range(6)]), max_size=3))
            barred[model] = dict.fromkeys(names, "broken")
    return Snapshot("base", workers, known, barred)


@st.composite
def demands(draw: st.DrawFn) -> dict[str, Wanted]:
    found = {}
    for n in range(8):
        concurrency = draw(st.sampled_from((0.0, 0.0, 0.5, 3.0, 9.0, 40.0)))
        found[f"a{n}@1"] = Wanted(concurrency, draw(st.integers(0, 3)) if concurrency else 0)
    return found


@given(st.lists(st.tuples(snapshots(), demands(), st.integers(0, 100_000)), min_size=1, max_size=6))
@settings(max_examples=60)
def test_no_plan_exceeds_slots_or_ranks_however_the_fleet_changes(
    history: list[tuple[Snapshot, dict[str, Wanted], int]],
) -> None:
    placed, now_ms = None, 0
    for snapshot, demand, passed_ms in history:
        now_ms += passed_ms
        placed = plan(snapshot, demand, placed, now_ms)
        check(snapshot, placed)


@given(snapshots(), demands())
@settings(max_examples=60)
def test_it_comes_to_rest(snapshot: Snapshot, demand: dict[str, Wanted]) -> None:
    """Whatever is asked for: the same fleet and demand make the same plan again, in the end."""
    placed = settle(snapshot, demand)
    check(snapshot, placed)
    last = max((each.since_ms for each in placed.assignments), default=0)
    assert plan(snapshot, demand, placed, last + 1000 * DWELL_MS) == placed


@given(snapshots(), demands())
@settings(max_examples=60)
def test_a_slot_is_free_only_if_nobody_misses_it(snapshot: Snapshot, demand: dict[str, Wanted]) -> None:
    placed = settle(snapshot, demand)
    held = Counter(name for each in placed.assignments for name in each.workers)
    for model, adapter in snapshot.adapters.items():
        barred = snapshot.barred.get(model, {})
        if demand[model].asked and not placed.workers(model) and len(barred) < planner.GIVE_UP:
            for worker in snapshot.workers:
                room = held[worker.name] < worker.slots
                assert not room or worker.max_rank < adapter.rank or worker.name in barred


@given(st.integers(2, 12), st.integers(1, 20), st.data())
@settings(max_examples=60)
def test_a_worker_that_leaves_moves_only_what_it_held(count: int, models: int, data: st.DataObject) -> None:
    workers = fleet(count, slots=20)
    known = adapters(models)
    demand = {model: Wanted(data.draw(st.sampled_from((1.0, 10.0, 25.0)), label=model), 1) for model in known}
    before = settle(Snapshot("base", workers, known), demand)
    left = data.draw(st.sampled_from(workers), label="left")
    rest = Snapshot("base", tuple(w for w in workers if w is not left), known)
    after = plan(rest, demand, before, before.assignments[0].since_ms)
    check(rest, after)
    for model, names in where(before).items():
        if left.name in names:
            assert where(after)[model] >= names - {left.name}
            assert len(where(after)[model]) == min(len(names), count - 1)
        else:
            assert where(after)[model] == names


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=60)
def test_a_worker_that_joins_takes_its_share_from_the_fullest_and_no_more(
    count: int, models: int, slots: int
) -> None:
    known = adapters(models)
    demand = asked(*known)
    old = Snapshot("base", fleet(count, slots), known)
    before = settle(old, demand)
    new = Snapshot("base", fleet(count + 1, slots), known)
    at_once = plan(new, demand, before, 40 * DWELL_MS)
    assert sum(where(at_once)[model] != names for model, names in where(before).items() if names) <= 1
    after = settle(new, demand, before)
    check(new, after)
    held = Counter(name for names in where(before).values() for name in names)
    share = sum(len(names) for names in where(after).values()) / (count + 1)
    moved = [model for model, names in where(before).items() if names and where(after)[model] != names]
    assert len(moved) <= share + 1
    assert all(held[name] > share for model in moved for name in where(before)[model])


@given(st.integers(0, 2**32), st.sampled_from((0.3, 2.0, 6.9, 7.1, 14.0, 20.0, 33.0)))
@settings(max_examples=30)
def test_noise_moves_nothing(seed: int, concurrency: float) -> None:
    """Eight per cent to and fro about any load: what rises with the first peaks stays."""
    dice = random.Random(seed)
    snapshot = Snapshot("base", fleet(8), adapters(6))
    placed, changes = None, []
    for number in range(200):
        demand = {m: Wanted(concurrency * dice.uniform(0.92, 1.08), 1) for m in snapshot.adapters}
        after = plan(snapshot, demand, placed, number * DWELL_MS)
        changes.append(placed is not None and where(after) != where(placed))
        placed = after
    assert not any(changes[100:])


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_noise_among_rivals_for_a_slot_moves_nothing(seed: int) -> None:
    """More adapters than slots, all asked for about as much."""
    dice = random.Random(seed)
    snapshot = Snapshot("base", fleet(2, slots=2), adapters(12))
    first = plan(snapshot, asked(*snapshot.adapters), None, 0)
    placed = first
    for number in range(1, 100):
        demand = {model: Wanted(dice.uniform(0.85, 1.15), 1) for model in snapshot.adapters}
        placed = plan(snapshot, demand, placed, number * DWELL_MS)
    assert where(placed) == where(first)


# Plain cases


def test_what_is_asked_for_first_is_placed_at_once_and_says_why() -> None:
    snapshot = Snapshot("base", fleet(3), adapters(2))
    placed = plan(snapshot, asked("a0@1"))
    (each,) = placed.assignments
    assert (each.model, len(each.workers)) == ("a0@1", 1)
    assert each.reason == "asked for, and loaded nowhere"


def test_what_nobody_asks_for_is_placed_nowhere_but_stays_where_it_is() -> None:
    snapshot = Snapshot("base", fleet(3), adapters(1))
    assert plan(snapshot, {}).assignments == ()
    placed = plan(snapshot, asked("a0@1"))
    assert settle(snapshot, {}, placed) == placed


def test_min_replicas_are_kept_without_any_demand() -> None:
    known = {"a0@1": Adapter("a0@1", 8, False, 2), "a0@2": Adapter("a0@2", 8, True, 2)}
    placed = plan(Snapshot("base", fleet(3), known), {})
    (each,) = placed.assignments
    assert (each.model, len(each.workers)) == ("a0@2", 2)
    assert "min_replicas" in each.reason


def test_a_version_that_was_superseded_leaves_once_nobody_asks_for_it() -> None:
    known = {"a0@1": Adapter("a0@1", 8)}
    placed = plan(Snapshot("base", fleet(2), known), asked("a0@1"))
    newer = {"a0@1": Adapter("a0@1", 8, current=False), "a0@2": Adapter("a0@2", 8)}
    snapshot = Snapshot("base", fleet(2), newer)
    both = plan(snapshot, asked("a0@1", "a0@2"), placed, DWELL_MS)
    assert all(both.workers(model) for model in newer)
    assert set(where(plan(snapshot, asked("a0@2"), both, 3 * DWELL_MS))) == {"a0@2"}


def test_replicas_follow_the_load_one_by_one_and_no_sooner_than_the_dwell() -> None:
    """Ten sequences a worker, filled to seven: 30 at once need five replicas."""
    snapshot = Snapshot("base", fleet(8), adapters(1))
    placed = plan(snapshot, asked("a0@1", concurrency=30), None, 0)
    assert len(placed.workers("a0@1") or ()) == 1
    assert plan(snapshot, asked("a0@1", concurrency=30), placed, DWELL_MS - 1) == placed
    counts = []
    for number in range(1, 7):
        placed = plan(snapshot, asked("a0@1", concurrency=30), placed, number * DWELL_MS)
        counts.append(len(placed.workers("a0@1") or ()))
    assert counts == [2, 3, 4, 5, 5, 5]
    assert placed.assignments[0].reason == "one more: 30.0 requests at once, 7.0 a replica"
    for number in range(7, 14):
        placed = plan(snapshot, asked("a0@1", concurrency=1), placed, number * DWELL_MS)
        counts.append(len(placed.workers("a0@1") or ()))
    assert counts[6:] == [4, 3, 2, 1, 1, 1, 1]


def test_the_replica_that_goes_is_the_one_that_came_last() -> None:
    snapshot = Snapshot("base", fleet(8), adapters(1))
    one = plan(snapshot, asked("a0@1"))
    many = settle(snapshot, asked("a0@1", concurrency=30), one)
    assert where(settle(snapshot, asked("a0@1"), many)) == where(one)


def test_the_smallest_sufficient_rank_is_filled_first() -> None:
    workers = (Worker("big", 8, 64), Worker("small", 2, 8), Worker("middle", 1, 16))
    known = {f"a{n}@1": Adapter(f"a{n}@1", rank) for n, rank in enumerate((8, 8, 8, 16, 64, 128))}
    placed = plan(Snapshot("base", workers, known), asked(*known))
    found = {model: next(iter(names), "") for model, names in where(placed).items()}
    assert Counter(found.values()) == {"small": 2, "middle": 1, "big": 2, "": 1}
    assert found["a4@1"] == "big"
    (tall,) = (each for each in placed.assignments if each.model == "a5@1")
    assert tall.reason == "its rank, 128, is more than any worker takes: 64 at most"


def test_one_that_nobody_asks_for_makes_room() -> None:
    snapshot = Snapshot("base", fleet(1, slots=2), adapters(3))
    both = plan(snapshot, asked("a0@1", "a1@1"))
    after = plan(snapshot, asked("a1@1", "a2@1"), both, 1)
    assert {model for model, names in where(after).items() if names} == {"a1@1", "a2@1"}
    (gone,) = (each for each in after.assignments if each.model == "a0@1")
    assert gone.reason.startswith("its slot on w0 went to a2@1; ")


def test_one_asked_for_much_less_makes_room_after_its_dwell() -> None:
    snapshot = Snapshot("base", fleet(1, slots=1), adapters(2))
    first = plan(snapshot, asked("a0@1"))
    for concurrency in (1.0, 1.4):
        demand = asked("a0@1") | asked("a1@1", concurrency=concurrency)
        assert where(plan(snapshot, demand, first, DWELL_MS))["a0@1"] == {"w0"}
    demand = asked("a0@1") | asked("a1@1", concurrency=1.6)
    assert where(plan(snapshot, demand, first, DWELL_MS - 1))["a0@1"] == {"w0"}
    after = plan(snapshot, demand, first, DWELL_MS)
    assert where(after) == {"a0@1": frozenset(), "a1@1": {"w0"}}


def test_no_room_is_said() -> None:
    snapshot = Snapshot("base", fleet(1, slots=1), adapters(2))
    placed = plan(snapshot, asked("a0@1", "a1@1"))
    (nowhere,) = (each for each in placed.assignments if not each.workers)
    assert nowhere.reason == "every slot is taken by adapters that are asked for as much"
    none = plan(Snapshot("base", fleet(2, slots=0), adapters(1)), asked("a0@1"))
    assert none.assignments[0].reason == "no worker of its base takes adapters"


def test_an_adapter_that_fails_goes_elsewhere_and_is_given_up_after_three() -> None:
    snapshot = Snapshot("base", fleet(5), adapters(1))
    placed = plan(snapshot, asked("a0@1"))
    barred: dict[str, str] = {}
    for _ in range(planner.GIVE_UP):
        (name,) = placed.workers("a0@1") or ()
        assert name not in barred
        barred[name] = "truncated"
        placed = plan(replace(snapshot, barred={"a0@1": dict(barred)}), asked("a0@1"), placed)
        if len(barred) < planner.GIVE_UP:
            assert placed.assignments[0].reason == f"it failed on {name}: truncated"
    assert placed.workers("a0@1") == ()
    assert "; it failed on 3 workers, on w" in placed.assignments[0].reason
    assert len(plan(snapshot, asked("a0@1"), placed).workers("a0@1") or ()) == 1


def test_fewer_slots_drop_what_is_asked_for_least() -> None:
    snapshot = Snapshot("base", fleet(1, slots=3), adapters(3))
    demand = {f"a{n}@1": Wanted(n + 1.0, 1) for n in range(3)}
    placed = plan(snapshot, demand)
    fewer = plan(replace(snapshot, workers=fleet(1, slots=2)), demand, placed, 1)
    assert where(fewer) == {"a0@1": frozenset(), "a1@1": {"w0"}, "a2@1": {"w0"}}


def test_two_schedulers_find_the_same() -> None:
    snapshot = Snapshot("base", fleet(20), adapters(30))
    reverse = Snapshot("base", fleet(20)[::-1], dict(reversed(adapters(30).items())))
    demand = asked(*snapshot.adapters)
    assert where(plan(snapshot, demand)) == where(plan(reverse, demand))


def test_no_worker_holds_much_more_than_its_share() -> None:
    snapshot = Snapshot("base", fleet(20, slots=16), adapters(100))
    placed = plan(snapshot, asked(*snapshot.adapters))
    held = Counter(name for each in placed.assignments for name in each.workers)
    assert max(held.values()) <= 7  # 1.25 times five, rounded up


@pytest.mark.parametrize(
    ("concurrency", "needed"), [(0.0, 1), (7.0, 1), (7.01, 2), (14.0, 2), (21.0, 3), (70.0, 10)]
)
def test_replicas_by_littles_law(concurrency: float, needed: int) -> None:
    assert planner.replicas_needed(concurrency, 10, 0.7) == needed
