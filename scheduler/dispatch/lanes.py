"""Who waits for which worker, and in what order. A place in a lane is virtual: it binds nobody. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from broker.messages import ServiceClass
from scheduler.dispatch.fair import Rounds, Shares
from scheduler.dispatch.types import Figures, Item

Vector = NDArray[np.float64]

RANKS = {each: rank for rank, each in enumerate(ServiceClass)}
"""Most urgent first."""

ROWS = 2 * len(RANKS)
"""Each class twice: tenants within their share, and those above."""


PASSED = 32
"""Tenants above their share that are passed over to find one that is not."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue, and its place.

    Attributes:
        slot: whose lane it is in; -1 = none that could run it is there.
        over: its tenant was above its share when it was placed.
        cost: tokens that it would compute there.
        ahead: tokens before it when it was placed.
        placed: when that was.
        version: of the fleet, for which the place is the best.
        urgent: its deadline is so near that it goes before those whose turn it is.
        least: time from sending to its first token on the worker where that is shortest.
        figures: how the best few workers stood for it lately.
        passed: tokens of those that went before it while it lacked KV room.
        tuned: it asks for an adapter.
    """

    item: Item
    rank: int
    over: bool = False
    slot: int = -1
    cost: float = 0.0
    ahead: float = 0.0
    placed: float = 0.0
    version: int = -1
    urgent: bool = False
    least: float = 0.0
    figures: Figures = ()
    passed: int = 0
    tuned: bool = False

    @property
    def row(self) -> int:
        return 2 * self.rank + self.over


@dataclass(slots=True)
class _Line:
    """Those of one tenant. The heap holds what has left too, until it comes up or is most of it."""

    heap: list[tuple[float, int]] = field(default_factory=list)  # of (arrived, key)
    count: int = 0


@dataclass(slots=True)
class _Queue:
    """Those of one class that wait for one worker."""

    members: dict[int, Waiting] = field(default_factory=dict)  # in order of placing
    lines: dict[str, _Line] = field(default_factory=dict)  # by tenant

    def add(self, waiting: Waiting) -> None:
        item = waiting.item
        self.members[item.key] = waiting
        line = self.lines.get(item.tenant)
        if line is None:
            line = self.lines[item.tenant] = _Line()
        heapq.heappush(line.heap, (item.arrived, item.key))
        line.count += 1

    def remove(self, waiting: Waiting) -> None:
        item = waiting.item
        del self.members[item.key]
        line = self.lines[item.tenant]
        line.count -= 1
        if not line.count:
            del self.lines[item.tenant]
        elif len(line.heap) >= 2 * line.count + 64:
            line.heap = sorted({entry for entry in line.heap if entry[1] in self.members})

    def first(self, shares: Shares) -> Waiting | None:
        """The oldest of the tenant that was served least."""
        if not self.lines:
            return None
        return self._oldest(shares.least(self.lines) if len(self.lines) > 1 else next(iter(self.lines)))

    def first_within(self, shares: Shares, now: float) -> Waiting | None:
        """The same of those tenants that are not above their share."""
        if not self.lines:
            return None
        least = shares.by_service(self.lines)[: PASSED + 1]
        tenant = next(shares.within(least, now), None)
        return self._oldest(tenant) if tenant is not None else None

    def _oldest(self, tenant: str) -> Waiting:
        heap = self.lines[tenant].heap
        while heap[0][1] not in self.members:
            heapq.heappop(heap)
        return self.members[heap[0][1]]


class Lane:
    def __init__(self, quanta: list[int]) -> None:
        self.queues = [_Queue() for _ in quanta]
        self.rounds = Rounds(quanta)
        self.urgent: list[tuple[float, int, int]] = []  # heap of (deadline, rank, key)


class Lanes:
    """All lanes, by worker slot. `tokens[row]` are those that wait in `row` and the rows before it.

    Attributes:
        tuned: how many in them ask for an adapter.
    """

    def __init__(self, shares: list[Shares], quanta: list[int]) -> None:
        self._shares = shares
        self._quanta = quanta
        self._lanes: list[Lane] = []
        self._count = 0
        self.tuned = 0
        self._of_rank = [0] * len(quanta)
        self.tokens: NDArray[np.float64] = np.zeros((ROWS, 0))
        self.counts: NDArray[np.float64] = np.zeros((ROWS, 0))

    def join(self, slot: int) -> None:
        more = slot + 1 - len(self._lanes)
        if more > 0:
            self._lanes += [Lane(self._quanta) for _ in range(more)]
            self.tokens = np.hstack([self.tokens, np.zeros((ROWS, more))])
            self.counts = np.hstack([self.counts, np.zeros((ROWS, more))])

    def leave(self, slot: int) -> list[Waiting]:
        """The worker is gone: those who waited for it, oldest place first."""
        stranded = [each for queue in self._lanes[slot].queues for each in queue.members.values()]
        for each in stranded:
            self.remove(each)
        self._lanes[slot] = Lane(self._quanta)
        return stranded

    def add(self, waiting: Waiting, slot: int) -> None:
        waiting.slot = slot
        lane = self._lanes[slot]
        lane.queues[waiting.rank].add(waiting)
        if waiting.urgent:
            self.hurry(waiting)
        self._note(waiting, slot, waiting.cost, 1)

    def remove(self, waiting: Waiting) -> None:
        slot = waiting.slot
        self._lanes[slot].queues[waiting.rank].remove(waiting)
        self._note(waiting, slot, -waiting.cost, -1)
        if not self.counts[-1, slot]:
            self.tokens[:, slot] = 0.0  # sums of floats leave a rest
        waiting.slot = -1

    def hurry(self, waiting: Waiting) -> None:
        """It goes before those whose turn it is."""
        waiting.urgent = True
        entry = (waiting.item.deadline, waiting.rank, waiting.item.key)
        heapq.heappush(self._lanes[waiting.slot].urgent, entry)

    def over(self, waiting: Waiting, now: float) -> bool:
        """Whether its tenant is above its share now."""
        return self._shares[waiting.rank].over(waiting.item.tenant, now)

    def next(self, slot: int, skipped: set[int], now: float) -> Waiting | None:
        """Whose turn it is, rows `skipped` aside: the earliest deadline of the urgent, else by round."""
        lane = self._lanes[slot]
        while lane.urgent:
            _, rank, key = lane.urgent[0]
            waiting = lane.queues[rank].members.get(key)
            if waiting is None:
                heapq.heappop(lane.urgent)
            elif skipped and 2 * rank + self.over(waiting, now) in skipped:
                break
            else:
                return waiting
        firsts: list[Waiting | None] = []
        for rank in range(len(lane.queues)):
            waiting = self._first(lane, rank, skipped, now)
            if waiting is not None and lane.rounds.goes_on(rank, waiting.cost):
                return waiting
            firsts.append(waiting)
        rank_next = lane.rounds.turn([None if each is None else each.cost for each in firsts])
        return None if rank_next is None else firsts[rank_next]

    def first(self, slot: int, rank: int, now: float) -> Waiting | None:
        """Whose turn it is among those of one class whose tenants are not above their share."""
        return self._lanes[slot].queues[rank].first_within(self._shares[rank], now)

    def _first(self, lane: Lane, rank: int, skipped: set[int], now: float) -> Waiting | None:
        if 2 * rank in skipped:
            return None
        queue, shares = lane.queues[rank], self._shares[rank]
        return queue.first_within(shares, now) if 2 * rank + 1 in skipped else queue.first(shares)

    def charge(self, slot: int, waiting: Waiting) -> None:
        """It was served there."""
        if not waiting.urgent:
            self._lanes[slot].rounds.charge(waiting.rank, waiting.cost)

    def waiting(self, rows: Sequence[int]) -> Vector:
        """How many of these rows wait, by lane."""
        count: Vector = self.counts[-1]
        if len(rows) < ROWS:
            count = np.zeros(len(count))
            for row in rows:
                count += self.counts[row] - self.counts[row - 1] if row else self.counts[row]
        return count

    def tenants(self, slot: int, rank: int, now: float) -> tuple[set[str], set[str]]:
        """Those of the class who wait there: who is within its share, and who is above it."""
        tenants = self._lanes[slot].queues[rank].lines.keys()
        within = set(self._shares[rank].within(tenants, now)) if tenants else set()
        return within, tenants - within

    def walk(self, slot: int, rank: int, most: int) -> Iterator[tuple[Waiting, float]]:
        """Up to `most` of the class, in order of placing, each with the tokens before it."""
        ahead = float(self.tokens[2 * rank - 1, slot]) if rank else 0.0
        for waiting in islice(self._lanes[slot].queues[rank].members.values(), most):
            yield waiting, ahead
            ahead += waiting.cost

    def ranks(self) -> list[int]:
        """The classes of which any wait, the most urgent first."""
        return [rank for rank, count in enumerate(self._of_rank) if count]

    def _note(self, waiting: Waiting, slot: int, tokens: float, count: int) -> None:
        row = waiting.row
        sums = self.tokens[row:, slot]
        sums += tokens
        sums = self.counts[row:, slot]
        sums += count
        self._of_rank[waiting.rank] += count
        self._count += count
        self.tuned += count * waiting.tuned

    def __len__(self) -> int:
        return self._count
