"""Which worker's cache holds which prefix block, over the whole fleet. Pure.

A copy of what the workers' own caches do: each evicts the block that was used longest ago, a chain's end
before its beginning. Entries come by prediction when a request is sent, and are confirmed by the engine's own
count when it has run. Where an engine tells what it takes and evicts, that alone confirms, and nothing is
guessed of its room. Workers are small numbers, slots, and a
block knows its holders as one integer of bits: a walk along a chain takes one AND a block, whatever the
number of workers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstate.cache import Cache
from kvstate.errors import IntegrityError
from kvstate.holders import Holders

TTL = 10.0
"""Seconds for which a prediction counts that nothing confirms."""

MOST = 1 << 21
"""Blocks of the whole fleet that are remembered; divided evenly among the workers where they have more."""


class PrefixIndex:
    """Times are in seconds on any one clock that never goes back.

    Of workers that have not joined, or have left, nothing is kept: what is told of them is ignored.
    """

    def __init__(self, ttl: float = TTL, most: int = MOST) -> None:
        self._ttl = ttl
        self._most = most
        self._caches: list[Cache | None] = []  # by slot
        self._slots: dict[str, int] = {}
        self._free: list[int] = []  # heap of slots without a worker
        self._all = 0  # mask of the slots with a worker
        self._holders = Holders()
        self._due: list[tuple[float, int]] = []  # heap: when predictions of a slot expire; one entry a slot
        self._watched: set[int] = set()  # slots in `_due`

    # Workers

    def join(self, worker: str, capacity_blocks: int) -> int:
        """Its slot. One that was there begins again with an empty cache."""
        if worker in self._slots:
            self.leave(worker)
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = len(self._caches)
            self._caches.append(None)
            self._holders.extend(slot + 1)
        self._caches[slot] = Cache(worker, capacity_blocks)
        self._slots[worker] = slot
        self._all |= 1 << slot
        share = self._most // len(self._slots)
        for at, cache in enumerate(self._caches):
            if cache is not None and len(cache.blocks) > share:
                self._evict(cache, at)
        return slot

    def leave(self, worker: str) -> None:
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        cache = self._caches[slot]
        assert cache is not None
        for block in cache.blocks:
            if block >= 0:
                self._holders.remove(block, slot)
        self._caches[slot] = None
        self._all &= ~(1 << slot)
        heapq.heappush(self._free, slot)

    def resize(self, worker: str, capacity_blocks: int) -> None:
        cache = self._find(worker)
        if cache is not None:
            cache.capacity = capacity_blocks
            self._evict(cache, self._slots[worker])

    def slot(self, worker: str) -> int:
        """Raises KeyError if it has not joined. A slot is given anew when its worker has left."""
        return self._slots[worker]

    def worker(self, slot: int) -> str:
        """Raises KeyError if nobody has it."""
        cache = self._caches[slot] if 0 <= slot < len(self._caches) else None
        if cache is None:
            raise KeyError(slot)
        return cache.worker

    @property
    def slots(self) -> int:
        """One more than the highest slot ever given: the length of a vector over workers."""
        return len(self._caches)

    def held(self, worker: str) -> int:
        """Blocks that it is thought to hold."""
        cache = self._find(worker)
        return len(cache.blocks) if cache is not None else 0

    # Questions

    def depths(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """(blocks, mask of the slots that hold at least the first so many), deepest last, each mask within
        the one before; only where it gets smaller. Empty when nobody holds the first."""
        return self._holders.walk(hashes, self._all)

    def hits(self, hashes: Sequence[int]) -> NDArray[np.float64]:
        """`depths` as a vector: by slot, how many of the first blocks it holds."""
        slots = len(self._caches)
        hits: NDArray[np.float64] = np.zeros(slots)
        for depth, mask in self.depths(hashes):
            if mask & (mask - 1):
                packed = np.frombuffer(mask.to_bytes((slots + 7) // 8, "little"), np.uint8)
                bits = np.unpackbits(packed, count=slots, bitorder="little")
                hits[bits.view(np.bool_)] = depth
            else:
                hits[mask.bit_length() - 1] = depth
        return hits

    # What changes it

    def predict(self, worker: str, hashes: Sequence[int], now: float) -> None:
        """A request was sent there: it will have all of `hashes` soon, and counts as having them at once."""
        self.expire(now)
        cache = self._find(worker)
        if cache is not None:
            self._predict(cache, self._slots[worker], hashes, now)

    def confirm(
        self,
        worker: str,
        hashes: Sequence[int],
        cached_blocks: int,
        now: float,
        sent: float = -math.inf,
        tail: int = 0,
    ) -> None:
        """A request ran there, so that its cache has all of `hashes` now.

        Args:
            cached_blocks: how many of them it had before, by its own count.
            sent: when the request was sent. From blocks that had been there before and were missing, and
                from those that were there unexpectedly, it is learned how much of its room is a cache:
                what runs takes the rest. Without it nothing is learned.
            tail: further blocks it left behind, of the rest of the prompt and of its output.
        """
        self.expire(now)
        cache = self._find(worker)
        if cache is None:
            return
        slot = self._slots[worker]
        if cache.told:
            self._predict(cache, slot, hashes, now)  # it tells of them itself, unless it knows them not
            return
        if sent > -math.inf:
            cache.learn(hashes, cached_blocks, sent)
        if tail:
            cache.leave_behind(min(tail, cache.room), now)
        self._keep(cache, slot, hashes, now)
        self._evict(cache, slot)

    def expire(self, now: float) -> None:
        """Forget the predictions that nothing confirmed in time."""
        while self._due and self._due[0][0] <= now:
            _, slot = heapq.heappop(self._due)
            self._watched.discard(slot)
            cache = self._caches[slot]
            if cache is None:
                continue
            late = []
            for block, expires in cache.unsure.items():
                if expires > now:
                    break
                late.append(block)
            for block in late:
                self._drop(cache, slot, block)
            self._watch(cache, slot)

    @property
    def due(self) -> float:
        """When `expire` may next have something to do; inf = never, as things are."""
        return self._due[0][0] if self._due else math.inf

    # Changes of the engine's cache, numbered from 1 for each worker

    def told(self, worker: str) -> int:
        """Number of its last change that was taken; 0 = it tells none."""
        cache = self._find(worker)
        return cache.told if cache is not None else 0

    def change(
        self, worker: str, number: int, taken: Sequence[int], evicted: Iterable[int], now: float
    ) -> None:
        """Its cache has `taken` blocks and `evicted` others. After a gap that is ignored, until `reset`."""
        cache = self._find(worker)
        if cache is None or number != cache.told + 1:
            return
        slot = self._slots[worker]
        cache.told = number
        for block in evicted:
            self._drop(cache, slot, block)
        self._keep(cache, slot, taken, now)
        self._evict(cache, slot)

    def reset(self, worker: str, number: int, hashes: Sequence[int], now: float) -> None:
        """`hashes` is all that its cache holds as of that change, used most recently first; predictions stay.

        Number 0: it tells nothing any more.
        """
        cache = self._find(worker)
        if cache is None or 0 < number < cache.told:
            return
        slot = self._slots[worker]
        cache.told = number
        if number:
            for block in list(cache.blocks):
                if block < 0:
                    del cache.blocks[block]
                elif block not in cache.unsure:
                    self._drop(cache, slot, block)
            self._keep(cache, slot, hashes, now)
            for block in cache.unsure:
                cache.blocks.move_to_end(block)
        self._evict(cache, slot)

    # Integrity

    def check(self) -> None:
        """Raises IntegrityError if masks, caches and capacities disagree."""
        masks: dict[int, int] = {}
        for worker, slot in self._slots.items():
            cache = self._caches[slot]
            if cache is None or cache.worker != worker:
                raise IntegrityError(f"slot {slot} is not {worker}'s")
            if len(cache.blocks) > self._room(cache):
                raise IntegrityError(f"{worker} holds {len(cache.blocks)} blocks of {self._room(cache)}")
            if not cache.unsure.keys() <= cache.blocks.keys():
                raise IntegrityError(f"{worker} has predictions of blocks that it does not hold")
            if cache.unsure and slot not in self._watched:
                raise IntegrityError(f"nobody watches when the predictions for {worker} expire")
            for block in cache.blocks:
                if block >= 0:
                    masks[block] = masks.get(block, 0) | 1 << slot
        if masks != self._holders.masks():
            raise IntegrityError("the blocks' holders are not those that the caches say")
        if self._all != sum(1 << slot for slot in self._slots.values()):
            raise IntegrityError("the mask of all workers is not of those that have joined")

    # Keeping the books

    def _find(self, worker: str) -> Cache | None:
        slot = self._slots.get(worker)
        return self._caches[slot] if slot is not None else None

    def _room(self, cache: Cache) -> int:
        return min(cache.room, self._most // len(self._slots))

    def _drop(self, cache: Cache, slot: int, block: int) -> None:
        if cache.blocks.pop(block, None) is not None:
            cache.unsure.pop(block, None)
            self._holders.remove(block, slot)

    def _evict(self, cache: Cache, slot: int) -> None:
        blocks, room = cache.blocks, self._room(cache)
        while len(blocks) > room:
            block, _ = blocks.popitem(last=False)
            if block >= 0:
                cache.unsure.pop(block, None)
                self._holders.remove(block, slot)

    def _predict(self, cache: Cache, slot: int, hashes: Sequence[int], now: float) -> None:
        blocks, unsure, expires = cache.blocks, cache.unsure, now + self._ttl
        for block in reversed(hashes):
            if block not in blocks:
                blocks[block] = now
                self._holders.add(block, slot)
                unsure[block] = expires
                continue
            blocks.move_to_end(block)
            if block in unsure:
                del unsure[block]
                unsure[block] = expires
        self._evict(cache, slot)
        self._watch(cache, slot)

    def _keep(self, cache: Cache, slot: int, hashes: Sequence[int], now: float) -> None:
        """It has them all for certain."""
        blocks, unsure = cache.blocks, cache.unsure
        for block in reversed(hashes):
            if block not in blocks:
                self._holders.add(block, slot)
            elif block in unsure:
                del unsure[block]
            blocks[block] = now
            blocks.move_to_end(block)

    def _watch(self, cache: Cache, slot: int) -> None:
        if cache.unsure and slot not in self._watched:
            self._watched.add(slot)
            heapq.heappush(self._due, (next(iter(cache.unsure.values())), slot))
