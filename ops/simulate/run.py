"""The simulated world: requests come, a policy decides, workers run, and news takes its time. One clock."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from broker.messages import Credit, Heartbeat
from ops.errors import SimulationError
from ops.simulate.adapters import Adapters
from ops.simulate.calls import Call
from ops.simulate.engine import Engine
from ops.simulate.fleet_file import FleetFile
from ops.simulate.planning import Planning
from ops.simulate.policies import News, Policy
from ops.simulate.record import Record
from scheduler.dispatch.types import Item, Preempt, Send, Shed, WorkerState
from scheduler.planner import SPACING
from scheduler.reconcile import Order
from workers.config import SimConfig
from workers.engines.step_model import Sequence, State

MODEL = "sim"
"""The base that all requests are for."""

PATIENCE = 120.0
"""Seconds for which requests wait while no engine has anything to do: nothing will ever come of them then."""


@dataclass(slots=True, eq=False, kw_only=True)
class Run(Sequence):
    """A request at a worker. `uncomputed`: prompt tokens that no step has begun to compute; until the first
    one has, those that whoever sent it thinks are not cached."""

    number: int
    uncomputed: int = 0


@dataclass(slots=True, eq=False)
class Worker:
    """A worker and its engine.

    Attributes:
        sends: requests that have come to it so far.
        uncomputed: the sum of its requests'.
        began: when what the engine does was begun. `free`: tokens of KV room that were free then.
        told: when it last told its state.
    """

    name: str
    config: SimConfig
    engine: Engine[Run]
    adapters: Adapters
    sends: int = 0
    beats: int = 0
    uncomputed: int = 0
    began: float = 0.0
    free: int = 0
    told: float = -math.inf
    lacking: dict[str, list[Run]] = field(default_factory=dict)  # who waits for an adapter

    @property
    def kv_total(self) -> int:
        """Tokens of KV room."""
        return self.config.kv_blocks * self.config.block_size

    def state(self, now: float) -> WorkerState:
        model, config = self.engine.model, self.config
        return WorkerState(
            worker=self.name,
            seen=now,
            step_tokens=config.max_num_batched_tokens,
            slots_total=config.max_num_seqs,
            running=len(model.running) + len(model.waiting) + sum(map(len, self.lacking.values())),
            prefill_held=self.uncomputed,
            kv_total=self.kv_total,
            kv_free=self.engine.kv_free(now),
            block_size=config.block_size,
            sends=self.sends,
            adapters=self.adapters.there,
            adapter_room=self.adapters.has_room,
        )

    def heartbeat(self) -> Heartbeat:
        """What the planner reads of it."""
        self.beats += 1
        return Heartbeat(
            worker=self.name,
            engine="sim",
            base=MODEL,
            models=(),
            started_ms=0,
            seq=self.beats,
            state="serving",
            credit=Credit(slots_total=self.config.max_num_seqs),
            adapters=tuple(self.adapters.states()),
            slots=self.config.adapter_slots,
            max_rank=self.config.max_rank,
            adapters_in_memory=self.config.adapters_in_memory,
        )

    def expect(self, run: Run, tokens: int) -> None:
        self.uncomputed += tokens - run.uncomputed
        run.uncomputed = tokens


@dataclass(slots=True)
class _Open:
    """A request that has not ended: what it is, where it runs, and what it had made before it came there."""

    call: Call
    item: Item
    worker: Worker | None = None
    run: Run | None = None
    done: int = 0


_First = tuple[int, int]  # a request that has its first token: its number, its cached tokens
_Ended = tuple[int, int, int, int]
"""One that has ended: its number, and what its last attempt had: tokens of prompt, cached, output."""


def simulate(fleet: FleetFile, policy: Policy, calls: Iterator[Call], news: News | None = None) -> Record:
    """Run `calls` through a fleet, until the last has ended. `news`: other than the fleet's own.

    Raises SimulationError where the policy leaves requests lying.
    """
    network = fleet.network
    return _World(fleet, policy, calls, news or News(network.news / 1000, network.heartbeat / 1000)).run()


class _World:
    def __init__(self, fleet: FleetFile, policy: Policy, calls: Iterator[Call], news: News) -> None:
        self._fleet, self._policy, self._calls, self._news = fleet, policy, calls, news
        self._send_s = fleet.network.send / 1000
        self._record = Record()
        self._open: dict[int, _Open] = {}
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = itertools.count()
        self._more = True  # requests are still to come
        self._queued = 0  # requests that the policy keeps
        self._wake_at = math.inf
        self._moved = 0.0  # when something last came of anything
        self._present: Counter[str] = Counter()  # requests that have not ended, by adapter
        adapters = fleet.adapters if fleet.plan else ()
        self._planning = Planning(MODEL, adapters, fleet.scheduler) if adapters else None
        self._planned, self._plan_at = -math.inf, math.inf
        self.now = 0.0
        self._workers = {
            name: Worker(name, section.engine, Engine(section.engine), Adapters(section.engine))
            for section in fleet.workers
            for name in (f"{section.name}-{n}" for n in range(section.count))
        }

    def run(self) -> Record:
        for n, worker in enumerate(self._workers.values()):
            self._policy.state(worker.state(0.0), 0.0)
            worker.told = 0.0
            self._after(self._news.every * (n + 1) / len(self._workers), self._beat, worker)
        if self._planning is not None:
            self._plan_by(0.0)
        self._next_call()
        events, pop = self._events, heapq.heappop
        while self._more or self._open:
            self.now, _, act, what = pop(events)
            act(what)
        self._record.recomputed = sum(w.engine.model.preemptions for w in self._workers.values())
        return self._record

    def _after(self, seconds: float, act: Callable[[Any], None], what: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act, what))

    # Requests come

    def _next_call(self) -> None:
        if (call := next(self._calls, None)) is None:
            self._more = False
        else:
            heapq.heappush(self._events, (call.at, next(self._order), self._arrive, call))

    def _arrive(self, call: Call) -> None:
        self._next_call()
        number = self._record.add(call)
        source = self._fleet.sources[call.source]
        deadline = call.at + source.deadline_ms / 1000 if source.deadline_ms else math.inf
        item = Item(
            key=number,
            tenant=call.tenant,
            model=call.model or MODEL,
            service_class=source.service_class,
            arrived=call.at,
            deadline=deadline,
            prompt_tokens=call.prompt,
            max_tokens=call.max_tokens,
            hashes=call.prefix(self._fleet.block_size),
            weight=source.weight,
        )
        self._open[number] = _Open(call, item)
        self._moved = self.now
        self._queued += 1
        if call.model:
            self._present[call.model] += 1
            if self._planning is not None and not self._planning.places(call.model):
                self._plan_by(self.now)
        self._policy.arrive(item, self.now)
        self._decide()

    # The planner

    def _plan_by(self, at: float) -> None:
        """Soon, and no sooner than it may."""
        at = max(at, self._planned + SPACING)
        if at < self._plan_at:
            self._plan_at = at
            heapq.heappush(self._events, (at, next(self._order), self._plan, at))

    def _plan(self, due: float) -> None:
        if due != self._plan_at or self._planning is None:
            return  # another one is sooner
        self._planned, self._plan_at = self.now, math.inf
        beats = [worker.heartbeat() for worker in self._workers.values()]
        for order in self._planning.round(self._present, beats, self.now):
            self._after(self._send_s, self._ordered, order)
        self._plan_by(self.now + self._fleet.scheduler.plan_interval)

    def _ordered(self, order: Order) -> None:
        worker = self._workers[order.worker]
        worker.adapters.told(order.command)
        self._load(worker)

    def _load(self, worker: Worker) -> None:
        if worker.adapters.load():
            self._record.loads += 1
            self._after(worker.config.load_ms / 1000, self._loaded, worker)

    def _loaded(self, worker: Worker) -> None:
        model = worker.adapters.loaded()
        for run in worker.lacking.pop(model, ()):
            self._begin(worker, run)
        self._load(worker)
        self._tell(worker, [], [])
        if self._planning is not None and self._planning.done(worker.heartbeat(), self.now):
            self._plan_by(self.now)

    def _over(self, call: Call) -> None:
        """It is in the system no more."""
        if call.model:
            self._present[call.model] -= 1

    # The policy decides

    def _decide(self) -> None:
        now = self.now
        for decision in self._policy.decide(now):
            self._moved = now
            self._queued -= not isinstance(decision, Preempt)
            if isinstance(decision, Send):
                self._record.sent[decision.key] = now
                self._record.predicted[decision.key] = decision.predicted_ttft_s
                self._after(self._send_s, self._deliver, decision)
            elif isinstance(decision, Shed):
                self._record.shed[decision.key] = now
                self._record.retry[decision.key] = decision.retry_after_s
                self._over(self._open.pop(decision.key).call)
            else:
                self._after(self._send_s, self._take_back, decision)
        due = self._policy.next_due(now)
        if due < self._wake_at:
            self._wake_at = due
            heapq.heappush(self._events, (max(now, due), next(self._order), self._wake, due))

    def _wake(self, due: float) -> None:
        if due == self._wake_at:
            self._wake_at = math.inf
            self._decide()

    # Workers run

    def _deliver(self, sent: Send) -> None:
        opened, worker = self._open[sent.key], self._workers[sent.worker]
        call, made = opened.call, opened.done
        run = Run(call.prompt + made, call.output - made, call.hashes, adapter=call.model, number=sent.key)
        opened.worker, opened.run = worker, run
        worker.sends += 1
        worker.expect(run, max(1, run.prompt_tokens - sent.hit_tokens))
        if not call.model or worker.adapters.need(call.model):
            self._begin(worker, run)
        else:
            self._record.cold += 1
            worker.lacking.setdefault(call.model, []).append(run)
            self._load(worker)

    def _begin(self, worker: Worker, run: Run) -> None:
        self._change(worker, lambda: worker.engine.add(run, self.now))

    def _leave(self, worker: Worker, run: Run) -> None:
        """Its adapter is not needed for it any more."""
        if run.adapter:
            worker.adapters.leave(run.adapter)
            self._load(worker)

    def _take_back(self, what: Preempt) -> None:
        opened = self._open.get(what.key)
        if opened is None or (run := opened.run) is None or (worker := opened.worker) is None:
            return
        if run in worker.lacking.get(run.adapter, ()):
            worker.lacking[run.adapter].remove(run)
        else:
            self._change(worker, lambda: worker.engine.abort(run, self.now))
        self._leave(worker, run)
        worker.expect(run, 0)
        opened.done += run.generated
        opened.worker = opened.run = None
        self._record.preempted[what.key] += 1
        self._after(self._news.late, self._return, opened)

    def _return(self, opened: _Open) -> None:
        # The deadline is of the first token, which its client may have.
        deadline = math.inf if opened.done else opened.item.deadline
        opened.item = replace(opened.item, done_tokens=opened.done, deadline=deadline)
        self._queued += 1
        self._policy.returned(opened.item.key, self.now)
        self._policy.arrive(opened.item, self.now)
        self._decide()

    def _change(self, worker: Worker, change: Callable[[], None]) -> None:
        engine = worker.engine
        was_idle, ends = engine.idle, engine.ends
        change()
        if was_idle:
            if self._step(worker):
                self._tell(worker, [], [])
        elif engine.ends != ends:
            self._await(worker)

    def _step(self, worker: Worker) -> bool:
        """Begin what comes next; whether that changes what its state says."""
        prefills, thrown = worker.engine.begin(self.now)
        for run in prefills:
            worker.expect(run, run.total - run.computed - run.chunk)
        for run in thrown:
            worker.expect(run, run.total)
        worker.began = self.now
        if not worker.engine.idle:
            worker.free = worker.engine.kv_free(self.now)
            self._await(worker)
        return bool(prefills or thrown)

    def _await(self, worker: Worker) -> None:
        ends = worker.engine.ends
        heapq.heappush(self._events, (ends, next(self._order), self._end, (worker, ends)))

    def _end(self, what: tuple[Worker, float]) -> None:
        worker, ends = what
        engine = worker.engine
        if engine.ends != ends:
            return  # something has brought the end nearer, and another event will tell of it
        before, free = engine.steps, (worker.free + engine.kv_free(self.now)) / 2
        told = engine.finish()
        steps = engine.steps - before
        self._record.step((self.now - worker.began) / steps, steps)
        if self._queued or engine.model.waiting:
            self._record.busy_s += self.now - worker.began
            self._record.kv_s += (self.now - worker.began) * (1 - free / worker.kv_total)
        first = [self._first(run) for run in told if run.generated == 1]
        ended = [self._ended(run) for run in told if run.state is State.FINISHED]
        if self._step(worker) or told:
            self._tell(worker, first, ended)

    def _first(self, run: Run) -> _First:
        cached = run.cached or 0
        if math.isnan(self._record.first[run.number]):
            self._record.first[run.number] = self.now
            self._record.cached[run.number] = cached
        return run.number, cached

    def _ended(self, run: Run) -> _Ended:
        opened = self._open.pop(run.number)
        self._over(opened.call)
        if opened.worker is not None:
            self._leave(opened.worker, run)
        made = opened.done + run.generated
        if self._planning is not None and run.adapter:
            took = self.now - self._record.sent[run.number]
            self._planning.ended(run.adapter, run.prompt_tokens, run.generated, took)
        self._record.end[run.number] = self._moved = self.now
        self._record.made[run.number] = made
        return run.number, run.prompt_tokens, run.cached or 0, run.generated

    # News

    def _tell(self, worker: Worker, first: list[_First], ended: list[_Ended]) -> None:
        worker.told = self.now
        self._after(self._news.late, self._hear, (worker.state(self.now), first, ended))

    def _hear(self, what: tuple[WorkerState, list[_First], list[_Ended]]) -> None:
        state, first, ended = what
        for number, cached in first:
            self._policy.first(number, self.now, cached)
        for number, prompt, cached, output in ended:
            self._policy.finish(number, self.now, prompt, cached, output)
        self._policy.state(state, self.now)
        self._decide()

    def _beat(self, worker: Worker) -> None:
        if (
            self._open
            and self.now - self._moved > PATIENCE
            and all(each.engine.idle and not each.adapters.loading for each in self._workers.values())
        ):
            raise SimulationError(f"{len(self._open)} requests wait, and the policy sends them nowhere")
        if self.now >= worker.told + self._news.every:
            self._tell(worker, [], [])
        self._after(worker.told + self._news.every - self.now, self._beat, worker)
