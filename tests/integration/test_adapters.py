"""Adapters in a fleet of processes on a real nats-server, whose workers are killed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker import artifacts, base, client, subjects
from broker.config import BrokerConfig
from broker.messages import FrameKind, Heartbeat
from tests.integration.fleet import Fleet
from tests.pushing import files, push
from tests.waiting import until
from tests.workbench import Caller, calling

pytestmark = pytest.mark.anyio


class Stage:
    def __init__(self, fleet: Fleet, caller: Caller) -> None:
        self.fleet, self.caller = fleet, caller
        self.beats: dict[str, Heartbeat] = {}

    def on_heartbeat(self, message: base.Message) -> None:
        beat = Heartbeat.model_validate_json(message.data)
        self.beats[beat.worker] = beat

    def states(self, worker: str) -> dict[str, str]:
        beat = self.beats.get(worker)
        return {} if beat is None else {each.model: each.state for each in beat.adapters}


@contextlib.asynccontextmanager
async def staged(path: Path) -> AsyncIterator[Stage]:
    async with Fleet(path) as fleet:
        config = BrokerConfig(url=fleet.nats.url, ack_wait=300.0)
        async with await client.connect(config, "test") as broker, calling(broker) as caller:
            made = Stage(fleet, caller)
            await broker.subscribe(subjects.ALL_HEARTBEATS, made.on_heartbeat)
            yield made


async def test_a_killed_workers_stream_of_an_adapter_goes_on_in_its_version(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        caller = stage.caller
        # Only a dead worker is silent for so long, even where the machine is busy.
        await stage.fleet.start("scheduler", broker__ack_wait=300.0, scheduler__lost_after=1.0)
        await push(caller.broker, "ada")
        settings = {"broker__ack_wait": 300.0, "sim__ttft_ms": 20, "sim__load_ms": 50}
        # So slow that it is killed before it has answered.
        first = await stage.fleet.start("worker", worker__name="w1", sim__itl_ms=500, **settings)
        call = await caller.submit(250, model="ada@1")
        await call.reach(FrameKind.DATA)
        await stage.fleet.start("worker", worker__name="w2", sim__itl_ms=5, **settings)
        await push(caller.broker, "ada", files(seed=7))  # a version that must not get into the answer
        newer = await caller.submit(10, model="ada@2")
        await newer.finishes()
        await first.kill()
        await call.finishes()
        # In between it may have gone back, for the worker on which its adapter was placed.
        epochs = {frame.epoch for frame in call.frames}
        assert 1 in epochs
        assert len(epochs) == 2
        assert stage.states("w2")["ada@1"] == "ready"
        await caller.drained()


async def test_a_started_worker_finds_what_an_earlier_one_left_on_disk(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        caller = stage.caller
        version = await push(caller.broker, "ada")
        first = await stage.fleet.start("worker", worker__name="w1")
        await (await caller.submit(5, model="ada@1")).finishes()
        await caller.drained()
        await first.kill()
        await artifacts.remove(caller.broker, version.files)
        await stage.fleet.start("worker", worker__name="w2")
        await (await caller.submit(5, model="ada@1")).finishes()
        assert len(list((tmp_path / "adapters").rglob(artifacts.WEIGHTS))) == 1


async def test_what_is_wanted_is_loaded_while_its_request_still_waits(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        caller = stage.caller
        await push(caller.broker, "ada")
        await stage.fleet.start("worker", worker__name="w1", sim__load_ms=20)
        await until(lambda: "w1" in stage.beats)
        await caller.broker.publish(subjects.want("sim", "ada@1"))
        await until(lambda: stage.states("w1") == {"ada@1": "ready"})
        await (await caller.submit(5, model="ada@1")).finishes()
