"""Who goes where, when, and who is refused."""

from __future__ import annotations

import itertools
import pickle

import pytest

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig, Pool
from scheduler.dispatch.types import Preempt, Send, Shed
from tests.unit.scheduler.dispatch.world import BASE, STEP, World, item, sent, where

INTERACTIVE, STANDARD, BATCH = ServiceClass
PREFIX = tuple(range(8))
LONG = len(PREFIX) * 128 + 100


def warm(world: World, name: str, hashes: tuple[int, ...] = PREFIX, key: int = 1000) -> None:
    """`name` has computed a prompt that begins so; all others were full meanwhile."""
    for other in world.running:
        if other != name:
            world.tell(other, prefill_held=10 * STEP)
    assert where(world.arrive(item(key, prompt=LONG, hashes=hashes))) == {key: name}
    world.compute(name)
    world.finish(name, key)
    world.tell_all()


def fill(world: World, name: str, held: int = STEP) -> None:
    world.tell(name, prefill_held=held, running=1)


def compute_all(world: World, times: int, **state: object) -> None:
    """So many times w0 has computed its prompts, and tells how it is."""
    for _ in range(times):
        world.uncomputed["w0"].clear()
        world.tell("w0", **state)


# Where


def test_a_request_goes_where_its_prefix_is() -> None:
    world = World(workers=3)
    warm(world, "w2")
    decisions = world.arrive(item(1, prompt=LONG, hashes=PREFIX))
    assert where(decisions) == {1: "w2"}
    assert isinstance(decisions[0], Send)
    assert decisions[0].hit_tokens == len(PREFIX) * 128


def test_what_was_sent_counts_before_the_worker_says_so() -> None:
    world = World(workers=3)
    names = [where(world.arrive(item(key, prompt=300)))[key] for key in range(3)]
    assert sorted(names) == ["w0", "w1", "w2"]


def test_a_prefix_is_known_as_soon_as_it_was_sent() -> None:
    world = World(workers=3)
    name = where(world.arrive(item(0, prompt=LONG, hashes=PREFIX)))[0]
    world.compute(name)
    assert where(world.arrive(item(1, prompt=LONG, hashes=PREFIX))) == {1: name}


def test_a_request_waits_for_its_prefix_rather_than_be_computed_anew() -> None:
    world = World(workers=2)
    warm(world, "w1")
    fill(world, "w1")
    world.tell("w0", running=1)
    assert world.arrive(item(1, prompt=LONG, hashes=PREFIX)) == []
    assert world.tell("w0", running=1) == []
    assert where(world.compute("w1")) == {1: "w1"}


def test_it_leaves_its_prefix_when_the_wait_costs_more() -> None:
    world = World(workers=2)
    warm(world, "w1")
    fill(world, "w1", held=20 * STEP)
    assert where(world.arrive(item(1, prompt=LONG, hashes=PREFIX))) == {1: "w0"}


def test_a_free_worker_takes_what_waits_longest_behind_others() -> None:
    world = World(workers=2)
    warm(world, "w1")
    fill(world, "w1")
    fill(world, "w0", held=20 * STEP)
    world.arrive(*(item(key, arrived=key / 100, prompt=LONG + 200, hashes=PREFIX) for key in range(1, 12)))
    taken = sent(world.tell("w0", running=1))
    assert len(taken) == 1
    assert 1 < taken[0] < 11


def test_nothing_is_sent_on_old_news() -> None:
    world = World(workers=1)
    world.wait(world.config.stale_after + 0.01)
    assert world.arrive(item(1)) == []
    assert sent(world.tell("w0")) == [1]


def test_a_worker_that_gives_back_is_not_believed_again_before_it_says_anew() -> None:
    world = World(workers=2)
    name = where(world.arrive(item(1)))[1]
    other = {"w0": "w1", "w1": "w0"}[name]
    back = world.give_back(name, 1)
    assert where(world.arrive(back)) == {1: other}


def test_a_worker_that_drains_is_given_nothing() -> None:
    world = World(workers=1)
    world.tell("w0", serving=False)
    assert world.arrive(item(1)) == []
    assert sent(world.tell("w0")) == [1]


def test_who_waited_for_a_lost_worker_goes_to_another() -> None:
    world = World(workers=2)
    fill(world, "w0", held=3 * STEP)
    fill(world, "w1", held=5 * STEP)
    world.arrive(item(1), item(2))
    world.lose("w0")
    world.decide()
    assert sorted(sent(world.compute("w1"))) == [1, 2]


def test_a_request_waits_for_the_first_worker() -> None:
    world = World()
    assert world.arrive(item(1)) == []
    assert world.dispatcher.explain(1, world.now) is not None
    world.join("w0")
    assert sent(world.log) == [1]


def test_who_waited_for_the_first_worker_goes_before_who_comes_with_it() -> None:
    world = World(slots=1)
    world.arrive(item(1))
    world.start("w0")
    world.say("w0")
    assert sent(world.arrive(item(2, arrived=1.0))) == [1]


def test_of_those_that_come_together_the_most_urgent_goes_first() -> None:
    world = World(workers=1, slots=1)
    assert sent(world.arrive(item(1, service_class=BATCH), item(2), item(3, service_class=STANDARD))) == [2]


def test_who_comes_and_goes_at_once_was_never_there() -> None:
    world = World(workers=1, slots=1)
    world.come(item(1))
    assert world.cancel(1)
    assert sent(world.arrive(item(2))) == [2]


def test_who_comes_as_a_worker_is_lost_goes_to_another() -> None:
    world = World(workers=2, slots=1)
    world.come(item(1))
    world.lose("w0")
    assert where(world.decide()) == {1: "w1"}


def test_a_newcomer_does_not_pass_who_waits_in_the_lane() -> None:
    world = World(workers=1, slots=1)
    world.arrive(item(1))
    world.arrive(item(2))
    world.come(item(3))
    assert sent(world.finish("w0", 1)) == [2]


def test_who_waited_for_a_worker_that_drains_goes_to_another() -> None:
    world = World(workers=2)
    fill(world, "w1", held=20 * STEP)
    fill(world, "w0")
    world.arrive(item(1))
    world.tell("w0", running=1, serving=False)
    assert where(world.compute("w1")) == {1: "w1"}


def test_a_free_worker_takes_from_one_without_kv_room_whatever_is_cached_there() -> None:
    world = World(workers=2)
    warm(world, "w1")
    world.lose("w0")
    full = {"kv_total": 10_000, "kv_free": 100, "running": 3}
    world.tell("w1", **full)
    assert world.arrive(item(1, prompt=LONG, hashes=PREFIX)) == []
    world.join("w2")
    assert where(world.log) == {1000: "w1", 1: "w2"}


def test_a_free_worker_looks_beyond_the_longest_lane() -> None:
    pools = {INTERACTIVE: Pool(most_step_tokens=STEP), BATCH: Pool(least_step_tokens=2 * STEP)}
    world = World(DispatchConfig(pools=pools), workers=1)
    world.join("big", step_tokens=8 * STEP)
    world.tell("big", step_tokens=8 * STEP, prefill_held=8 * STEP, running=1)
    fill(world, "w0")
    world.arrive(*(item(key, service_class=BATCH, prompt=5000) for key in range(10)))
    world.arrive(*(item(key, prompt=1000) for key in range(10, 15)))
    world.join("w1")
    assert where(world.log) == {10: "w1"}


def test_a_worker_whose_own_lane_can_not_go_now_takes_from_another() -> None:
    world = World(workers=1)
    someone_urgent(world)
    fill(world, "w0")
    assert world.arrive(item(2, service_class=BATCH)) == []
    world.join("w1", prefill_held=STEP, running=1)
    fill(world, "w0", held=5 * STEP)
    assert world.arrive(item(3, prompt=1000)) == []
    world.now += 0.3  # w1 tells nothing more, and w0 takes batch up to half a step
    assert where(world.tell("w0", prefill_held=300, running=1)) == {3: "w0"}


# Adapters


def test_an_adapter_is_not_sent_to_a_worker_that_can_run_it_no_more() -> None:
    world = World(workers=1)
    world.tell("w0", adapters=frozenset({"a"}), prefill_held=STEP)
    assert world.arrive(item(1, model="a")) == []
    assert world.tell("w0", adapters=frozenset({"b"})) == []
    assert sent(world.tell("w0", adapters=frozenset({"a"}))) == [1]


def test_an_adapter_goes_where_it_is_loaded() -> None:
    world = World(workers=2)
    world.tell("w1", adapters=frozenset({"a"}), adapter_room=True)
    world.tell("w0", adapter_room=True)
    assert where(world.arrive(item(1, model="a"))) == {1: "w1"}


def test_an_adapter_is_loaded_where_there_is_room_and_nowhere_else() -> None:
    world = World(workers=2)
    assert world.arrive(item(1, model="a")) == []
    assert where(world.tell("w1", adapter_room=True)) == {1: "w1"}
    assert where(world.arrive(item(2, model="a"))) == {2: "w1"}
    assert world.arrive(item(3, model="b")) == []  # whether one more can run has not been said since


# Classes


def test_classes_share_a_worker_by_their_quanta() -> None:
    world = World(
        DispatchConfig(quanta={INTERACTIVE: 600, STANDARD: 300, BATCH: 100}), workers=1, slots=10**6
    )
    fill(world, "w0")
    kinds = {key: list(ServiceClass)[key % 3] for key in range(600)}
    world.arrive(*(item(key, service_class=kind) for key, kind in kinds.items()))
    order: list[int] = []
    while len(order) < 100:
        order += sent(world.compute("w0"))
    counts = [sum(kinds[key] is each for key in order[:100]) for each in ServiceClass]
    assert counts == pytest.approx([60, 30, 10], abs=6)


def test_what_was_sent_while_nobody_waited_is_held_against_no_class() -> None:
    world = World(workers=1)
    for key in range(300):
        world.arrive(item(key, prompt=500))
        world.compute("w0")
        world.finish("w0", key)
    fill(world, "w0")
    world.arrive(item(1000, service_class=STANDARD, prompt=600), item(1001, prompt=600))
    assert sent(world.compute("w0")) == [1001]


def test_a_class_stays_in_its_pool_while_there_is_one() -> None:
    world = World(DispatchConfig(pools={INTERACTIVE: Pool(most_step_tokens=STEP)}), workers=1)
    world.join("big", step_tokens=8 * STEP)
    fill(world, "w0", held=20 * STEP)
    assert world.arrive(item(1)) == []
    assert where(world.arrive(item(2, service_class=BATCH))) == {2: "big"}
    world.lose("w0")
    assert where(world.decide()) == {1: "big"}


def test_batch_is_taken_back_for_an_interactive_request_that_would_wait_too_long() -> None:
    world = World(workers=1, slots=2)
    world.arrive(item(1, service_class=BATCH), item(2, service_class=BATCH, arrived=0.1))
    world.arrive(item(3, arrived=0.0))
    assert [each for each in world.log if isinstance(each, Preempt)] == []
    for _ in range(5):
        world.wait(0.15)
        world.tell("w0")
    taken = [each for each in world.log if isinstance(each, Preempt)]
    assert [each.key for each in taken] == [2]  # the last one sent, and only one at a time
    back = world.give_back("w0", 2)
    assert sent(world.tell("w0")) == [3]
    assert world.arrive(back) == []


def test_batch_is_taken_back_where_the_slots_are_taken_that_the_urgent_may_fill() -> None:
    world = World(DispatchConfig(slots=dict.fromkeys(ServiceClass, 0.5)), workers=1, slots=4)
    world.arrive(item(1, service_class=BATCH), item(2, service_class=BATCH, arrived=0.1))
    assert world.arrive(item(3)) == []
    for _ in range(5):
        world.wait(0.15)
        world.tell("w0")
    assert [each.key for each in world.log if isinstance(each, Preempt)] == [2]


def test_a_long_batch_prompt_is_taken_back_for_an_interactive_request_that_waits_for_its_steps() -> None:
    world = World(workers=1)
    world.arrive(item(1, service_class=BATCH, prompt=100 * STEP))
    assert sent(world.tell("w0")) == []
    assert world.arrive(item(2)) == []
    for _ in range(5):
        world.wait(0.15)
        world.tell("w0")
    assert [each.key for each in world.log if isinstance(each, Preempt)] == [1]
    world.give_back("w0", 1)
    assert sent(world.tell("w0")) == [2]


def test_a_batch_prompt_that_takes_few_more_steps_is_left() -> None:
    world = World(workers=1)
    world.arrive(item(1, service_class=BATCH, prompt=4 * STEP))
    world.arrive(item(2))
    for _ in range(5):
        world.wait(0.15)
        world.tell("w0")
    assert [each for each in world.log if isinstance(each, Preempt)] == []


def someone_urgent(world: World, key: int = 900) -> None:
    """Came and went."""
    world.arrive(item(key, service_class=INTERACTIVE))
    world.compute("w0")
    world.finish("w0", key)


def test_batch_leaves_slots_to_the_others_where_there_are_such() -> None:
    world = World(workers=1, slots=10)
    someone_urgent(world)
    world.arrive(*(item(key, service_class=BATCH) for key in range(20)))
    for _ in range(20):
        world.compute("w0")
    assert len(world.running["w0"]) == 9
    assert sent(world.arrive(item(100))) == [100]
    world.finish("w0", 100)
    world.now += world.config.memory + 1  # nobody else comes
    world.compute("w0")
    assert len(world.running["w0"]) == 10


def test_no_class_takes_more_than_its_share_of_the_kv_room_where_others_come() -> None:
    world = World(workers=1, slots=64)
    kv = {"kv_total": 10_000, "kv_free": 10_000}
    someone_urgent(world)
    world.tell("w0", **kv)
    batch = [item(key, service_class=BATCH, prompt=1000, max_tokens=100) for key in range(20)]
    world.arrive(*batch)
    compute_all(world, 20, **kv)
    held = len(world.running["w0"])
    assert 1 <= held <= 0.4 * 10_000 / 1000
    world.arrive(item(100, prompt=1000, max_tokens=100))
    assert 100 in world.running["w0"]


def test_one_class_alone_fills_the_kv_room() -> None:
    world = World(workers=1, slots=64)
    kv = {"kv_total": 10_000, "kv_free": 10_000}
    world.tell("w0", **kv)
    world.arrive(*(item(key, service_class=BATCH, prompt=1000, max_tokens=100) for key in range(20)))
    compute_all(world, 20, **kv)
    assert 0.8 <= len(world.running["w0"]) * 1000 / 10_000 <= 0.95


def test_room_that_is_given_out_in_large_blocks_is_room_for_fewer() -> None:
    held = {}
    for size in (1, 128):
        world = World(workers=1, slots=64, kv=8192)  # which tells of other blocks first
        kv = {"kv_total": 8192, "kv_free": 8192, "block_size": size}
        world.tell("w0", **kv)
        world.arrive(*(item(key, prompt=130) for key in range(64)))
        compute_all(world, 64, **kv)
        held[size] = len(world.running["w0"])
    assert held[128] <= 0.75 * held[1]


def test_kv_room_that_falls_free_is_kept_for_the_most_urgent_that_needs_it() -> None:
    world = World(workers=1, slots=64, kv=10_000)
    someone_urgent(world)
    world.arrive(*(item(key, service_class=STANDARD, prompt=1000) for key in range(20)))
    for _ in range(10):
        world.compute("w0")
    world.arrive(item(100, prompt=5000))
    before = set(world.running["w0"])
    while 100 not in world.running["w0"]:
        world.finish("w0", min(world.running["w0"]))
        before |= world.running["w0"].keys()
    passed = len(before - {100}) - 9  # what it found there
    assert passed <= 5  # they end sooner, as far as is known, and have as many tokens


def test_kv_room_is_kept_from_the_less_urgent_in_the_same_visit() -> None:
    world = World(workers=1, slots=64, kv=10_000)
    for key in range(1000, 1020):
        world.arrive(item(key, "long", max_tokens=1000))
        world.compute("w0")
        world.finish("w0", key, 200)
    for key in range(4):
        world.arrive(item(key, "long", prompt=2000, max_tokens=1000))
        compute_all(world, 1)
    world.arrive(
        item(100, "long", prompt=4000, max_tokens=1000),
        item(101, "long", STANDARD, prompt=100, max_tokens=1000),
    )
    compute_all(world, 1)
    assert set(world.running["w0"]) == {0, 1, 2, 3}


def test_who_waits_for_kv_room_is_passed_only_by_those_that_end_before_it_has_that() -> None:
    world = World(workers=1, slots=64, kv=10_000)
    kinds = {"long": 200, "short": 10}
    for tenant, tokens in kinds.items():
        for key in range(20):  # so long are theirs
            world.arrive(item(1000 * tokens + key, tenant, max_tokens=1000))
            world.compute("w0")
            world.finish("w0", 1000 * tokens + key, tokens)
    world.arrive(*(item(key, "long", prompt=2000, max_tokens=1000) for key in range(4)))
    for _ in range(4):
        world.compute("w0")
    assert len(world.running["w0"]) == 4
    world.arrive(item(100, "long", prompt=4000, max_tokens=1000))
    world.arrive(
        item(101, "long", prompt=100, max_tokens=1000), item(102, "short", prompt=100, max_tokens=1000)
    )
    world.compute("w0")
    assert set(world.running["w0"]) == {0, 1, 2, 3, 102}


def test_the_next_worker_is_not_taken_to_lack_the_room_that_the_last_one_lacked() -> None:
    world = World(workers=1, kv=10_000)
    world.arrive(item(1, prompt=7000), item(2, prompt=7000))
    world.compute("w0")
    assert list(world.running["w0"]) == [1]
    world.lose("w0")
    world.join("w1")
    world.decide()
    assert list(world.running["w1"]) == [2]


def test_a_class_that_has_its_share_of_the_kv_room_leaves_the_rest_to_the_others() -> None:
    world = World(workers=1, slots=64, kv=10_000)
    someone_urgent(world)
    kinds = [STANDARD] * 20 + [BATCH] * 5
    world.arrive(*(item(key, service_class=kind, prompt=1000) for key, kind in enumerate(kinds)))
    for _ in range(20):
        world.compute("w0")
    held = [each.service_class for each in world.running["w0"].values()]
    assert held.count(STANDARD) == 6
    assert held.count(BATCH) == 3


def test_a_worker_whose_room_becomes_known_remembers_no_more_prefixes_than_fit() -> None:
    world = World(workers=1)
    for key in range(3):
        warm(world, "w0", tuple(range(100 * key, 100 * key + 8)), key=1000 + key)
    world.tell("w0", kv_total=16 * 128, kv_free=16 * 128)
    (decision,) = world.arrive(item(1, prompt=LONG, hashes=tuple(range(8))))  # the oldest
    assert isinstance(decision, Send)
    assert decision.hit_tokens == 0


def test_a_cache_is_as_large_as_it_says_though_tokens_are_longer_than_thought() -> None:
    """Prompts are known by their bytes, and what is cached is counted in tokens: here half as many."""
    world, prefixes = World(workers=1, kv=64 * 128), [tuple(range(n, n + 8)) for n in (0, 100, 200)]
    for key in range(30):
        world.wait(0.05)
        world.arrive(item(key, prompt=8 * 128, hashes=prefixes[min(key, 2)]))
        cached = 4 * 128 if key > 2 else 0
        world.dispatcher.first(key, world.now, cached)
        world.compute("w0")
        world.running["w0"].pop(key)
        world.dispatcher.finish(key, world.now, 4 * 128, cached, 4)
        world.tell("w0")
    (decision,) = world.arrive(item(100, prompt=8 * 128, hashes=prefixes[0]))
    assert isinstance(decision, Send)
    assert decision.hit_tokens == 8 * 128 - 1  # the last one is computed anyway


def test_times_are_those_of_the_steps_that_a_worker_has_now() -> None:
    world = World(workers=1)
    world.tell("w0", step_tokens=8 * STEP)
    (decision,) = world.arrive(item(1, prompt=4 * STEP))
    assert isinstance(decision, Send)
    # Half a step is computed, after half of another and beside its own.
    assert decision.predicted_ttft_s == pytest.approx(2 * world.config.step)


def test_a_worker_without_a_step_is_given_nothing() -> None:
    world = World()
    world.join("w0", step_tokens=0)
    assert world.arrive(item(1)) == []


# Deadlines


def test_what_can_not_be_in_time_is_refused_at_once_and_told_how_long_it_would_take() -> None:
    world = World(workers=1)
    fill(world, "w0", held=STEP)
    world.arrive(*(item(key, prompt=2000) for key in range(20)))
    (refused,) = world.arrive(item(100, deadline=0.2))
    assert isinstance(refused, Shed)
    step = world.config.step
    assert refused.retry_after_s == pytest.approx(20 * 2000 / STEP * step, rel=0.25)


def test_a_deadline_in_reach_goes_first() -> None:
    world = World(workers=1)
    fill(world, "w0", held=STEP)
    world.arrive(*(item(key) for key in range(5)), item(9, arrived=0.1, deadline=0.25))
    world.wait(0.15)
    assert sent(world.compute("w0"))[0] == 9


def test_what_has_become_too_late_is_refused() -> None:
    world = World(workers=1)
    fill(world, "w0", held=STEP)
    world.arrive(item(1, deadline=1.0))
    decisions = world.wait(1.0)
    assert [type(each) for each in decisions] == [Shed]
    assert world.now <= 1.0


def test_what_has_waited_in_vain_is_told_what_a_new_one_would_be() -> None:
    world = World(workers=1)
    fill(world, "w0")
    world.arrive(item(1, service_class=STANDARD, deadline=1.0))
    world.arrive(*(item(key, prompt=1000) for key in range(100, 200)))
    (late,) = world.wait(1.0)
    (new,) = world.arrive(item(2, service_class=STANDARD, arrived=world.now, deadline=world.now))
    assert isinstance(late, Shed)
    assert isinstance(new, Shed)
    assert late.retry_after_s == pytest.approx(new.retry_after_s)


def test_an_answer_that_has_begun_is_never_too_late() -> None:
    world = World(workers=1)
    world.now = 10.0
    assert world.arrive(item(1, deadline=5.0, done=3)) == []
    assert world.wait(1.0) == []
    assert sent(world.tell("w0")) == [1]


def test_many_of_one_deadline_are_refused_in_many_calls() -> None:
    world = World(workers=1)
    fill(world, "w0")
    world.arrive(*(item(key, deadline=1.0) for key in range(100)))
    world.now = 1.0
    assert 0 < len(world.decide()) < 20
    assert world.dispatcher.next_due(world.now) == world.now
    world.wait(0.001)
    assert not world.waiting


def test_a_worker_with_room_refuses_who_is_too_late_in_many_calls() -> None:
    world = World(workers=1)
    fill(world, "w0")
    world.arrive(*(item(key, deadline=1.0) for key in range(100)))
    world.now = 1.0
    assert 0 < len(world.compute("w0")) < 30
    world.wait(0.001)
    assert not world.waiting


def test_sheddable_classes_give_way_as_the_fleet_fills_up() -> None:
    world = World(DispatchConfig(sheddable=(BATCH,)), workers=1)
    fill(world, "w0", held=STEP)
    assert not world.arrive(*(item(key) for key in range(10)))
    assert world.dispatcher.saturation() >= 1
    refused = world.arrive(item(100, service_class=BATCH))
    assert [type(each) for each in refused] == [Shed]
    assert world.arrive(item(101, service_class=BATCH, done=1)) == []  # its client has a part of it


def test_kv_room_in_use_alone_makes_nobody_give_way() -> None:
    world = World(DispatchConfig(sheddable=(BATCH,)), workers=1, slots=100)
    world.tell("w0", kv_total=10_000, kv_free=1500)
    assert world.dispatcher.saturation() == 0
    fill(world, "w0")
    world.arrive(item(1))
    world.tell("w0", kv_total=10_000, kv_free=1500, prefill_held=STEP)
    assert world.dispatcher.saturation() > 1


# Tenants


def test_a_tenant_that_floods_waits_behind_the_others() -> None:
    world = World(workers=1, slots=10**6)
    order: list[int] = []
    fill(world, "w0")
    world.arrive(*(item(key, "flood") for key in range(1000)))
    for key in range(1000, 1050):
        world.now += 0.03
        order += sent(world.arrive(item(key, "other", arrived=world.now)))
        order += sent(world.compute("w0"))
        assert key in order[-10:]


def test_a_tenant_above_its_share_leaves_room_on_every_worker() -> None:
    world = World(workers=1, slots=10**6)
    world.arrive(*(item(key, "flood", prompt=500) for key in range(100)), item(500, "other"))
    for _ in range(40):
        world.compute("w0")
    assert world.uncomputed["w0"]  # of the flood; and there is room
    assert sum(world.uncomputed["w0"].values()) >= world.config.theta_over * STEP
    world.uncomputed["w0"] = {0: 300}
    assert sent(world.tell("w0")) == []
    assert sent(world.arrive(item(501, "other"))) == [501]


def test_a_tenant_above_its_share_holds_up_nobody_within_it() -> None:
    world = World(workers=1, slots=10**6)
    world.arrive(item(1, "other", prompt=300))
    world.compute("w0")
    world.finish("w0", 1)
    fill(world, "w0")
    world.arrive(*(item(key, "flood", prompt=500) for key in range(100, 200)), item(2, "other"))
    assert sent(world.tell("w0", prefill_held=200, running=1))[0] == 2


# Questions


def test_a_first_token_counts_once_even_at_time_zero() -> None:
    world = World(workers=1)
    world.arrive(item(1))
    world.dispatcher.first(1, 0.0, None)
    error = world.dispatcher.error_p90()
    world.dispatcher.first(1, 5.0, None)
    assert world.dispatcher.error_p90() == error


def test_it_explains_what_it_did() -> None:
    world = World(workers=5)
    warm(world, "w2")
    world.now = 0.1
    world.arrive(item(7, "someone", prompt=LONG, hashes=PREFIX))
    told = world.dispatcher.explain(7, world.now)
    assert told is not None
    assert (told.outcome, told.worker, told.tenant, told.model) == ("sent", "w2", "someone", BASE)
    assert told.queue_s == pytest.approx(0.1)
    assert told.candidates[0].worker == "w2"
    assert told.candidates[0].uncached == 100
    assert told.candidates[0].score < told.candidates[1].score
    assert world.dispatcher.explain(99, world.now) is None


def test_explanations_are_bounded() -> None:
    world = World(DispatchConfig(explained=3), workers=1, slots=100)
    world.arrive(*(item(key) for key in range(5)))
    world.compute("w0")
    assert [key for key in range(5) if world.dispatcher.explain(key, 0.0)] == [2, 3, 4]


def test_it_says_of_one_that_waits_what_it_waits_for() -> None:
    world = World(workers=1)
    fill(world, "w0")
    world.arrive(item(1))
    told = world.dispatcher.explain(1, 2.0)
    assert told is not None
    assert (told.outcome, told.worker, told.queue_s) == ("queued", "w0", 2.0)


def test_a_request_that_comes_again_is_there_once() -> None:
    world = World(workers=1)
    fill(world, "w0")
    world.dispatcher.arrive(item(1), 0.0)
    world.dispatcher.arrive(item(1, prompt=200), 0.0)
    assert world.dispatcher.queued() == 1


def test_a_deep_queue_without_a_worker_is_placed_in_many_calls() -> None:
    world = World()
    world.arrive(*(item(key) for key in range(100)))
    world.join("w0")
    assert world.dispatcher.next_due(world.now) == world.now
    world.wait(0.01)
    while world.waiting:
        world.now += 0.01
        name = "w0"
        world.compute(name)
        for key in list(world.running[name]):
            world.finish(name, key)
    assert sorted(sent(world.log)) == list(range(100))


def test_what_has_left_is_not_kept() -> None:
    """Pickled, it is no larger after many have come and gone than it was before."""
    world = World(workers=1, slots=10**6)
    fill(world, "w0")
    world.arrive(item(0, "patient", deadline=1e9))

    def pass_by(count: int) -> int:
        for _ in range(count):
            key = len(world.log) + next(keys)
            world.dispatcher.arrive(item(key, "hasty", model=f"m{key}", deadline=1e8), 0.0)
            world.dispatcher.cancel(key)
            world.dispatcher.arrive(item(key, "hasty", deadline=1e8), 0.0)
            world.dispatcher.cancel(key)
        return len(pickle.dumps(world.dispatcher))

    keys = itertools.count(1)
    pass_by(300)
    most = max(pass_by(1) for _ in range(150))
    assert max(pass_by(20) for _ in range(100)) <= 1.01 * most


def test_pools_tell_how_long_their_steps_are() -> None:
    config = DispatchConfig(
        pools={INTERACTIVE: Pool(most_step_tokens=512), BATCH: Pool(least_step_tokens=2048)}
    )
    world = World(config)
    assert world.dispatcher.pools() == []
    for name, tokens in (("w0", 512), ("w1", 512), ("w2", 2048)):
        world.join(name, tokens)
    small, every, large = world.dispatcher.pools()
    assert (small.classes, small.workers, small.step_tokens) == ((INTERACTIVE,), 2, 512)
    assert (every.classes, every.workers, every.step_tokens) == ((STANDARD,), 3, 2048)
    assert (large.classes, large.workers, large.step_tokens) == ((BATCH,), 1, 2048)
    assert small.step_s == large.step_s == pytest.approx(config.step)
    for key in range(200):
        world.arrive(item(key, prompt=512))
        world.now += 0.2
        world.tell_all()
        for name in world.running:
            world.compute(name)
            for held in list(world.running[name]):
                world.finish(name, held)
    small, every, _ = world.dispatcher.pools()
    assert small.step_s > 2 * config.step
    assert every.step_s == small.step_s


def test_an_explanation_names_who_had_it_and_the_step_of_its_class() -> None:
    world = World(DispatchConfig(budget={INTERACTIVE: 0.2}), workers=1, slots=1)
    world.arrive(item(1, service_class=BATCH))
    world.compute("w0")
    world.arrive(item(2, arrived=world.now))
    world.now += 0.15
    world.tell("w0")
    (preempt,) = (each for each in world.log if isinstance(each, Preempt))
    told = world.dispatcher.explain(1, world.now)
    assert told is not None
    assert told.taken_back == (("w0", preempt.why),)
    assert told.step_tokens == STEP
    assert told.step_s > 0
    world.dispatcher.stays(1)
    told = world.dispatcher.explain(1, world.now)
    assert told is not None
    assert told.taken_back == ()
