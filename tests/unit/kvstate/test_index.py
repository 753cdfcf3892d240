from __future__ import annotations

import math
import random
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstate.cache import LEAST, SLACK, SPARE
from kvstate.errors import IntegrityError
from kvstate.index import PrefixIndex

TTL = 5.0
MOST = 40
WORKERS = ["a", "b", "c"]
PATHS = ["000000000", "000111111", "000111222", "011111111", "222222222"]


def chain_of(path: str) -> tuple[int, ...]:
    """A hash for each beginning of `path`."""
    return tuple(int("1" + path[:end], 3) for end in range(1, len(path) + 1))


workers = st.sampled_from(WORKERS)
chains = st.builds(lambda path, length: chain_of(path[:length]), st.sampled_from(PATHS), st.integers(0, 9))
capacities = st.sampled_from([0, 5, 10, 10, 15, 30])


@dataclass
class Entry:
    block: int
    since: float
    expires: float | None = None


@dataclass
class NaiveCache:
    """What the index should think of one worker, as a list: used longest ago first."""

    capacity: int
    entries: list[Entry] = field(default_factory=list)
    told: int = 0
    share: float = 1.0

    @property
    def room(self) -> int:
        return SPARE * self.capacity if self.told else round(self.capacity * self.share)

    def learn(self, hashes: tuple[int, ...], cached: int, sent: float) -> None:
        found = [self.find(block) for block in hashes]
        certain = [entry is not None and entry.expires is None for entry in found]
        counted_on = [
            sure and entry is not None and entry.since < sent
            for sure, entry in zip(certain, found, strict=True)
        ]
        first = cached + 1 + cached // SLACK
        missing = next((n for n, each in enumerate(counted_on[first:]) if not each), len(counted_on[first:]))
        self.share += (certain[:cached].count(False) - missing) / max(1, self.capacity)
        self.share = min(1.0, max(LEAST, self.share))

    def find(self, block: int) -> Entry | None:
        return next((entry for entry in self.entries if entry.block == block), None)

    def touch(self, block: int, now: float, expires: float | None) -> None:
        entry = self.find(block) or Entry(block, now, expires)
        if entry in self.entries:
            self.entries.remove(entry)
        self.entries.append(entry)
        if expires is None:
            entry.since, entry.expires = now, None
        elif entry.expires is not None:
            entry.expires = expires

    def depth(self, hashes: tuple[int, ...]) -> int:
        held = [self.find(block) is not None for block in hashes]
        return held.index(False) if False in held else len(held)


class Fleet(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(TTL, MOST)
        self.naive: dict[str, NaiveCache] = {}
        self.now = 0.0
        self.leftover = 0
        for worker in WORKERS[1:]:
            self.join(worker, 12)

    def trim(self) -> None:
        for cache in self.naive.values():
            room = min(cache.room, MOST // len(self.naive))
            del cache.entries[: max(0, len(cache.entries) - room)]

    def expire(self) -> None:
        for cache in self.naive.values():
            cache.entries = [e for e in cache.entries if e.expires is None or e.expires > self.now]

    @rule(worker=workers, capacity=capacities)
    def join(self, worker: str, capacity: int) -> None:
        slot = self.index.join(worker, capacity)
        self.naive.pop(worker, None)
        self.naive[worker] = NaiveCache(capacity)
        self.trim()
        assert self.index.slot(worker) == slot
        assert self.index.worker(slot) == worker

    @rule(worker=workers)
    def leave(self, worker: str) -> None:
        self.index.leave(worker)
        self.naive.pop(worker, None)
        with pytest.raises(KeyError):
            self.index.slot(worker)

    @rule(worker=workers, capacity=capacities)
    def resize(self, worker: str, capacity: int) -> None:
        self.index.resize(worker, capacity)
        if worker in self.naive:
            self.naive[worker].capacity = capacity
            self.trim()

    @rule(worker=workers, hashes=chains)
    def predict(self, worker: str, hashes: tuple[int, ...]) -> None:
        self.index.predict(worker, hashes, self.now)
        self.expire()
        if worker in self.naive:
            for block in reversed(hashes):
                self.naive[worker].touch(block, self.now, self.now + TTL)
            self.trim()

    @rule(
        worker=workers,
        hashes=chains,
        cached=st.integers(0, 9),
        ago=st.sampled_from([0.0, 1.0, 3.0, math.inf]),
        tail=st.sampled_from([0, 0, 2, 50]),
    )
    def confirm(self, worker: str, hashes: tuple[int, ...], cached: int, ago: float, tail: int) -> None:
        self.index.confirm(worker, hashes, cached, self.now, self.now - ago, tail)
        self.expire()
        cache = self.naive.get(worker)
        if cache is None:
            return
        if cache.told:
            for block in reversed(hashes):
                cache.touch(block, self.now, self.now + TTL)
            self.trim()
            return
        if ago < math.inf:
            cache.learn(hashes, cached, self.now - ago)
        for _ in range(tail):
            self.leftover -= 1
            cache.touch(self.leftover, self.now, None)
        for block in reversed(hashes):
            cache.touch(block, self.now, None)
        self.trim()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.index.expire(self.now)
        self.expire()
        assert self.index.due > self.now

    @precondition(lambda self: self.naive)
    @rule(worker=workers, step=st.sampled_from([-1, 0, 1, 1, 1, 3]), hashes=chains, evicted=chains)
    def change(self, worker: str, step: int, hashes: tuple[int, ...], evicted: tuple[int, ...]) -> None:
        cache = self.naive.get(worker)
        number = (cache.told if cache else 0) + step
        self.index.change(worker, number, hashes, evicted, self.now)
        if cache is not None and step == 1:
            cache.told = number
            cache.entries = [entry for entry in cache.entries if entry.block not in evicted]
            for block in reversed(hashes):
                cache.touch(block, self.now, None)
            self.trim()

    @rule(worker=workers, step=st.sampled_from([-1, 0, 1, 3, -math.inf]), hashes=chains)
    def reset(self, worker: str, step: float, hashes: tuple[int, ...]) -> None:
        cache = self.naive.get(worker)
        number = int(max(0, (cache.told if cache else 0) + step))
        self.index.reset(worker, number, hashes, self.now)
        if cache is None or 0 < number < cache.told:
            return
        cache.told = number
        if number:
            predicted = [entry for entry in cache.entries if entry.expires is not None]
            cache.entries = []
            for block in reversed(hashes):
                cache.touch(block, self.now, None)
            cache.entries += [entry for entry in predicted if entry.block not in hashes]
        self.trim()

    @invariant()
    def books_agree(self) -> None:
        self.index.check()
        for worker in WORKERS:
            naive = self.naive.get(worker)
            assert self.index.held(worker) == (len(naive.entries) if naive else 0)
        expiries = [e.expires for cache in self.naive.values() for e in cache.entries if e.expires]
        assert self.index.due <= min(expiries, default=math.inf)

    @rule(hashes=chains)
    def ask(self, hashes: tuple[int, ...]) -> None:
        depths = {self.index.slot(worker): cache.depth(hashes) for worker, cache in self.naive.items()}
        expected = [
            (blocks, sum(1 << slot for slot, depth in depths.items() if depth >= blocks))
            for blocks in sorted(set(depths.values()) - {0})
        ]
        assert self.index.depths(hashes) == expected
        vector = [depths.get(slot, 0) for slot in range(self.index.slots)]
        assert self.index.hits(hashes).tolist() == vector


Fleet.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAgainstTheNaiveFleet = Fleet.TestCase


class Engine:
    """A worker's own cache: evicts the block used longest ago, and frees a chain from its end."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: OrderedDict[object, None] = OrderedDict()
        self.runs = 0

    def run(self, hashes: tuple[int, ...], tail: int) -> int:
        """How many of the first blocks it had."""
        held = [block in self.blocks for block in hashes]
        self.runs += 1
        for block in [(self.runs, n) for n in range(tail)] + list(reversed(hashes)):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.capacity:
            self.blocks.popitem(last=False)
        return held.index(False) if False in held else len(held)


runs = st.lists(st.tuples(chains, st.integers(0, 3)), max_size=60)


@given(runs, st.integers(9, 30))
def test_of_a_worker_that_runs_one_after_another_the_index_knows_all(
    requests: list[tuple[tuple[int, ...], int]], capacity: int
) -> None:
    index, engine = PrefixIndex(), Engine(capacity)
    index.join("w", capacity)
    for now, (hashes, tail) in enumerate(requests):
        expected = index.hits(hashes)[0]
        index.predict("w", hashes, now)
        cached = engine.run(hashes, tail)
        assert cached == expected
        index.confirm("w", hashes, cached, now + 0.5, now, tail)


def blocks(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def used_at(index: PrefixIndex, hashes: tuple[int, ...], now: float) -> None:
    index.predict("w", hashes, now)
    index.confirm("w", hashes, 0, now + 0.1, now)


def wrong(told: int, learns: bool) -> float:
    """Blocks a request by which the index is off at last, of a worker that caches 480 and told so many."""
    index, engine, chance, off = PrefixIndex(), Engine(480), random.Random(1), 0
    index.join("w", told)
    for now in range(3000):
        group = chance.choices(range(240), [1 / (n + 1) for n in range(240)])[0]
        hashes = blocks(1000 * group, 16)
        counted_on = int(index.hits(hashes)[0])
        index.predict("w", hashes, now)
        cached = engine.run(hashes, 4)
        off += abs(counted_on - cached) if now >= 2000 else 0
        index.confirm("w", hashes, cached, now + 0.5, now if learns else -math.inf, 4)
    index.check()
    return off / 1000


@pytest.mark.parametrize("told", [480, 600, 960])
def test_the_room_that_is_a_cache_is_learned(told: int) -> None:
    assert wrong(told, learns=True) < 0.1
    assert (wrong(told, learns=False) < 0.1) == (told == 480)


def test_a_caller_that_lets_nothing_be_cached_costs_no_more_than_the_least() -> None:
    index = PrefixIndex()
    index.join("w", 100)
    for now in range(50):
        used_at(index, blocks(0, 20), now)
    index.predict("w", blocks(1000, 200), 50)
    assert index.held("w") == 100 * LEAST
    for now in range(100, 104):
        index.predict("w", blocks(1000 * now, 20), now)
        index.confirm("w", blocks(1000 * now, 20), 20, now + 1, now)
    index.predict("w", blocks(1000, 200), 200)
    assert index.held("w") == 100


@pytest.mark.parametrize(
    ("cached", "sent", "room"),
    [(0, 10, 96), (4, 10, 100), (0, -math.inf, 100), (0, 0, 100)],
    ids=[
        "gone",
        "one off is within the estimate",
        "nobody knows when it was sent",
        "others brought them since",
    ],
)
def test_only_what_had_been_there_can_be_missing(cached: int, sent: float, room: int) -> None:
    index = PrefixIndex()
    index.join("w", 100)
    used_at(index, blocks(0, 5), 0)
    index.confirm("w", blocks(0, 5), cached, 11, sent)
    index.predict("w", blocks(1000, 200), 12)
    assert index.held("w") == room


def test_a_prediction_counts_at_once_and_goes_when_nothing_confirms_it() -> None:
    index = PrefixIndex(ttl=5)
    index.join("w", 100)
    index.predict("w", blocks(0, 3), 0)
    index.predict("w", blocks(0, 5), 1)
    assert index.depths(blocks(0, 9)) == [(5, 1)]
    assert index.due == 5
    index.expire(5.5)
    assert index.depths(blocks(0, 9)) == [(5, 1)]
    index.expire(6)
    assert index.depths(blocks(0, 9)) == []
    assert index.due == math.inf
    index.check()


def test_a_prediction_that_is_made_again_expires_later() -> None:
    index = PrefixIndex(ttl=5)
    index.join("w", 100)
    for now, first in [(0, 0), (1, 10), (4, 0)]:
        index.predict("w", blocks(first, 3), now)
    index.expire(6.5)
    assert index.depths(blocks(0, 3)) == [(3, 1)]
    assert index.depths(blocks(10, 3)) == []


def test_the_whole_state_of_a_cache_leaves_room_for_predictions() -> None:
    index = PrefixIndex()
    index.join("w", 5)
    index.predict("w", blocks(0, 3), 0)
    index.reset("w", 1, blocks(10, 9), 1)
    assert index.depths(blocks(0, 3)) == [(3, 1)]
    assert index.depths(blocks(10, 9)) == [(7, 1)]


def test_levels_are_within_each_other() -> None:
    index = PrefixIndex()
    for worker, count in zip("abcd", (2, 5, 0, 5), strict=True):
        index.join(worker, 100)
        index.predict(worker, blocks(0, count), 0)
    assert index.depths(blocks(0, 9)) == [(2, 0b1011), (5, 0b1010)]
    assert index.depths(()) == []
    np.testing.assert_array_equal(index.hits(blocks(0, 9)), [2, 5, 0, 5])


def test_a_slot_is_given_again() -> None:
    index = PrefixIndex()
    assert [index.join(worker, 9) for worker in "abc"] == [0, 1, 2]
    index.predict("b", blocks(0, 3), 0)
    index.leave("b")
    index.leave("a")
    with pytest.raises(KeyError):
        index.worker(1)
    assert [index.join(worker, 9) for worker in "de"] == [0, 1]
    assert index.slots == 3
    assert index.depths(blocks(0, 3)) == []


def test_the_fleet_has_a_bound_that_its_workers_share() -> None:
    index = PrefixIndex(most=30)
    index.join("a", 1000)
    used_at_a = blocks(0, 60)
    index.predict("a", used_at_a, 0)
    assert index.held("a") == 30
    for worker in "bc":
        index.join(worker, 1000)
    assert index.depths(used_at_a) == [(10, 1)]
    index.check()


def test_after_a_gap_in_the_changes_the_whole_state_is_needed() -> None:
    index = PrefixIndex()
    index.join("w", 100)
    index.change("w", 1, blocks(0, 2), (), 0)
    index.change("w", 3, blocks(2, 1), blocks(0, 1), 0)
    assert index.told("w") == 1
    assert index.depths(blocks(0, 4)) == [(2, 1)]
    index.reset("w", 9, blocks(20, 3), 0)
    index.reset("w", 8, blocks(40, 3), 0)
    index.change("w", 10, (), blocks(22, 1), 0)
    assert (index.told("w"), index.held("w")) == (10, 2)
    assert index.depths(blocks(20, 9)) == [(2, 1)]
    index.check()


def test_what_an_engine_tells_of_is_neither_guessed_nor_evicted_here() -> None:
    index = PrefixIndex(ttl=5)
    index.join("w", 10)
    index.change("w", 1, blocks(0, 15), (), 0)
    used_at(index, blocks(100, 2), 1)
    assert index.depths(blocks(0, 15)) == [(15, 1)]
    assert index.depths(blocks(100, 2)) == [(2, 1)]
    index.expire(7)
    assert index.depths(blocks(100, 2)) == []
    index.reset("w", 0, (), 8)
    assert index.depths(blocks(0, 15)) == [(10, 1)]
    used_at(index, blocks(100, 2), 9)
    index.expire(99)
    assert index.depths(blocks(100, 2)) == [(2, 1)]
    index.check()


@pytest.mark.parametrize("harm", ["masks", "capacity", "unsure", "all", "watch", "slot"])
def test_books_that_disagree_are_found(harm: str) -> None:
    index = PrefixIndex()
    for worker in "ab":
        index.join(worker, 10)
        index.predict(worker, blocks(0, 5), 0)
    index.check()
    cache = index._caches[1]
    assert cache is not None
    if harm == "masks":
        index._holders.remove(2, 1)
    elif harm == "capacity":
        cache.capacity = 4
    elif harm == "unsure":
        cache.unsure[77] = 9.0
    elif harm == "all":
        index._all = 1
    elif harm == "watch":
        index._watched.clear()
    else:
        index._slots["b"] = 0
    with pytest.raises(IntegrityError):
        index.check()
