"""Decisions a second on one core, with 10 to 1,000 workers: where all have credit, and before a deep queue.

A decision is all that the dispatcher does for one request: it arrives, is sent, has its first token, ends,
and its worker tells twice how it is; heartbeats are counted apart. What it is told is made before the clock
starts. Before a deep queue one worker at a time has room for one request, and tells so. The goals are 5,000
a second with 100 workers, 1,000 with 1,000, and 1 ms for the slowest of a hundred calls; how costs grow with
the fleet says for how many more workers it would do. Of several rounds the quickest counts: what else a host
does makes its guests slower, for minutes, and never quicker. No broker: the dispatcher is pure.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import results
from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.dispatcher import Dispatcher
from scheduler.dispatch.types import Decision, Item, Send, WorkerState

FLEETS = (10, 100, 300, 1000)
DECISIONS = 10_000
ROUNDS = 5
DEEP = 20_000
RUNNING = 8  # requests on each worker
STEP, SLOTS = 512, 64
TENANTS, BLOCKS = 50, 12
INTERVAL = 2e-4  # seconds of the fleet's time between two requests
BEAT = 0.1  # and between two heartbeats of a worker


class _Fleet:
    """Workers that compute a prompt the moment they have it, and end requests in their order."""

    def __init__(self, workers: int, deep: bool) -> None:
        self.dispatcher = Dispatcher("base", DispatchConfig())
        self.now = 0.0
        self.times: list[float] = []
        self.beats: list[float] = []
        self._due: deque[tuple[float, str]] = deque()  # when who tells how it is, though nothing happened
        self.sent = 0
        self.steady = False  # as many end as are sent
        self._deep = deep
        self._names = [f"worker-{number}" for number in range(workers)]
        self._sends = dict.fromkeys(self._names, 0)
        self._running = dict.fromkeys(self._names, 0)
        self._ending: deque[tuple[str, Item]] = deque()
        self._items: dict[int, Item] = {}
        self._random = random.Random(1)
        self._chains = [tuple(range(n * 100, n * 100 + BLOCKS)) for n in range(10 * workers)]
        for name in self._names:
            self.dispatcher.state(self._state(name, held=STEP if deep else 0), self.now)
            self._due.append((BEAT * len(self._due) / workers, name))

    def next(self) -> Item:
        """Who comes next."""
        key, draw = len(self._items), self._random
        group = min(int(draw.paretovariate(0.8)) - 1, len(self._chains) - 1)
        tenant = f"tenant-{min(int(draw.paretovariate(0.5)), TENANTS)}"
        hashes = self._chains[group]
        service_class = ServiceClass.BATCH if key % 4 == 0 else ServiceClass.INTERACTIVE
        item = self._items[key] = Item(
            key, tenant, "base", service_class, self.now, prompt_tokens=BLOCKS * 128 + 200, hashes=hashes
        )
        return item

    def turn(self) -> None:
        """One request comes; one is sent, or as many as there is room for; one ends."""
        self.now += INTERVAL
        self._beat()
        before = self.sent
        self._timed(self.dispatcher.arrive, self.next())
        if self._deep:
            self._timed(self.dispatcher.state, self._state(self._names[self.sent % len(self._names)], held=0))
        # Where workers are kept for others, those that are open are full sooner.
        self.steady |= len(self._ending) > RUNNING * len(self._names) or self.sent == before
        if self.steady and self._ending:
            name, item = self._ending.popleft()
            self._running[name] -= 1
            self._timed(self._end, item, self._state(name, held=STEP if self._deep else 0))

    def _beat(self) -> None:
        while self._due[0][0] <= self.now:
            at, name = self._due.popleft()
            self._due.append((at + BEAT, name))
            state = self._state(name, held=STEP if self._deep else 0)
            began = time.thread_time()
            self.dispatcher.state(state, self.now)
            decisions = self.dispatcher.decide(self.now)
            self.beats.append(time.thread_time() - began)
            self._note(decisions)

    def _timed(self, tell: Callable[..., None], *news: Item | WorkerState) -> None:
        began = time.thread_time()
        tell(*news, self.now)
        decisions = self.dispatcher.decide(self.now)
        self.times.append(time.thread_time() - began)
        self._note(decisions)

    def _note(self, decisions: Sequence[Decision]) -> None:
        """What is sent is computed at once, and its worker says so."""
        sends = [each for each in decisions if isinstance(each, Send)]
        for each in sends:
            self.sent += 1
            self._sends[each.worker] += 1
            self._running[each.worker] += 1
            self._ending.append((each.worker, self._items[each.key]))
        for worker in dict.fromkeys(each.worker for each in sends):
            self._timed(self.dispatcher.state, self._state(worker, held=STEP if self._deep else 0))

    def _end(self, item: Item, state: WorkerState, now: float) -> None:
        self.dispatcher.first(item.key, now, item.prompt_tokens - 200)
        self.dispatcher.finish(item.key, now, item.prompt_tokens, item.prompt_tokens - 200, 32)
        self.dispatcher.state(state, now)

    def _state(self, name: str, held: int) -> WorkerState:
        running, sends = self._running[name], self._sends[name]
        return WorkerState(
            name, self.now, STEP, SLOTS, running, held, 10**6, 10**6 - 2000 * running, sends=sends
        )


def measure(workers: int, deep: bool, decisions: int) -> dict[str, float]:
    fleet = _Fleet(workers, deep)
    for _ in range(DEEP if deep else 0):
        fleet.dispatcher.arrive(fleet.next(), fleet.now)
    while not fleet.steady:
        fleet.turn()
    fleet.times, fleet.beats, fleet.sent = [], [], 0
    while fleet.sent < decisions:
        fleet.turn()
    return {
        "a_second": round(fleet.sent / sum(fleet.times)),
        "heartbeat_ms": round(1000 * statistics.mean(fleet.beats), 4),
        "p50_ms": round(1000 * results.percentile(fleet.times, 50), 3),
        "p99_ms": round(1000 * results.percentile(fleet.times, 99), 3),
        "queued": fleet.dispatcher.queued(),
    }


def run(quick: bool) -> dict[str, Any]:
    decisions = DECISIONS // 20 if quick else DECISIONS
    rounds = 1 if quick else ROUNDS
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for workers in FLEETS:
            for name, deep in (("credit", False), ("deep", True)):
                case = f"{workers}_{name}"
                found.setdefault(case, []).append(measure(workers, deep, decisions))
                results.say(f"  {case}: {found[case][-1]}")
    measured = {}
    for case, each in found.items():
        quickest = max(each, key=lambda one: one["a_second"])
        measured[case] = quickest | {"slowest": min(one["a_second"] for one in each)}
    return {"decisions": decisions, "rounds": rounds, **measured}


if __name__ == "__main__":
    results.main("dispatcher", run)
