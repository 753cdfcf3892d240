"""The planner and real workers, each a process: what is planned is loaded, and moves when a worker dies."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from broker import base, client, entries, subjects
from broker.config import BrokerConfig
from broker.entries import ModelEntry
from broker.messages import Heartbeat
from broker.placement import Placements
from tests.integration.fleet import Fleet, Part
from tests.pushing import files, push
from tests.waiting import until
from tests.workbench import Caller, calling

PLANNING = {
    "scheduler__plan_interval": 0.1,
    "scheduler__gone_after": 1.0,
    "scheduler__dwell": 0.5,
    "scheduler__demand_window": 0.2,
}


class Stage:
    def __init__(self, fleet: Fleet, caller: Caller, placements: Placements) -> None:
        self.fleet, self.caller, self._placements = fleet, caller, placements
        self.parts: dict[str, Part] = {}
        self._beats: dict[str, Heartbeat] = {}

    def on_heartbeat(self, message: base.Message) -> None:
        beat = Heartbeat.model_validate_json(message.data)
        self._beats[beat.worker] = beat

    def ready(self, worker: str) -> set[str]:
        beat = self._beats.get(worker)
        return {each.model for each in beat.adapters if each.state == "ready"} if beat else set()

    def planned(self, model: str) -> set[str]:
        plan = self._placements.bases.get("sim")
        return set(plan.workers(model) or ()) if plan else set()

    async def keep(self, name: str, replicas: int) -> None:
        """`headrace models set NAME --min-replicas N`."""

        def kept(entry: ModelEntry | None) -> ModelEntry:
            assert entry is not None
            return entry.model_copy(update={"min_replicas": replicas})

        await entries.change(self.caller.broker, name, kept)


@contextlib.asynccontextmanager
async def staged(path: Path, *workers: str) -> AsyncIterator[Stage]:
    async with Fleet(path) as fleet:
        config = BrokerConfig(url=fleet.nats.url)
        async with await client.connect(config, "test") as broker, calling(broker) as caller:
            placements = Placements(broker)
            await placements.watch()
            made = Stage(fleet, caller, placements)
            await broker.subscribe(subjects.ALL_HEARTBEATS, made.on_heartbeat)
            await fleet.start("scheduler", **PLANNING)
            for worker in workers:
                settings = {"worker__name": worker, "sim__adapter_slots": 2, "sim__load_ms": 20}
                made.parts[worker] = await fleet.start("worker", **settings)
            yield made


async def test_min_replicas_are_loaded_before_anybody_asks(tmp_path: Path) -> None:
    async with staged(tmp_path, "w1", "w2") as stage:
        await push(stage.caller.broker, "ada")
        await stage.keep("ada", 2)
        await until(lambda: stage.ready("w1") == stage.ready("w2") == {"ada@1"})
        assert stage.planned("ada@1") == {"w1", "w2"}
        await (await stage.caller.submit(5, model="ada@1")).finishes()
        await push(stage.caller.broker, "ada", files(seed=7))
        await until(lambda: stage.ready("w1") == stage.ready("w2") == {"ada@2"})


async def test_a_dead_workers_adapter_is_loaded_on_another(tmp_path: Path) -> None:
    async with staged(tmp_path, "w1", "w2") as stage:
        await push(stage.caller.broker, "ada")
        await stage.keep("ada", 1)
        (holder,) = await until(lambda: stage.planned("ada@1"))
        await until(lambda: stage.ready(holder) == {"ada@1"})
        other = "w2" if holder == "w1" else "w1"
        assert stage.ready(other) == set()
        await stage.parts[holder].kill()
        await until(lambda: stage.ready(other) == {"ada@1"})
        assert stage.planned("ada@1") == {other}
