"""The planner at work: looks at the fleet and the queue, writes the plan, and has workers carry it out.

Every scheduler watches; the one that leads plans, each `plan_interval`, and at once when a request comes
for an adapter that is placed nowhere. The desired state lies in the bucket `placement`, one entry a base.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import ValidationError

from broker import base, entries, errors, registry, subjects
from broker.messages import Answer, Heartbeat, UsageEvent
from broker.placement import Placement, Placements
from scheduler import autoscale, metrics, planner, view
from scheduler.config import SchedulerConfig
from scheduler.demand import Demand
from scheduler.leader import Leader
from scheduler.reconcile import Order, Orders

_log = logging.getLogger(__name__)

_LISTEN = 2.0
"""Times `lost_after` that a new scheduler listens before its first plan: else it would know of no worker."""


class Placing:
    """Owned by the scheduler's event loop; `run` is the leader's one task."""

    def __init__(
        self,
        config: SchedulerConfig,
        broker: base.Broker,
        leader: Leader,
        name: str,
        models: registry.Registry,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._config = config
        self._broker = broker
        self._leader = leader
        self._name = name
        self._models = models
        self._spawn = spawn
        self._entries = entries.Entries(broker)
        self._placements = Placements(broker)
        self._demand = Demand(config.demand_window)
        self._orders = Orders(config)
        self._beats: dict[str, tuple[float, Heartbeat]] = {}  # the newest of each worker, and when it came
        self._plans: dict[str, Placement] = {}
        self._targets: dict[str, autoscale.Target] = {}
        self._saturation: defaultdict[str, autoscale.Saturation] = defaultdict(autoscale.Saturation)
        self._wants: set[tuple[str, str]] = set()
        self._nowhere: dict[str, set[str]] = {}  # asked for, and without a place in the last plan; by base
        self._wake = asyncio.Event()
        self._led = False  # in the last round
        self._new = False  # it leads, and has not written every plan yet: each is to bear its name

    async def watch(self) -> list[base.Subscription]:
        self._entries.on_change = self._orders.changed
        return [
            await self._entries.watch(),
            await self._placements.watch(),
            await self._broker.subscribe(subjects.ALL_USAGE, self._on_usage),
            await self._broker.subscribe(subjects.ALL_WANTS, self._on_want),
        ]

    def on_heartbeat(self, beat: Heartbeat, now: float) -> None:
        if beat.state == "gone":
            self._leave(beat.worker)
        else:
            self._beats[beat.worker] = now, beat
            # Only then at once: a thousand workers tell of themselves ten times a second.
            if self._orders.open(beat.worker) and self._orders.heard(beat, now):
                self._wake.set()

    def _leave(self, worker: str) -> None:
        self._beats.pop(worker, None)
        self._orders.gone(worker)

    def _on_usage(self, message: base.Message) -> None:
        if not self._led:
            return
        try:
            self._demand.ended(UsageEvent.model_validate_json(message.data))
        except ValidationError:
            _log.warning("a usage event on %s is unreadable", message.subject)

    def _on_want(self, message: base.Message) -> None:
        if not self._led:
            return
        try:
            _, base_token, model_token = message.subject.split(".")
            base_model, model = subjects.name(base_token), subjects.name(model_token)
        except ValueError:
            return
        plan = self._plans.get(base_model)
        if self._entries.adapter(model) is not None and not (plan and plan.workers(model)):
            self._wants.add((base_model, model))
            if model not in self._nowhere.get(base_model, ()):
                self._wake.set()  # else the last plan had no place for it, and the next one is soon enough

    # The rounds

    async def run(self) -> None:
        """Plan for ever, while we lead."""
        await asyncio.sleep(_LISTEN * self._config.lost_after)
        while True:
            self._wake.clear()
            self._expire(time.monotonic())
            if self._leader.leads:
                try:
                    await self._round(time.monotonic())
                except errors.HeadraceError as exc:
                    _log.warning("no plan: %s", exc.message)
                except Exception:
                    # Lost workers' requests must be handed on all the same.
                    _log.exception("the plan failed")
            elif self._led:
                self._led = False
                metrics.forget_plans()
            await asyncio.sleep(planner.SPACING)
            try:
                await asyncio.wait_for(
                    self._wake.wait(), max(0.0, self._config.plan_interval - planner.SPACING)
                )
            except TimeoutError:
                continue

    def _expire(self, now: float) -> None:
        """On a standby too: a fleet's workers come and go under ever new names."""
        for worker, (seen, _) in list(self._beats.items()):
            if now - seen > self._config.gone_after:
                self._leave(worker)

    async def _round(self, now: float) -> None:
        if not self._led:
            self._led = self._new = True
            self._plans = dict(self._placements.bases)
            # What an earlier run asked for, or was asked, says nothing of now.
            self._targets.clear()
            self._saturation.clear()
            self._demand = Demand(self._config.demand_window)
        self._demand.sample(await self._counts(), now)
        for _, beat in list(self._beats.values()):
            self._orders.heard(beat, now)
        bases, failed = self._bases(), False
        for base_model in sorted(bases):
            try:
                await self._plan(base_model, now)
            except errors.Unavailable:
                raise  # the others fare no better
            except Exception:
                failed = True
                _log.exception("no plan of %.200s; the other bases' stand", base_model)
        for base_model in self._plans.keys() - bases:
            await self._forget(base_model)
        self._new = self._new and failed

    async def _forget(self, base_model: str) -> None:
        """Nobody serves it, and nothing is for it."""
        del self._plans[base_model]
        self._targets.pop(base_model, None)
        self._saturation.pop(base_model, None)
        self._nowhere.pop(base_model, None)
        metrics.forget_plan(base_model)
        await self._placements.remove(base_model)

    async def _counts(self) -> Counter[tuple[str, str]]:
        """Requests in the queue, running ones included, by base and model."""
        found: Counter[tuple[str, str]] = Counter()
        for subject, count in (await self._broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).items():
            try:
                parsed = subjects.parse_request(subject)
            except ValueError:
                continue
            found[parsed.base, parsed.model] += count
        for key in self._wants:
            found[key] = max(1, found[key])  # it was told of before it was stored
        self._wants.clear()
        return found

    def _bases(self) -> set[str]:
        """Those that workers serve, or served, or that adapters are for. Not all that is in the queue: a
        direct publisher's typos are."""
        served = {beat.base for _, beat in self._beats.values()}
        remembered = {entry.card.base for entry in self._models.entries.values()}
        adapted = {e.base for e in self._entries.entries.values() if e.kind == "adapter"}
        return {name for name in served | remembered | adapted if subjects.fits(name)}

    async def _plan(self, base_model: str, now: float) -> None:
        beats = [beat for _, beat in self._beats.values() if beat.base == base_model]
        serving = [beat for beat in beats if beat.state == "serving"]
        demand = self._demand.of(base_model)
        snapshot = self._snapshot(base_model, serving, now)
        previous = self._plans.get(base_model)
        with metrics.PLAN_SECONDS.time():
            # In a thread: the lease is renewed and lost workers are noticed meanwhile.
            placed = await asyncio.to_thread(
                planner.plan, snapshot, demand, previous, int(self._broker.now_ms()), self._config
            )
        target = self._target(base_model, serving, now)
        placed = placed.model_copy(update={"replicas": target.replicas, "reason": target.reason})
        if self._new or placed != previous:
            placed = placed.model_copy(update={"made_ms": int(self._broker.now_ms()), "by": self._name})
            await self._placements.put(placed)
            self._tell(previous, placed)
        self._plans[base_model] = placed
        self._nowhere[base_model] = {
            each.model
            for each in placed.assignments
            if not each.workers and each.model in demand and demand[each.model].asked
        }
        metrics.observe_plan(placed, demand)
        known = {adapter.model: adapter.current for adapter in snapshot.adapters.values()}
        for order in self._orders.due(placed, serving, demand, known, now):
            self._spawn(self._carry_out(order))

    def _snapshot(self, base_model: str, serving: list[Heartbeat], now: float) -> view.Snapshot:
        workers = tuple(map(view.Worker.of, serving))
        adapters = {
            adapter.model: adapter
            for entry in self._entries.of_base(base_model)
            for version in entry.versions
            for adapter in [
                view.Adapter(
                    entries.versioned(entry.name, version.number),
                    version.rank,
                    version.number == entry.current,
                    entry.min_replicas,
                )
            ]
        }
        return view.Snapshot(base_model, workers, adapters, self._orders.barred(now))

    def _target(self, base_model: str, serving: list[Heartbeat], now: float) -> autoscale.Target:
        load = autoscale.load(
            [beat.credit for beat in serving],
            self._demand.present(base_model),
            self._demand.tokens(base_model),
            [sum(each.waiting for each in beat.adapters) for beat in serving],
        )
        saturation = self._saturation[base_model]
        saturation.sample(load)
        balance = saturation.balance(load)
        target = autoscale.target(balance, load, self._targets.get(base_model), now, self._config)
        self._targets[base_model] = target
        metrics.observe_target(base_model, target, balance, len(serving))
        return target

    def _tell(self, previous: Placement | None, placed: Placement) -> None:
        """Log what has changed, each with its reason."""
        before = {each.model: each.workers for each in previous.assignments} if previous else {}
        for each in placed.assignments:
            if each.workers != before.get(each.model, ()):
                metrics.MOVES.labels(placed.base).inc()
                told = {"base": placed.base, "model": each.model, "workers": list(each.workers)}
                _log.info("placed %s: %s", each.model, each.reason, extra=told)
        if previous is None or previous.replicas != placed.replicas:
            extra = {"base": placed.base, "replicas": placed.replicas}
            _log.info(
                "%s shall have %d workers: %s", placed.base, placed.replicas, placed.reason, extra=extra
            )

    async def _carry_out(self, order: Order) -> None:
        command = order.command
        try:
            data = await self._broker.ask(subjects.ctl(order.worker), command.model_dump_json().encode())
            answer = Answer.model_validate_json(data)
        except errors.Unavailable as exc:
            answer = Answer(ok=False, message=exc.message)
        except ValidationError:
            answer = Answer(ok=False, message="its answer is unreadable")
        metrics.ORDERS.labels(command.do, "taken" if answer.ok else "refused").inc()
        if not answer.ok:
            told = {"worker": order.worker, "model": command.model, "reason": answer.message}
            _log.warning("%s did not %s %s", order.worker, command.do, command.model, extra=told)
        beat = self._beats.get(order.worker)
        seq = beat[1].seq if beat else 0
        self._orders.answered(order, answer.ok, answer.message, seq, time.monotonic())
