"""One run: clients ask, faults strike, and nothing may be lost."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.results import machine
from broker import client, errors, subjects
from tests.chaos import report
from tests.chaos.clients import HUNG, Client
from tests.chaos.plan import Fault, plan
from tests.chaos.stage import SIZES, Stage
from tests.waiting import until

CLIENTS = 40
EMPTY = 30.0
"""Seconds for the queue to be empty once all clients have gone: the ack wait, and then some."""


class Result(NamedTuple):
    """`told` is what there is to keep; `trouble` is for whoever looks for the cause, "" = none."""

    told: dict[str, Any]
    trouble: str


async def run(
    seed: int,
    minutes: float,
    data: Path,
    clients: int = CLIENTS,
    faults: Sequence[Fault] | None = None,
    only: str = "",
) -> Result:
    """Of no `faults` the seed makes some, of the part `only` if it is named. The logs of all processes stay
    under `data`, which must be free."""
    faults = plan(seed, minutes * 60, SIZES, only=only) if faults is None else faults
    tally, failures = report.Tally(), list[str]()
    async with Stage(data) as stage:
        await _serving(stage)
        began = time.monotonic()
        stop = asyncio.Event()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        timeout = httpx.Timeout(HUNG, connect=2.0)
        async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as http:
            asking = [
                asyncio.create_task(
                    Client(
                        number,
                        seed,
                        http,
                        lambda: stage.ingresses,
                        lambda manner, seen: tally.add(manner, seen, stage.struck),
                    ).run(stop)
                )
                for number in range(clients)
            ]
            await _strike(stage, faults, began, failures)
            await asyncio.sleep(max(0.0, began + minutes * 60 - time.monotonic()))
            stop.set()
            for ended in await asyncio.gather(*asking, return_exceptions=True):
                if isinstance(ended, BaseException):
                    failures.append(f"a client broke: {ended!r}")
        failures += [f"it ended by itself: {dead}" for dead in stage.dead()]
        failures += await _left(stage)
        told = {
            "seed": seed,
            "minutes": minutes,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            **report.figures(tally, stage.struck, stage.leaderless, stage.takeovers),
            "longest_gaps": report.longest(tally, stage.leaderless, began),
            "preempted": stage.preempted,
            "restarts": stage.restarts,
            "failures": failures,
        }
        trouble = "\n".join([*failures, report.bad_streams(tally, stage.struck, began)]).strip()
    for store in (data / "nats").glob("*/jetstream"):
        shutil.rmtree(store)
    return Result(told, trouble)


async def _serving(stage: Stage) -> None:
    """Wait until every ingress knows a worker."""
    async with httpx.AsyncClient(trust_env=False) as http:
        for url in stage.ingresses:
            await until(partial(_ready, http, url))


async def _ready(http: httpx.AsyncClient, url: str) -> bool:
    return (await http.get(f"{url}/health/ready")).status_code == 200


async def _strike(stage: Stage, faults: Sequence[Fault], began: float, failures: list[str]) -> None:
    """Each fault at its time, many at once; one that can't be carried out is a failure of the fleet."""

    async def strike(fault: Fault) -> None:
        try:
            await stage.strike(fault)
        except Exception as exc:
            failures.append(f"{fault.kind} at {fault.at:.3f} s could not be carried out: {exc!r}")

    async with asyncio.TaskGroup() as group:
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
            group.create_task(strike(fault))


async def _left(stage: Stage) -> list[str]:
    """What should not be there once everyone has gone: requests in the queue, dead letters."""
    found = []
    async with await client.connect(stage.cluster.config, "chaos") as broker:
        end = time.monotonic() + EMPTY
        while queued := await _counts(broker, subjects.REQUESTS):
            if time.monotonic() > end:
                found.append(f"requests stayed in the queue: {queued}")
                break
            await asyncio.sleep(0.2)
        if dead := await _counts(broker, subjects.DEAD):
            found.append(f"requests went to the dead letters: {dead}")
    return found


async def _counts(broker: client.NatsBroker, stream: str) -> dict[str, int]:
    try:
        return await broker.counts(stream, ">")
    except errors.Unavailable as exc:
        return {f"unknown: {exc.message}": 1}
