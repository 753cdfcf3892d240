"""What the scheduler measures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from broker.placement import Placement
from scheduler.autoscale import Balance, Target
from scheduler.view import Wanted

WORKERS = Gauge("headrace_workers", "Workers whose heartbeats arrive, by base and state", ["base", "state"])
LEADER = Gauge("headrace_leader", "1 on the scheduler that leads, 0 on a standby")
LOST = Counter("headrace_workers_lost_total", "Workers that fell silent without saying goodbye")
HANDED_ON = Counter("headrace_handed_on_total", "Requests held by lost workers that were handed on at once")
QUEUED = Gauge("headrace_queued", "Requests in the queue, running ones included", ["base", "class"])
SWEPT = Counter("headrace_swept_total", "Queued requests that the scheduler ended, by reason", ["reason"])

DISPATCHED = Counter("headrace_dispatched_total", "Requests that the scheduler handed to workers")
SHED = Counter(
    "headrace_shed_total", "Queued requests refused since they could not be served in time", ["class"]
)
STEP = Gauge(
    "headrace_step_seconds",
    "A full step of the slowest worker of a class, as the dispatcher learned",
    ["base", "class"],
)
TTFT_ERROR = Gauge(
    "headrace_ttft_error_p90_seconds",
    "By what the time from a send to the first token was off the foretold, nine of ten lately at most",
    ["base"],
)
PREEMPTED = Counter("headrace_preempted_total", "Running requests taken back for more urgent ones")

DESIRED = Gauge("headrace_desired_replicas", "Workers that the load of a base asks for", ["base"])
READY = Gauge("headrace_ready_replicas", "Workers of a base that take requests", ["base"])
DEMAND = Gauge("headrace_token_demand", "KV tokens in use, and those that the queue will take", ["base"])
SUPPLY = Gauge("headrace_token_supply", "KV tokens that one worker of a base can hold", ["base"])
PLACED = Gauge("headrace_adapters_placed", "Adapter replicas in the plan", ["base"])
NOWHERE = Gauge("headrace_adapters_nowhere", "Adapters that are asked for and have no place", ["base"])
MOVES = Counter("headrace_placements_total", "Adapters whose workers the plan changed", ["base"])
ORDERS = Counter("headrace_orders_total", "Commands to workers, by what became of them", ["do", "outcome"])
PLAN_SECONDS = Histogram(
    "headrace_plan_seconds",
    "Time to plan one base",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
)
_OF_PLANS = (DESIRED, READY, DEMAND, SUPPLY, PLACED, NOWHERE)


def observe_target(base: str, target: Target, balance: Balance, ready: int) -> None:
    DESIRED.labels(base).set(target.replicas)
    READY.labels(base).set(ready)
    DEMAND.labels(base).set(balance.demand)
    SUPPLY.labels(base).set(balance.supply)


def observe_plan(placed: Placement, demand: Mapping[str, Wanted]) -> None:
    PLACED.labels(placed.base).set(sum(len(each.workers) for each in placed.assignments))
    nowhere = (each for each in placed.assignments if not each.workers and each.model in demand)
    NOWHERE.labels(placed.base).set(sum(demand[each.model].asked for each in nowhere))


def forget_plan(base: str) -> None:
    """Of a base that is gone."""
    for metric in (*_OF_PLANS, MOVES):
        with contextlib.suppress(KeyError):
            metric.remove(base)


def forget_plans() -> None:
    """Of a scheduler that leads no longer: another one's figures count."""
    for gauge in _OF_PLANS:
        gauge.clear()
