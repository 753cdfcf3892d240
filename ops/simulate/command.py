"""`headrace sim`: a fleet's file, run under each of its policies, and what came of it."""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from collections.abc import Iterator

import orjson

from ops.simulate import fleet_file, policies, report, traces, workload
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile, PolicyName
from ops.simulate.policies import News, Policy
from ops.simulate.record import Record
from ops.simulate.run import MODEL, simulate
from scheduler.dispatch.dispatcher import Dispatcher

STALE = 0.05
"""Seconds by which the state of `push_stale` and `push_stale_blind` is old."""

STEPS = 1.0
"""What pulling workers hold at most besides what they compute, in steps' prefill."""


def run(args: argparse.Namespace) -> int:
    """The exit status: 0 done. Raises SettingsError, TraceError, SimulationError."""
    fleet = fleet_file.load(args.file, {"policies": args.policy} if args.policy is not None else {})
    if args.scale is not None:
        fleet = scaled(fleet, args.scale)
    records: dict[str, Record] = {}
    found: dict[str, report.Figures] = {}
    for name in fleet.policies:
        began = time.perf_counter()
        records[name] = record = play(fleet, name)
        took = time.perf_counter() - began
        found[name] = report.figures(fleet, record)
        print(f"{name}: {len(record.at):,} requests in {took:.1f} s", file=sys.stderr)
    if args.plots is not None:
        for path in report.plot(fleet, records, args.plots):
            print(path, file=sys.stderr)
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() if args.json else report.text(found))
    return 0


def play(fleet: FleetFile, name: PolicyName) -> Record:
    """The fleet's workload under one policy. Raises TraceError, SimulationError."""
    made, news = policy(fleet, name)
    return simulate(fleet, made, calls(fleet), news)


def policy(fleet: FleetFile, name: PolicyName) -> tuple[Policy, News | None]:
    """With the news that it gets, where those are not the fleet's."""
    every = fleet.network.heartbeat / 1000
    match name:
        case "lanes":
            # Nobody is there to ask why.
            return Dispatcher(MODEL, fleet.dispatch.model_copy(update={"explained": 0})), None
        case "fifo":
            return policies.Fifo(STEPS), None
        case "round_robin":
            return policies.RoundRobin(), None
        case "least_loaded":
            return policies.LeastLoaded(), None
        case "consistent_hashing":
            return policies.ConsistentHashing(), None
        case "greedy":
            return policies.Greedy(STEPS), None
        case "push_fresh":
            return policies.Push(), News(0.0, every)
        case "push_stale":
            return policies.Push(), News(STALE, every)
        case "push_stale_blind":
            return policies.Push(local=False), News(STALE, every)


def calls(fleet: FleetFile) -> Iterator[Call]:
    """All that is asked, in order of time. Raises TraceError while it is read."""
    sources = [workload.calls(fleet)]
    for number, section in enumerate(fleet.trace, len(fleet.stream)):
        recorded = traces.calls(section, number, fleet.block_size, fleet.context)
        sources.append(recorded)
    for call in heapq.merge(*sources, key=lambda call: call.at):
        if call.at > fleet.duration:
            return
        yield call


def scaled(fleet: FleetFile, factor: float) -> FleetFile:
    """With `factor` times the requests a second."""
    streams = [each.model_copy(update={"rate": each.rate * factor}) for each in fleet.stream]
    recorded = [each.model_copy(update={"speed": each.speed * factor}) for each in fleet.trace]
    return fleet.model_copy(update={"stream": tuple(streams), "trace": tuple(recorded)})
