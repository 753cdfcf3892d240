"""The policies that the dispatcher is compared with: each chooses as it says."""

from __future__ import annotations

import math

import pytest

from broker.messages import ServiceClass
from ops.simulate.policies import (
    ConsistentHashing,
    Fifo,
    Greedy,
    LeastLoaded,
    Policy,
    Push,
    RoundRobin,
)
from scheduler.dispatch.types import Item, Send, WorkerState

BLOCKS = 64
STEP = 512


def item(key: int, tokens: int = 400, group: int = 0) -> Item:
    hashes = tuple(range(1000 * group, 1000 * group + tokens // 128))
    return Item(key, "t", "sim", ServiceClass.STANDARD, 0.0, prompt_tokens=tokens, hashes=hashes)


def state(worker: str, *, running: int = 0, held: int = 0, sends: int = 0, seen: float = 0.0) -> WorkerState:
    return WorkerState(worker, seen, STEP, 8, running, held, 128 * BLOCKS, 128 * BLOCKS, 16, sends)


def fleet(policy: Policy, *workers: str) -> None:
    for worker in workers:
        policy.state(state(worker), 0.0)


def sent(policy: Policy, *items: Item) -> list[str]:
    """Where they go at once, by order of decision."""
    for each in items:
        policy.arrive(each, 0.0)
    sends = policy.decide(0.0)
    assert all(isinstance(send, Send) for send in sends)
    return [send.worker for send in sends if isinstance(send, Send)]


def test_round_robin_goes_round() -> None:
    policy = RoundRobin()
    fleet(policy, "a", "b", "c")
    assert sent(policy, *map(item, range(5))) == ["a", "b", "c", "a", "b"]


def test_least_loaded_counts_what_it_has_sent() -> None:
    policy = LeastLoaded()
    fleet(policy, "a", "b")
    policy.state(state("a", running=2), 0.0)
    assert sent(policy, *map(item, range(4))) == ["b", "b", "a", "b"]
    policy.state(state("b", running=0, sends=3), 0.0)  # all of them have ended
    assert sent(policy, item(9)) == ["b"]


def test_hashing_sends_a_prefix_to_its_own_worker() -> None:
    policy = ConsistentHashing()
    fleet(policy, *"abcdefgh")
    homes = {}
    for group in range(40):
        policy = ConsistentHashing()
        fleet(policy, *"abcdefgh")
        (homes[group],) = sent(policy, item(group, group=group))
        fewer = ConsistentHashing()
        fleet(fewer, *"abcdefg")
        (other,) = sent(fewer, item(group, group=group))
        assert other == homes[group] or homes[group] == "h"  # who leaves moves nobody else's
    assert len(set(homes.values())) > 4


def test_hashing_leaves_a_worker_that_holds_more_than_its_share() -> None:
    policy = ConsistentHashing()
    fleet(policy, *"abcd")
    went = sent(policy, *map(item, range(40)))
    counts = [went.count(worker) for worker in "abcd"]
    assert max(counts) <= math.ceil(1.25 * 40 / 4)
    assert min(counts) > 0


def test_fifo_gives_the_oldest_request_to_who_has_asked_longest() -> None:
    policy = Fifo(1.0)
    fleet(policy, "b", "a")
    assert sent(policy, *map(item, range(8))) == ["b", "a", "b", "a"]  # until each holds a step's prefill
    policy.state(state("a", running=2, held=0, sends=2), 0.0)
    assert [send.key for send in policy.decide(0.0) if isinstance(send, Send)] == [4, 5]


def test_fifo_asks_for_no_more_than_fits_the_cache() -> None:
    policy = Fifo(1.0)
    for key in range(50):
        policy.finish(key, 0.0, 600, 0, 100)
    full = WorkerState("a", 0.0, STEP, 8, 3, 0, 10_000, 1000, 16, 0)
    policy.state(full, 0.0)
    assert sent(policy, item(1)) == []
    policy.state(WorkerState("a", 0.0, STEP, 8, 1, 0, 10_000, 9000, 16, 0), 0.0)
    assert len(policy.decide(0.0)) == 1


def test_push_goes_where_the_prefix_is_unless_too_much_waits_there() -> None:
    policy = Push()
    fleet(policy, "a", "b")
    assert sent(policy, item(1, 1280, group=1)) == ["a"]
    policy.state(state("a", running=1, sends=1), 0.0)
    assert sent(policy, item(2, 1280, group=1)) == ["a"]  # (0 + 1) * 2 against 1280
    policy.state(state("a", running=1, held=2000, sends=2), 0.0)
    assert sent(policy, item(3, 1280, group=1)) == ["b"]


def test_push_counts_its_own_sends_at_once_and_the_blind_one_does_not() -> None:
    for policy, went in ((Push(), ["a", "b"]), (Push(local=False), ["a", "a"])):
        fleet(policy, "a", "b")
        assert sent(policy, item(1, group=1), item(2, group=2)) == went


def test_push_learns_what_the_cache_really_had() -> None:
    policy = Push(local=False)
    fleet(policy, "a", "b")
    assert sent(policy, item(1, 1280, group=1)) == ["a"]
    policy.state(state("a", running=1), 0.0)
    assert sent(policy, item(2, 1280, group=1)) == ["b"]  # not known to be cached anywhere
    policy.first(1, 0.0, 0)
    assert sent(policy, item(3, 1280, group=1)) == ["a"]
    with pytest.raises(KeyError):
        policy.first(1, 0.0, 0)


def test_greedy_takes_the_best_of_those_with_credit_and_else_waits() -> None:
    policy = Greedy(1.0)
    fleet(policy, "a", "b")
    assert sent(policy, item(1, 1280, group=1)) == ["a"]
    policy.state(state("a", running=1, held=STEP, sends=1), 0.0)
    assert sent(policy, item(2, 1280, group=1)) == ["b"]  # its prefix is at a, which has no credit
    policy.state(state("b", running=1, held=STEP, sends=1), 0.0)
    assert sent(policy, item(3, 1280, group=1)) == []
    policy.state(state("b", running=1, held=0, sends=1), 0.0)
    policy.state(state("a", running=1, held=0, sends=1), 0.0)
    assert len(policy.decide(0.0)) == 1
