"""What the dispatcher is compared with: other ways to choose a worker. All pure, as it is.

Each is given the same news and decides in the same form. Those that push bind a request at once, whatever
waits at the worker; the others keep it until some worker has credit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from kvstate import budget, prefix
from kvstate.index import PrefixIndex
from scheduler import rendezvous
from scheduler.dispatch.types import Decision, Item, Send, WorkerState


@dataclass(frozen=True, slots=True)
class News:
    """How late and how often a worker's state reaches the policy, in seconds; 0 late = fresh."""

    late: float
    every: float


SMOOTHING = 0.1
"""Weight of the newest request in the mean of those before."""


class Policy(Protocol):
    """As `scheduler.dispatch.Dispatcher`, which says what the calls mean."""

    def arrive(self, item: Item, now: float) -> None: ...

    def state(self, state: WorkerState, now: float) -> None: ...

    def first(self, key: int, now: float, cached_tokens: int) -> None: ...

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int, output_tokens: int
    ) -> None: ...

    def returned(self, key: int, now: float) -> None: ...

    def decide(self, now: float) -> Sequence[Decision]: ...

    def next_due(self, now: float) -> float: ...


@dataclass(slots=True)
class Seat:
    """A worker as the policy sees it. `unseen`: uncached tokens of the sends that its state does not include
    yet, oldest first."""

    state: WorkerState
    unseen: deque[int] = field(default_factory=deque)

    @property
    def pending(self) -> int:
        return self.state.prefill_held + sum(self.unseen)

    @property
    def load(self) -> int:
        return self.state.running + len(self.unseen)

    def hear(self, state: WorkerState) -> None:
        for _ in range(min(len(self.unseen), state.sends - self.state.sends)):
            self.unseen.popleft()
        self.state = state


class _Base:
    """First come, first served; what it does not need of the news it leaves alone."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self._queue: deque[Item] = deque()

    def arrive(self, item: Item, now: float) -> None:
        self._queue.append(item)

    def state(self, state: WorkerState, now: float) -> None:
        if (seat := self.seats.get(state.worker)) is None:
            self.seats[state.worker] = Seat(state)
            self.joined(state)
        else:
            seat.hear(state)

    def first(self, key: int, now: float, cached_tokens: int) -> None: ...

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int, output_tokens: int
    ) -> None: ...

    def returned(self, key: int, now: float) -> None: ...

    def decide(self, now: float) -> Sequence[Decision]:
        sends: list[Decision] = []
        while self._queue and (worker := self.choose(self._queue[0])) is not None:
            item = self._queue.popleft()
            uncached = self.uncached(item, worker)
            self.seats[worker].unseen.append(uncached)
            self.bound(item, worker, now)
            sends.append(Send(item.key, worker, now - item.arrived, 0.0, item.context - uncached, ""))
        return sends

    def next_due(self, now: float) -> float:
        return math.inf

    def joined(self, state: WorkerState) -> None:
        """A new worker."""

    def choose(self, item: Item) -> str | None:
        """The worker that gets it now; None = it waits."""
        raise NotImplementedError

    def uncached(self, item: Item, worker: str) -> int:
        """Tokens of its prompt that nobody thinks are cached there."""
        return item.context

    def bound(self, item: Item, worker: str, now: float) -> None:
        """It was sent there."""


class _Credited(_Base):
    """Gives to a worker what it may take, as its own pull has it: no more than `steps` steps' prefill, and KV
    room for a request of the usual size. `open`: who may take one, the first has asked the longest."""

    def __init__(self, steps: float) -> None:
        super().__init__()
        self._steps = steps
        self._prompt = self._output = 1.0
        self.open: dict[str, None] = {}

    def state(self, state: WorkerState, now: float) -> None:
        super().state(state, now)
        self._look(self.seats[state.worker])

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int, output_tokens: int
    ) -> None:
        self._prompt += SMOOTHING * (prompt_tokens - self._prompt)
        self._output += SMOOTHING * (output_tokens - self._output)

    def bound(self, item: Item, worker: str, now: float) -> None:
        super().bound(item, worker, now)
        self.open.pop(worker)  # it asks anew for the next
        self._look(self.seats[worker])

    def _look(self, seat: Seat) -> None:
        if self._may_take(seat):
            self.open.setdefault(seat.state.worker)
        else:
            self.open.pop(seat.state.worker, None)

    def _may_take(self, seat: Seat) -> bool:
        state = seat.state
        load = budget.Load(
            slots_free=state.slots_total - seat.load,
            prefill_limit=self._steps * state.step_tokens,
            prefill_held=seat.pending,
            kv_total=state.kv_total,
            kv_free=state.kv_free,
            kv_promised=seat.pending + self._output * seat.load / 2,
            mean_prompt=self._prompt,
            mean_output=self._output,
        )
        return budget.requests(load) > 0


class Fifo(_Credited):
    """Workers pull from one queue: who has asked the longest gets the request that has waited the longest."""

    def choose(self, item: Item) -> str | None:
        return next(iter(self.open), None)


class RoundRobin(_Base):
    """Pushes to the workers by turns."""

    def __init__(self) -> None:
        super().__init__()
        self._turn: deque[str] = deque()

    def joined(self, state: WorkerState) -> None:
        self._turn.append(state.worker)

    def choose(self, item: Item) -> str | None:
        self._turn.rotate(-1)
        return self._turn[-1]


class LeastLoaded(_Base):
    """Pushes to whoever holds the fewest requests."""

    def choose(self, item: Item) -> str | None:
        return min(self.seats, key=lambda worker: self.seats[worker].load)


class ConsistentHashing(_Base):
    """Pushes to the prefix's own worker, by a hash of the prompt's first block; to the next in its order of
    workers while it holds more than `BOUND` times the mean (Mirrokni et al., arXiv 1608.01350)."""

    BOUND = 1.25

    def __init__(self) -> None:
        super().__init__()
        self._order = lru_cache(4096)(self._ranked)

    def joined(self, state: WorkerState) -> None:
        self._order.cache_clear()

    def _ranked(self, name: str) -> list[str]:
        point = rendezvous.point(name)
        return sorted(
            self.seats,
            key=lambda worker: rendezvous.weight(point, rendezvous.point(worker)),
            reverse=True,
        )

    def choose(self, item: Item) -> str | None:
        total = sum(seat.load for seat in self.seats.values())
        most = math.ceil(self.BOUND * (total + 1) / len(self.seats))
        order = self._order(str(item.hashes[0] if item.hashes else item.key))
        return next(worker for worker in order if self.seats[worker].load < most)


class _Affine(_Base):
    """Knows where prefixes are, and scores a worker as the dispatcher does: `(pending + uncached) * (load +
    1)`, lowest wins. `local`: it counts its own sends before the workers tell of them."""

    def __init__(self, local: bool = True) -> None:
        super().__init__()
        self._local = local
        self._index = PrefixIndex()
        self._sent: dict[int, tuple[Item, str, float]] = {}

    def joined(self, state: WorkerState) -> None:
        self._index.join(state.worker, state.kv_total // prefix.BLOCK_TOKENS)

    def first(self, key: int, now: float, cached_tokens: int) -> None:
        item, worker, sent = self._sent.pop(key)
        cached = cached_tokens // prefix.BLOCK_TOKENS
        tail = item.context // prefix.BLOCK_TOKENS - len(item.hashes)
        self._index.confirm(worker, item.hashes, cached, now, sent, tail)

    def uncached(self, item: Item, worker: str) -> int:
        hit = int(self._index.hits(item.hashes)[self._index.slot(worker)])
        return max(1, item.context - hit * prefix.BLOCK_TOKENS)

    def bound(self, item: Item, worker: str, now: float) -> None:
        self._sent[item.key] = item, worker, now
        if self._local:
            self._index.predict(worker, item.hashes, now)

    def best(self, item: Item, workers: Iterable[str]) -> str | None:
        hits = self._index.hits(item.hashes).tolist()
        best, lowest = None, math.inf
        for worker in workers:
            seat = self.seats[worker]
            uncached = max(1, item.context - hits[self._index.slot(worker)] * prefix.BLOCK_TOKENS)
            if self._local:
                score = (seat.pending + uncached) * (seat.load + 1)
            else:
                score = (seat.state.prefill_held + uncached) * (seat.state.running + 1)
            if score < lowest:
                best, lowest = worker, score
        return best


class Push(_Affine):
    """Pushes to the best score."""

    def choose(self, item: Item) -> str | None:
        return self.best(item, self.seats)


class Greedy(_Credited, _Affine):
    """Gives the request that has waited the longest to whoever has credit, of those to the best score."""

    def choose(self, item: Item) -> str | None:
        return self.best(item, self.open)
