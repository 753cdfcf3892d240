"""How many workers a base needs: the balance of tokens, and the target that follows it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from broker.messages import Credit
from scheduler import autoscale
from scheduler.autoscale import Balance, Load, Replica, Saturation, Target
from scheduler.config import SchedulerConfig

CONFIG = SchedulerConfig(utilisation=0.8, spare=0.25, dwell=60, max_workers=50)


def of(count: int, used: float = 0.0, queued: int = 0, each: float = 100.0, full: bool = False) -> Load:
    """Workers with room for 1,000 tokens each, `used` of them on every one."""
    return Load(tuple(Replica(1000, used, full) for _ in range(count)), queued, each)


def target(load: Load, previous: Target | None = None, now: float = 0.0) -> Target:
    return autoscale.target(Saturation().balance(load), load, previous, now, CONFIG)


def test_a_credit_says_what_is_held_and_promised() -> None:
    idle = Credit(requests=4, slots_total=4, kv_tokens_free=950, kv_tokens_total=1000)
    busy = Credit(requests=0, slots_total=4, kv_tokens_free=450, kv_tokens_total=1000, running=3, waiting=1)
    load = autoscale.load([idle, busy], present=10, tokens=70.0)
    assert load == Load((Replica(800, 0, False), Replica(800, 500, True)), 6, 70.0)


def test_an_engine_that_tells_nothing_of_its_cache_is_counted_in_requests() -> None:
    known = Credit(requests=4, slots_total=4, kv_tokens_free=950, kv_tokens_total=1000)
    load = autoscale.load([known, Credit(slots_total=8, running=2)], present=12, tokens=70.0)
    assert load == Load((Replica(4, 0, False), Replica(8, 2, True)), 10, 1.0)


def test_what_a_saturated_worker_holds_is_its_supply() -> None:
    saturation = Saturation()
    assert saturation.balance(of(2)).supply == 1000
    for _ in range(50):
        saturation.sample(of(2, used=300, full=True))  # at rest, for all that the queue says
    assert saturation.balance(of(2)).supply == 1000
    for _ in range(50):
        saturation.sample(of(2, used=300, queued=5, full=True))
    assert round(saturation.balance(of(2)).supply) == 300
    assert saturation.balance(of(2, used=300, queued=5)).demand == 1100
    assert saturation.balance(of(2, each=400)).supply == 400  # one request fits, whatever the samples say


def test_a_supply_that_was_low_rises_with_what_workers_hold() -> None:
    saturation = Saturation()
    saturation.sample(of(1, used=100, queued=5, full=True))
    assert saturation.balance(of(1)).supply == 100
    for _ in range(50):
        saturation.sample(of(1, used=600, queued=5))  # it holds more, and still takes requests
    assert round(saturation.balance(of(1)).supply) == 600


def test_a_low_supply_is_forgotten_where_nothing_waits() -> None:
    saturation = Saturation()
    saturation.sample(of(1, used=100, queued=5, full=True))
    supplies = []
    for _ in range(1000):
        saturation.sample(of(1, used=50))
        supplies.append(saturation.balance(of(1)).supply)
    assert 100 < supplies[0] < 120  # not all at once
    assert supplies == sorted(supplies)
    assert round(supplies[-1]) == 1000


def test_a_worker_is_not_full_for_requests_that_wait_for_their_adapters() -> None:
    idle = Credit(requests=0, slots_total=4, kv_tokens_free=700, kv_tokens_total=1000, running=1)
    load = autoscale.load([idle], present=10, tokens=70.0, parked=[3])
    assert load == Load((Replica(800, 250, False),), 6, 70.0)  # what waits in a worker is not queued
    busy = idle.model_copy(update={"running": 4})
    assert autoscale.load([busy], present=10, tokens=70.0, parked=[3]).replicas[0].full
    assert autoscale.load([idle], present=10, tokens=70.0).replicas[0].full


def test_a_spike_is_answered_at_once() -> None:
    calm = target(of(1))
    assert calm.replicas == 1
    spike = target(of(1, used=1000, queued=40), calm, 1.0)
    assert spike.replicas == 7  # 5,000 tokens, 800 a worker
    assert spike.reason == "5000 in use or queued, 1000 a worker, to be filled to 80%"
    assert target(of(1, used=1000, queued=90_000), spike, 2.0).replicas == CONFIG.max_workers


def test_it_shrinks_one_by_one_after_the_dwell_and_with_room_to_spare() -> None:
    four = Target(4, 0.0, "")
    assert target(of(4, used=100), four, 59.0) == four
    three = target(of(4, used=100), four, 60.0)
    assert (three.replicas, three.since) == (3, 60.0)
    assert target(of(3, used=100), three, 119.0) == three
    # 1,900 tokens fit on three at 80 %, but would leave them less than a quarter to spare.
    assert target(of(4, used=475), four, 60.0) == four
    assert target(of(4, used=450), four, 60.0).replicas == 3


def test_without_a_worker_the_queue_asks_for_one() -> None:
    none = SchedulerConfig(min_workers=0)
    empty = autoscale.target(Balance(1, 0), of(0), None, 0.0, none)
    assert empty.replicas == 0
    first = autoscale.target(Balance(1, 0), of(0, queued=3), empty, 1.0, none)
    assert (first.replicas, first.reason) == (1, "3 requests wait, and no worker serves")
    # All of them died: those that were there are wanted again, not one.
    assert autoscale.target(Balance(1, 0), of(0, queued=3), Target(5, 0.0, ""), 99.0, CONFIG).replicas == 5


def test_a_new_leader_begins_with_those_that_serve() -> None:
    assert target(of(3, used=100)).replicas == 3


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1500), st.integers(0, 500)), min_size=1, max_size=30)
)
def test_it_stays_within_its_bounds_and_sinks_by_one(history: list[tuple[int, float, int]]) -> None:
    config = SchedulerConfig(min_workers=2, max_workers=9, dwell=5)
    saturation, was = Saturation(), None
    for now, (count, used, queued) in enumerate(history):
        load = of(count, used, queued, full=queued > 0)
        saturation.sample(load)
        found = autoscale.target(saturation.balance(load), load, was, float(now), config)
        assert config.min_workers <= found.replicas <= config.max_workers
        if was is not None and found.replicas < was.replicas:
            assert found.replicas == was.replicas - 1
            assert now - was.since >= config.dwell
        was = found


@given(st.floats(0, 20_000), st.lists(st.floats(0.95, 1.05), min_size=50, max_size=50))
def test_noise_does_not_make_it_swing(demand: float, noise: list[float]) -> None:
    was, counts = None, []
    for now, factor in enumerate(noise):
        load = of(10, used=demand * factor / 10)
        was = target(load, was, now * CONFIG.dwell)
        counts.append(was.replicas)
    changes = [after - before for before, after in itertools.pairwise(counts) if after != before]
    assert not any(first < 0 < second for first, second in itertools.pairwise(changes))
