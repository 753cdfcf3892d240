"""From where adapters are to where they shall be: commands to workers, one load per worker at a time.

Pure: the clock is handed in, and who asks the workers tells what they answered. A worker on which an adapter
failed is left alone with it for a while, longer each time, and the plan keeps it off there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from broker import entries
from broker.messages import AdapterState, Command, Heartbeat
from broker.placement import Placement
from scheduler.config import SchedulerConfig
from scheduler.view import Wanted

_RESIDENT = ("loading", "ready", "draining")
"""States in which an adapter takes room in its engine."""

_DOUBLINGS = 16


class Order(NamedTuple):
    worker: str
    command: Command


@dataclass(slots=True)
class _Sent:
    """An order that is not done yet. `after`: the last heartbeat that may tell of the time before it."""

    command: Command
    at: float
    started_ms: int
    after: int


@dataclass(slots=True)
class _Failure:
    times: int
    until: float
    reason: str


class Orders:
    """Owned by the scheduler's event loop; the leader's alone."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._sent: dict[str, _Sent] = {}
        self._failures: dict[str, dict[str, _Failure]] = {}  # by model, by worker
        self._excused: set[tuple[str, str]] = set()  # worker and model: what it says is the entry's before

    # What is known

    def open(self, worker: str) -> bool:
        """Whether it has been told something that is not done yet."""
        return worker in self._sent

    def heard(self, beat: Heartbeat, now: float) -> bool:
        """Learn from a heartbeat what became of an order; whether it is done."""
        sent = self._sent.get(beat.worker)
        done = sent is not None and (sent.started_ms != beat.started_ms or self._done(sent, beat, now))
        if done:
            del self._sent[beat.worker]
        for each in beat.adapters:
            if each.state != "failed":
                self._excused.discard((beat.worker, each.model))
                if each.state == "ready":
                    self._forgive(beat.worker, each.model)
            elif (beat.worker, each.model) not in self._excused and beat.worker not in self._failures.get(
                each.model, ()
            ):
                self.failed(beat.worker, each.model, each.reason or "it did not say why", now)
        return done

    def _done(self, sent: _Sent, beat: Heartbeat, now: float) -> bool:
        model, late = sent.command.model, now - sent.at > self._config.load_timeout
        state = next((each for each in beat.adapters if each.model == model), None)
        if sent.command.do == "unload":
            return late or state is None or state.state in ("on_disk", "failed")
        if state is not None and state.state == "ready":
            return True
        if state is not None and state.state == "failed" and beat.seq > sent.after:
            self.failed(beat.worker, model, state.reason or "it did not say why", now)
            return True
        if state is not None and state.state in ("fetching", "loading"):
            if late:
                self.failed(beat.worker, model, f"not loaded within {self._config.load_timeout:g} s", now)
            return late
        # It is not at it: what it holds may all be in use, which is not this adapter's fault. Told again.
        return now - sent.at > self._config.retry_load

    def gone(self, worker: str) -> None:
        """It serves no more: its next life begins without a past."""
        self._sent.pop(worker, None)
        for model in list(self._failures):
            self._forgive(worker, model)
        self._excused = {(of, model) for of, model in self._excused if of != worker}

    def changed(self, name: str) -> None:
        """The catalogue's entry is another one: what failed may work now."""
        for model in [model for model in self._failures if entries.split(model)[0] == name]:
            self._excused.update((worker, model) for worker in self._failures.pop(model))

    def _forgive(self, worker: str, model: str) -> None:
        failures = self._failures.get(model, {})
        if failures.pop(worker, None) is not None and not failures:
            del self._failures[model]

    def failed(self, worker: str, model: str, reason: str, now: float) -> None:
        self._excused.discard((worker, model))
        failures = self._failures.setdefault(model, {})
        times = failures[worker].times + 1 if worker in failures else 1
        pause = self._config.retry_load * 2 ** min(times - 1, _DOUBLINGS)
        failures[worker] = _Failure(times, now + min(pause, self._config.retry_load_most), reason)

    def barred(self, now: float) -> dict[str, dict[str, str]]:
        """By model, the workers that are left alone with it now, and why."""
        found = {
            model: {worker: f.reason for worker, f in failures.items() if f.until > now}
            for model, failures in self._failures.items()
        }
        return {model: workers for model, workers in found.items() if workers}

    # What is to be done

    def due(
        self,
        placement: Placement,
        beats: Iterable[Heartbeat],
        demand: Mapping[str, Wanted],
        known: Mapping[str, bool],
        now: float,
    ) -> list[Order]:
        """At most one order for each worker that has none open; each counts as sent.

        Args:
            known: the base's adapter versions in the catalogue, and whether each is the current one.
        """
        planned: dict[str, list[str]] = {}
        for each in placement.assignments:
            for worker in each.workers:
                planned.setdefault(worker, []).append(each.model)
        barred = self.barred(now)
        orders: list[Order] = []
        for beat in beats:
            if beat.worker in self._sent or beat.state != "serving" or not beat.slots:
                continue
            mine = planned.get(beat.worker, [])
            command = self._load(beat, mine, demand, barred) or self._tidy(beat, mine, demand, known)
            if command is not None:
                # What the worker says before it has answered may still tell of the time before.
                self._sent[beat.worker] = _Sent(command, now, beat.started_ms, beat.seq + 1)
                orders.append(Order(beat.worker, command))
        return orders

    def answered(self, order: Order, ok: bool, message: str, seq: int, now: float) -> None:
        """What the worker, or the broker in its place, answered; `seq`: of its last heartbeat."""
        sent = self._sent.get(order.worker)
        if sent is None or sent.command is not order.command:
            return
        if ok:
            sent.after = max(sent.after, seq + 1)
            return
        del self._sent[order.worker]
        if order.command.do == "load":
            self.failed(order.worker, order.command.model, message or "it refused", now)

    def _load(
        self,
        beat: Heartbeat,
        planned: list[str],
        demand: Mapping[str, Wanted],
        barred: Mapping[str, Mapping[str, str]],
    ) -> Command | None:
        states = {each.model: each for each in beat.adapters}
        if any(each.state == "loading" for each in beat.adapters):
            return None  # by itself: a request asked for it. One at a time
        missing = [
            model
            for model in planned
            if (model not in states or states[model].state not in _RESIDENT)
            and beat.worker not in barred.get(model, ())
        ]
        if not missing:
            return None
        model = min(missing, key=lambda m: (-_concurrency(demand, m), m))
        if sum(each.state in _RESIDENT for each in beat.adapters) >= (beat.adapters_in_memory or beat.slots):
            spare = [each for each in beat.adapters if _idle(each) and each.model not in planned]
            if spare:
                least = min(spare, key=lambda each: (_concurrency(demand, each.model), each.model))
                return Command(do="unload", model=least.model, reason=f"makes room for {model}")
        return Command(do="load", model=model, reason="placed here")

    def _tidy(
        self, beat: Heartbeat, planned: list[str], demand: Mapping[str, Wanted], known: Mapping[str, bool]
    ) -> Command | None:
        """Unload a version that has been superseded or removed, and that nobody asks for. Any other stays
        where it is loaded until its room is needed: it may be asked for again."""
        for each in beat.adapters:
            old = not known.get(each.model, False)
            asked = demand[each.model].asked if each.model in demand else False
            if old and _idle(each) and not asked and each.model not in planned:
                why = "an earlier version" if each.model in known else "the catalogue has it no more"
                return Command(do="unload", model=each.model, reason=why)
        return None


def _idle(each: AdapterState) -> bool:
    return each.state == "ready" and not each.running and not each.waiting


def _concurrency(demand: Mapping[str, Wanted], model: str) -> float:
    return demand[model].concurrency if model in demand else 0.0
