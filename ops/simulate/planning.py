"""The planner over a simulated fleet: demand, plan and orders are the scheduler's own code."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from broker.messages import Heartbeat, Latency, UsageEvent
from broker.placement import Placement
from scheduler import planner
from scheduler.config import SchedulerConfig
from scheduler.demand import Demand
from scheduler.reconcile import Order, Orders
from scheduler.view import Adapter, Snapshot, Worker


class Planning:
    """Of one base, whose adapters the catalogue has all from the beginning."""

    def __init__(self, base: str, adapters: Iterable[str], config: SchedulerConfig) -> None:
        self._base = base
        self._config = config
        self._adapters = {model: Adapter(model, rank=8) for model in adapters}
        self._demand = Demand(config.demand_window)
        self._orders = Orders(config)
        self.placement = Placement(base=base)

    def ended(self, model: str, prompt: int, output: int, took: float) -> None:
        """A request has ended: lengths in tokens, `took` in seconds from its send to its end."""
        self._demand.ended(
            UsageEvent(
                request_id="",
                tenant="",
                model=model,
                base=self._base,
                service_class="",
                path="",
                worker="",
                outcome="finished",
                status=200,
                finished_ms=0,
                prompt_tokens=prompt,
                completion_tokens=output,
                latency=Latency(total=took, queue=0.0),
            )
        )

    def places(self, model: str) -> bool:
        """Whether the plan has a worker for it."""
        return bool(self.placement.workers(model))

    def done(self, beat: Heartbeat, now: float) -> bool:
        """Whether a worker has done what it was told."""
        return self._orders.open(beat.worker) and self._orders.heard(beat, now)

    def round(self, present: Mapping[str, int], beats: Collection[Heartbeat], now: float) -> list[Order]:
        """Plan, and say what is to be loaded where. `present`: requests in the system by model."""
        self._demand.sample({(self._base, model): count for model, count in present.items()}, now)
        for beat in beats:
            self._orders.heard(beat, now)
        demand = self._demand.of(self._base)
        workers = tuple(map(Worker.of, beats))
        snapshot = Snapshot(self._base, workers, self._adapters, self._orders.barred(now))
        self.placement = planner.plan(snapshot, demand, self.placement, round(1000 * now), self._config)
        known = {model: adapter.current for model, adapter in self._adapters.items()}
        orders = self._orders.due(self.placement, beats, demand, known, now)
        for order in orders:
            self._orders.answered(order, True, "", 0, now)
        return orders
