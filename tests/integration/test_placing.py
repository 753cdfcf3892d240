"""The planner on a real nats-server: what is written, what workers are told, what an operator is shown.

The workers here only listen to commands: what a real one does with them is told in its own tests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker import base, client, entries, subjects
from broker.config import BrokerConfig
from broker.entries import ModelEntry, Version
from broker.messages import AdapterState, Answer, Command, Credit, Heartbeat, ModelCard
from broker.placement import Placement, Placements
from broker.server import NatsServer
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.integration import command
from tests.waiting import LIMIT, until
from tests.workbench import PATH, metric

CARD = ModelCard(id="sim", base="sim", context_tokens=4096, paths=(PATH,))


class Puppet:
    """A worker that does as it is told, at once, but for models in `broken`."""

    def __init__(self, broker: base.Broker, name: str, slots: int = 2, max_rank: int = 16) -> None:
        self.name, self.slots, self.max_rank = name, slots, max_rank
        self.broken: dict[str, str] = {}
        self.states: dict[str, AdapterState] = {}
        self.told: list[tuple[str, str]] = []
        self.told_last = b""  # its last heartbeat
        self.loading = asyncio.Event()
        self.loading.set()
        self._broker = broker
        self._beats = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> set[str]:
        return {model for model, state in self.states.items() if state.state == "ready"}

    def command(self, message: base.Message) -> None:
        command = Command.model_validate_json(message.data)
        self.told.append((command.do, command.model))
        task = asyncio.create_task(self._obey(command, message.reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _obey(self, command: Command, reply: str) -> None:
        if command.do == "unload":
            self.states.pop(command.model, None)
        else:
            self.states[command.model] = AdapterState(model=command.model, state="loading")
        await self._broker.publish(reply, Answer(ok=True).model_dump_json().encode())
        if command.do == "load":
            await self.loading.wait()
            reason = self.broken.get(command.model, "")
            self.states[command.model] = AdapterState(
                model=command.model, state="failed" if reason else "ready", reason=reason
            )

    async def beat(self, state: Any = "serving") -> None:
        self._beats += 1
        told = Heartbeat(
            worker=self.name,
            engine="sim",
            base="sim",
            models=(CARD,),
            started_ms=1,
            seq=self._beats,
            state=state,
            credit=Credit(requests=4, slots_total=4, kv_tokens_free=950, kv_tokens_total=1000),
            slots=self.slots,
            max_rank=self.max_rank,
            adapters=tuple(self.states.values()),
        )
        self.told_last = told.model_dump_json().encode()
        await self._broker.publish(subjects.heartbeat(self.name), self.told_last)

    async def live(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(0.02)


@asynccontextmanager
async def puppet(broker: base.Broker, name: str, **more: Any) -> AsyncIterator[Puppet]:
    made = Puppet(broker, name, **more)
    commands = await broker.subscribe(subjects.ctl(name), made.command)
    living = asyncio.create_task(made.live())
    try:
        yield made
    finally:
        if living.done():
            living.result()  # it never ends by itself: raise what ended it
        living.cancel()
        await commands.close()
        await made.beat("gone")


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[base.Broker]:
    async with await client.connect(BrokerConfig(url=nats_server.url), "test") as made:
        yield made


@asynccontextmanager
async def planning(server: NatsServer, name: str = "s1", **settings: Any) -> AsyncIterator[Scheduler]:
    quick = {"plan_interval": 0.06, "gone_after": 0.5, "dwell": 0.0, "demand_window": 0.1, "lost_after": 0.3}
    config = SchedulerConfig(name=name, **(quick | settings))
    async with await client.connect(BrokerConfig(url=server.url), "scheduler") as broker:
        scheduler, stop = Scheduler(config, broker), asyncio.Event()
        task = asyncio.create_task(scheduler.run(stop))
        try:
            yield scheduler
        finally:
            stop.set()
            await asyncio.wait_for(task, LIMIT)


@asynccontextmanager
async def plans(broker: base.Broker) -> AsyncIterator[Placements]:
    found = Placements(broker)
    watch = await found.watch()
    yield found
    await watch.close()


async def declare(broker: base.Broker, name: str, *ranks: int, **more: Any) -> None:
    versions = tuple(
        Version(number=number, digest=f"sha256:{number}", rank=rank) for number, rank in enumerate(ranks, 1)
    )
    told = {"kind": "adapter", "base": "sim", "versions": versions, "current": len(ranks)}
    await entries.change(broker, name, lambda _: ModelEntry(**({"name": name} | told | more)))


async def queue(broker: base.Broker, model: str, count: int = 1) -> list[int]:
    """Requests that nobody pulls: the puppets take none."""
    found = []
    for number in range(count):
        subject = str(subjects.RequestSubject("sim", "standard", "acme", model))
        head = {
            "Nats-Msg-Id": f"acme:{model}-{number}",
            "Reply-To": f"out.acme.box.{number}",
            "Path": PATH,
        }
        found.append((await (await broker.enqueue(subject, b"{}", head))).seq)
    return found


def held(placed: Placements, model: str) -> tuple[str, ...]:
    plan = placed.bases.get("sim")
    return (plan.workers(model) or ()) if plan else ()


async def test_a_request_has_its_adapter_placed_and_loaded(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server), puppet(broker, "w1") as one, plans(broker) as placed:
        await declare(broker, "ada", 8)
        await until(lambda: "sim" in placed.bases)
        assert placed.bases["sim"].by == "s1"
        assert not one.told
        await queue(broker, "ada@1")
        await until(lambda: one.ready == {"ada@1"})
        assert held(placed, "ada@1") == ("w1",)
        assert one.told == [("load", "ada@1")]
        (each,) = placed.bases["sim"].assignments
        assert each.reason == "asked for, and loaded nowhere"
        await until(lambda: metric("headrace_adapters_placed", base="sim") == 1)


async def test_a_want_has_it_placed_before_the_next_plan_is_due(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    """The interval is longer than the test may take."""
    async with puppet(broker, "w1") as one, plans(broker) as placed, planning(nats_server, plan_interval=600):
        await declare(broker, "ada", 8)

        async def wanted() -> bool:
            await broker.publish(subjects.want("sim", "ada@1"))
            return one.ready == {"ada@1"}

        await until(wanted)
        assert held(placed, "ada@1") == ("w1",)


async def test_a_want_that_finds_no_place_does_not_have_the_plan_made_over_and_over(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with puppet(broker, "w1") as one, plans(broker) as placed, planning(nats_server, plan_interval=600):
        await declare(broker, "ada", 8)
        await declare(broker, "tall", 64)

        async def planned(model: str) -> bool:
            await broker.publish(subjects.want("sim", model))
            plan = placed.bases.get("sim")
            return plan is not None and any(each.model == model for each in plan.assignments)

        await until(lambda: planned("tall@1"))
        made = metric("headrace_plan_seconds_count")
        asked = iter(range(50))

        async def often() -> bool:
            await broker.publish(subjects.want("sim", "tall@1"))
            return next(asked, None) is None

        await until(often)
        assert metric("headrace_plan_seconds_count") <= made + 1
        await until(lambda: planned("ada@1"))
        await until(lambda: one.ready == {"ada@1"})


async def test_min_replicas_follow_the_catalogue_and_the_fleet(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server), puppet(broker, "w1") as one, plans(broker) as placed:
        await declare(broker, "ada", 8, min_replicas=2)
        await until(lambda: one.ready == {"ada@1"})
        async with puppet(broker, "w2") as two:
            await until(lambda: two.ready == {"ada@1"})
            assert set(held(placed, "ada@1")) == {"w1", "w2"}
            await declare(broker, "ada", 8, 8, min_replicas=2)
            await until(lambda: one.ready == two.ready == {"ada@2"})  # the old version is asked for by nobody
        await until(lambda: held(placed, "ada@2") == ("w1",))


async def test_a_worker_that_leaves_is_replaced_and_the_reason_is_kept(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server), puppet(broker, "w1") as one, plans(broker) as placed:
        async with puppet(broker, "w2", max_rank=8) as two:
            await declare(broker, "ada", 8)
            await queue(broker, "ada@1")
            await until(lambda: two.ready == {"ada@1"})  # the smallest sufficient rank
            assert not one.told
        await until(lambda: one.ready == {"ada@1"})
        await until(lambda: held(placed, "ada@1") == ("w1",))
        assert placed.bases["sim"].assignments[0].reason == "w2 serves no more"


async def test_a_broken_adapter_is_given_up_and_the_others_load(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with (
        planning(nats_server, retry_load=3600.0, retry_load_most=3600.0),
        plans(broker) as placed,
        puppet(broker, "w1") as one,
        puppet(broker, "w2") as two,
    ):
        one.broken = two.broken = {"bad@1": "adapter_model.safetensors is truncated"}
        await declare(broker, "bad", 8)
        await declare(broker, "good", 8)
        await queue(broker, "bad@1")
        await queue(broker, "good@1")
        await until(lambda: "good@1" in one.ready | two.ready)
        await until(lambda: [*one.told, *two.told].count(("load", "bad@1")) == 2)

        def given_up() -> str:
            found = (a.reason for a in placed.bases["sim"].assignments if a.model == "bad@1")
            return next((reason for reason in found if "failed on 2 workers" in reason), "")

        assert "adapter_model.safetensors is truncated" in await until(given_up)
        one.broken = two.broken = {}
        await declare(broker, "bad", 8, source="mended")  # a changed entry is tried at once
        await until(lambda: "bad@1" in one.ready | two.ready)


async def test_one_load_at_a_time(nats_server: NatsServer, broker: base.Broker) -> None:
    async with planning(nats_server), puppet(broker, "w1", slots=3) as one, plans(broker) as placed:
        one.loading.clear()
        for name in ("a", "b", "c"):
            await declare(broker, name, 8, min_replicas=1)
        await until(lambda: all(held(placed, f"{name}@1") for name in ("a", "b", "c")))
        await until(lambda: one.told)
        made = metric("headrace_plan_seconds_count")
        await until(lambda: metric("headrace_plan_seconds_count") >= made + 5)
        assert len(one.told) == 1
        one.loading.set()
        await until(lambda: one.ready == {"a@1", "b@1", "c@1"})
        assert len(one.told) == 3


async def test_the_next_leader_goes_on_with_the_plan(nats_server: NatsServer, broker: base.Broker) -> None:
    async with puppet(broker, "w1") as one, puppet(broker, "w2") as two, plans(broker) as placed:
        async with planning(nats_server):
            await declare(broker, "ada", 8)
            await queue(broker, "ada@1")
            await until(lambda: "ada@1" in one.ready | two.ready)
        before = placed.bases["sim"]
        async with planning(nats_server, "s2"):
            await until(lambda: placed.bases["sim"].by == "s2")
            assert placed.bases["sim"].assignments == before.assignments
            assert len(one.told + two.told) == 1


async def test_a_standby_keeps_no_worker_that_fell_silent(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server), planning(nats_server, "s2") as standby, puppet(broker, "w1") as one:
        beat = json.loads(await until(lambda: one.told_last)) | {"worker": "silent"}
        await broker.publish(subjects.heartbeat("silent"), json.dumps(beat).encode())
        await until(lambda: "silent" in standby._placing._beats)
        await until(lambda: "silent" not in standby._placing._beats)
        assert not standby.leads
        assert "w1" in standby._placing._beats


async def test_the_wanted_workers_rise_with_the_queue_and_sink_again(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server, max_workers=6), puppet(broker, "w1"), plans(broker) as placed:
        await until(lambda: "sim" in placed.bases and placed.bases["sim"].replicas == 1)
        await until(lambda: metric("headrace_ready_replicas", base="sim") == 1)
        queued = await queue(broker, "sim", 3000)
        found = await until(lambda: placed.bases["sim"] if placed.bases["sim"].replicas == 6 else None)
        assert "in use or queued" in found.reason
        assert metric("headrace_desired_replicas", base="sim") == 6
        for seq in queued:
            await broker.delete(subjects.REQUESTS, seq)
        await until(lambda: placed.bases["sim"].replicas == 1)


async def test_a_base_that_nobody_has_ever_served_is_not_planned(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server, orphan_after=3600.0), puppet(broker, "w1"), plans(broker) as placed:
        subject = "req.typo.standard.acme.typo"
        head = {"Nats-Msg-Id": "acme:1", "Reply-To": "out.acme.box.1", "Path": PATH}
        await (await broker.enqueue(subject, b"{}", head))
        await until(lambda: "sim" in placed.bases)
        made = metric("headrace_plan_seconds_count")
        await until(lambda: metric("headrace_plan_seconds_count") >= made + 3)
        assert set(placed.bases) == {"sim"}


@pytest.mark.parametrize("wrong", ["", "b" * 5000])
async def test_a_base_without_a_proper_name_does_not_hold_up_the_others(
    nats_server: NatsServer, broker: base.Broker, wrong: str
) -> None:
    """A subject can't hold it, and the server cuts who tries."""
    async with planning(nats_server) as scheduler, puppet(broker, "w1") as one, plans(broker) as placed:
        await declare(broker, "ada", 8)
        value = await broker.get(subjects.KV_CATALOGUE, "ada")
        assert value.data is not None
        entry = json.loads(value.data) | {"name": "bad", "base": wrong}
        await broker.put(subjects.KV_CATALOGUE, "bad", json.dumps(entry).encode())
        beat = json.loads(await until(lambda: one.told_last)) | {"worker": "w2", "base": wrong}
        cards = [{"id": wrong, "base": wrong}]
        for more in ({}, {"base": "sim", "models": cards}):
            await broker.publish(subjects.heartbeat("w2"), json.dumps(beat | more).encode())
        await queue(broker, "ada@1")
        await until(lambda: one.ready == {"ada@1"})
        made = metric("headrace_plan_seconds_count")
        await until(lambda: metric("headrace_plan_seconds_count") >= made + 3)
        assert scheduler.leads
        assert set(placed.bases) == {"sim"}


async def test_a_base_that_can_not_be_planned_leaves_the_others_their_plans(
    nats_server: NatsServer, broker: base.Broker
) -> None:
    async with planning(nats_server), puppet(broker, "w1") as one, plans(broker):
        beat = json.loads(await until(lambda: one.told_last))
        beat["credit"]["kv_tokens_total"] = 10**400  # no float holds it

        async def absurd() -> bool:
            for base_model in ("a", "b", "c", "d"):
                told = beat | {"worker": base_model, "base": base_model}
                await broker.publish(subjects.heartbeat(base_model), json.dumps(told).encode())
            return one.ready == {"ada@1"}

        await absurd()
        await declare(broker, "ada", 8)
        await queue(broker, "ada@1")
        await until(absurd)


async def test_a_base_that_is_gone_leaves_no_figures(nats_server: NatsServer, broker: base.Broker) -> None:
    async with planning(nats_server), plans(broker) as placed:
        await declare(broker, "ada", 8, base="gone")
        await until(lambda: metric("headrace_desired_replicas", base="gone") == 1)
        await broker.remove(subjects.KV_CATALOGUE, "ada")
        await until(lambda: "gone" not in placed.bases)
        assert metric("headrace_desired_replicas", base="gone") == 0


# The command


async def placement_of(url: str, *arguments: str) -> tuple[int, str, str]:
    return await command.run("placement", url, *arguments)


async def test_the_plan_is_shown_and_explained(nats_server: NatsServer, broker: base.Broker) -> None:
    url = nats_server.url
    assert (await placement_of(url, "show"))[1] == ""
    async with planning(nats_server), puppet(broker, "w1", slots=1), plans(broker) as placed:
        await declare(broker, "ada", 8)
        await declare(broker, "bob", 8, 8)
        await declare(broker, "tall", 64)
        await queue(broker, "ada@1", 3)
        await until(lambda: held(placed, "ada@1"))
        await queue(broker, "bob@2")
        await queue(broker, "tall@1")
        await until(lambda: len(placed.bases["sim"].assignments) == 3)
        status, out, _ = await placement_of(url, "show")
        assert status == 0
        lines = [line.split() for line in out.splitlines()]
        assert lines[0] == ["BASE", "WORKERS", "WANTED", "SLOTS", "QUEUED"]
        assert lines[1][0] == "sim"
        assert lines[1][3:] == ["1", "of", "1", "5"]
        assert next(line for line in lines if line[:1] == ["ada@1"])[1:4] == ["sim", "w1", "3"]

        _, out, _ = await placement_of(url, "explain", "ada", "--json")
        (fact,) = map(json.loads, out.splitlines())
        assert (fact["planned"], fact["states"], fact["queued"]) == (["w1"], {"w1": "ready"}, 3)
        assert fact["reason"] == "asked for, and loaded nowhere"
        _, out, _ = await placement_of(url, "explain", "tall@1")
        assert "its rank, 64, is more than any worker takes: 16 at most" in out
        _, out, _ = await placement_of(url, "explain")
        assert out.startswith("base sim\n")
        assert "model bob@1" in out
        assert "an earlier version, and nobody asks for it" in out
        status, _, err = await placement_of(url, "explain", "nobody")
        assert (status, "there is no base or adapter 'nobody'" in err) == (1, True)


def test_a_placement_is_unchanged_by_its_wire() -> None:
    made = Placement(base="sim", replicas=2, reason="why", made_ms=5, by="s1")
    assert Placement.model_validate_json(made.model_dump_json()) == made
