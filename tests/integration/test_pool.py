"""The instance pool over a real nats-server, with simulated engines as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from broker import base, client, subjects
from broker.config import BrokerConfig
from broker.messages import Answer, Command, Instance, PoolBeat, ServiceClass
from tests.integration.fleet import Fleet, Part
from tests.integration.reading import connected
from tests.integration.serving import answer, ready
from tests.integration.test_catalogue import done
from tests.waiting import until

CHAT = "/v1/chat/completions"
POLICY = {
    "name": "p",
    "memory": 10,
    "poll": 0.05,
    "lost_after": 0.5,
    "linger": 0.1,
    "idle_least": 600,
    "dwell": 0.5,
    "turn_factor": 0.0,
    "starve_after": 0.5,
}
ONE = {"engine": "sim", "hot_bytes": 10}


def written(path: Path, bases: dict[str, dict[str, Any]], **policy: Any) -> Path:
    """A pool's file with these bases; a list of pairs is a table."""
    lines = ["[pool]", *(f"{key} = {json.dumps(value)}" for key, value in (POLICY | policy).items())]
    for name, section in bases.items():
        own = section.get("settings", {})
        table = ", ".join(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in own.items())
        lines += ["[[base]]", f"name = {json.dumps(name)}", f"settings = {{ {table} }}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in section.items() if key != "settings"]
    path.write_text("\n".join(lines))
    return path


class Stage:
    """A pool, an ingress and a scheduler; what the pool's beats told."""

    def __init__(self, fleet: Fleet, broker: base.Broker, http: httpx.AsyncClient) -> None:
        self.fleet = fleet
        self.broker = broker
        self.http = http
        self.beats: list[PoolBeat] = []
        self.pool: Part | None = None

    def heard(self, message: base.Message) -> None:
        self.beats.append(PoolBeat.model_validate_json(message.data))

    async def start(self, file: Path, **settings: Any) -> Part:
        self.pool = await self.fleet.start("worker", pool=file, **settings)
        return self.pool

    def now(self, name: str) -> Instance:
        return next(each for each in self.beats[-1].instances if each.base == name)

    async def becomes(self, name: str, state: str) -> Instance:
        await until(lambda: self.beats and self.now(name).state == state)
        return self.now(name)

    async def ask(self, model: str, content: str, tokens: int = 3, **headers: str) -> None:
        """One answer, every token of it."""
        body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": content}]}
        response = await self.http.post(CHAT, json=body, headers=headers)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == answer(content, tokens)

    async def tell(self, do: str, model: str) -> Answer:
        command = Command.model_validate({"do": do, "model": model})
        data = await self.broker.ask(subjects.ctl("p"), command.model_dump_json().encode())
        return Answer.model_validate_json(data)

    async def queued(self, model: str) -> int:
        counts = await self.broker.counts(subjects.REQUESTS, f"req.{subjects.token(model)}.>")
        return sum(counts.values())

    def worker(self, name: str) -> psutil.Process:
        """The process of an engine's worker."""
        assert self.pool is not None
        named = f"worker.name=p-{name}"
        return next(
            each for each in psutil.Process(self.pool.process.pid).children() if named in each.cmdline()
        )


@pytest.fixture
async def stage(anyio_backend: object, tmp_path: Path) -> AsyncIterator[Stage]:
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(Fleet(tmp_path / "fleet"))
        ingress, _ = await asyncio.gather(fleet.start("ingress"), fleet.start("scheduler"))
        broker = await stack.enter_async_context(
            await client.connect(BrokerConfig(url=fleet.nats.url), "test")
        )
        http = await stack.enter_async_context(connected(ingress.url))
        made = Stage(fleet, broker, http)
        await broker.subscribe(subjects.ALL_POOLS, made.heard)
        yield made


async def listed(stage: Stage) -> dict[str, bool]:
    cards = (await stage.http.get("/v1/models")).json()["data"]
    return {card["id"]: card["serving"] for card in cards}


async def test_a_cold_base_is_known_and_its_first_request_starts_it(stage: Stage, tmp_path: Path) -> None:
    await stage.start(written(tmp_path / "pool.toml", {"a": ONE, "b": ONE}))
    await until(lambda: ready(stage.http))

    async def known() -> bool:
        return await listed(stage) == {"a": False, "b": False}

    await until(known)
    assert (await stage.becomes("a", "cold")).memory == 0
    listing = await done(stage.fleet.nats.url, "models", "list")
    assert [line.endswith("0 workers, cold in a pool") for line in listing.splitlines()] == [
        False,
        True,
        True,
    ]
    await stage.ask("a", "first")
    hot = await stage.becomes("a", "hot")
    assert hot.memory == 10
    assert hot.resident > 2**20
    assert hot.worker == "p-a"
    assert (await listed(stage))["a"]


async def test_a_changed_file_is_believed_before_its_base_has_run(stage: Stage, tmp_path: Path) -> None:
    async def shown() -> tuple[bool, int]:
        cards = (await stage.http.get("/v1/models")).json()["data"]
        return next(
            ((card["serving"], card["max_model_len"]) for card in cards if card["id"] == "a"), (False, 0)
        )

    once = await stage.fleet.start("worker", worker__name="once", sim__model="a", sim__context_tokens=100)
    await until(lambda: ready(stage.http))
    once.term()
    assert await once.ended() == 0

    async def remembered() -> bool:
        return await shown() == (False, 100)

    await until(remembered)
    await stage.start(written(tmp_path / "pool.toml", {"a": ONE | {"settings": {"sim.context_tokens": 200}}}))

    async def changed() -> bool:
        return await shown() == (False, 200)

    await until(changed)


async def test_two_bases_take_turns_in_memory_for_one(stage: Stage, tmp_path: Path) -> None:
    await stage.start(written(tmp_path / "pool.toml", {"a": ONE, "b": ONE}))
    await until(lambda: ready(stage.http))
    for turn in range(2):
        for model in ("a", "b"):
            await stage.ask(model, f"turn {turn}")
    # Both under load at once: neither starves, and what waits is served as a group.
    asks = (stage.ask("ab"[n % 2], f"at once {n}", 20) for n in range(40))
    await asyncio.gather(*asks)
    assert all(beat.used <= beat.memory for beat in stage.beats)
    assert not [beat for beat in stage.beats if len([i for i in beat.instances if i.memory]) > 1]


async def test_to_zero_and_back_loses_nothing(stage: Stage, tmp_path: Path) -> None:
    quick = POLICY | {"idle_least": 0.3, "idle_factor": 0.0}
    await stage.start(written(tmp_path / "pool.toml", {"a": ONE}, **quick))
    await until(lambda: ready(stage.http))
    await stage.ask("a", "warm-up")
    await stage.becomes("a", "cold")
    # They come while it starts, while it serves, and while it goes: two answers long, over several lives.
    for burst in range(2):
        await asyncio.gather(*(stage.ask("a", f"{burst} {n}") for n in range(10)))
        await stage.becomes("a", "cold")
    assert await stage.queued("a") == 0


async def test_one_that_sleeps_is_woken_by_a_request(stage: Stage, tmp_path: Path) -> None:
    sleeper = ONE | {"warm_bytes": 2, "sleep_bytes": 8, "settings": {"sim.sleep": True}}
    policy = {"sleep_memory": 8, "idle_factor": 0.0}
    await stage.start(written(tmp_path / "pool.toml", {"a": sleeper, "b": ONE | {"hot_bytes": 8}}, **policy))
    await until(lambda: ready(stage.http))
    await stage.ask("a", "one")
    process = stage.worker("a")
    await stage.ask("b", "two")  # it needs room, and what is left of the sleeper stays
    assert (await stage.becomes("a", "warm")).memory == 2
    await until(lambda: stage.now("b").state == "hot")
    assert not (await listed(stage))["a"]
    await stage.ask("a", "three")
    await stage.becomes("a", "hot")
    assert stage.worker("a").pid == process.pid, "it was woken, not started"
    assert all(beat.used <= beat.memory for beat in stage.beats)


async def test_a_killed_engine_is_started_again_and_its_request_goes_on(stage: Stage, tmp_path: Path) -> None:
    slow = ONE | {"settings": {"sim.ttft_ms": 5, "sim.itl_ms": 20}}
    await stage.start(written(tmp_path / "pool.toml", {"a": slow}))
    await until(lambda: ready(stage.http))
    asking = asyncio.create_task(stage.ask("a", "long", 100))
    await stage.becomes("a", "hot")
    first = stage.worker("a")
    await until(lambda: stage.queued("a"))
    first.kill()
    assert "status -9" in (await stage.becomes("a", "failed")).reason
    await asking
    assert stage.worker("a").pid != first.pid


async def test_an_engine_that_hangs_is_killed_and_its_request_goes_on(stage: Stage, tmp_path: Path) -> None:
    slow = ONE | {"settings": {"sim.ttft_ms": 5, "sim.itl_ms": 20}}
    await stage.start(written(tmp_path / "pool.toml", {"a": slow}, hung_after=1))
    await until(lambda: ready(stage.http))
    asking = asyncio.create_task(stage.ask("a", "long", 100))
    await stage.becomes("a", "hot")
    first = stage.worker("a")
    await until(lambda: stage.queued("a"))
    first.suspend()
    assert "no heartbeat" in (await stage.becomes("a", "failed")).reason
    await asking
    assert stage.worker("a").pid != first.pid


async def test_the_engines_die_with_the_pool_and_what_waits_stays(stage: Stage, tmp_path: Path) -> None:
    slow = ONE | {"settings": {"sim.ttft_ms": 5, "sim.itl_ms": 20}}
    file = written(tmp_path / "pool.toml", {"a": slow, "b": ONE})
    pool = await stage.start(file)
    await until(lambda: ready(stage.http))
    asking = [asyncio.create_task(stage.ask("a", "long", 100))]
    await stage.becomes("a", "hot")
    asking.append(asyncio.create_task(stage.ask("b", "behind")))
    await until(lambda: stage.queued("b"))
    engine = stage.worker("a")
    await pool.kill()
    await until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    assert await stage.queued("a") == 1
    assert await stage.queued("b") == 1
    await stage.start(file)
    await asyncio.gather(*asking)


async def test_a_pool_that_is_stopped_drains_its_engines(stage: Stage, tmp_path: Path) -> None:
    slow = ONE | {"settings": {"sim.ttft_ms": 5, "sim.itl_ms": 20}}
    pool = await stage.start(written(tmp_path / "pool.toml", {"a": slow}))
    await until(lambda: ready(stage.http))
    asking = asyncio.create_task(stage.ask("a", "long", 30))
    await stage.becomes("a", "hot")
    engine = stage.worker("a")

    async def runs() -> bool:
        held = (await stage.broker.delivered("a", each) for each in ServiceClass)
        return any([len(found) async for found in held])

    await until(runs)
    pool.term()
    await asking
    assert await pool.ended() == 0
    assert not engine.is_running()


async def test_a_base_that_another_worker_serves_is_left_to_it(stage: Stage, tmp_path: Path) -> None:
    other = await stage.fleet.start("worker", worker__name="other", sim__model="a")
    await stage.start(written(tmp_path / "pool.toml", {"a": ONE}))
    await until(lambda: ready(stage.http))
    for n in range(5):
        await stage.ask("a", f"theirs {n}")
    assert {beat.instances[0].state for beat in stage.beats} == {"cold"}
    other.term()
    assert await other.ended() == 0
    await stage.ask("a", "ours")
    await stage.becomes("a", "hot")


async def test_commands_start_and_stop_a_base(stage: Stage, tmp_path: Path) -> None:
    pool = await stage.start(written(tmp_path / "pool.toml", {"a": ONE}))
    assert (await stage.tell("start", "a")).ok
    await stage.becomes("a", "hot")
    assert (await stage.tell("stop", "a")).ok
    await stage.becomes("a", "cold")
    unknown = await stage.tell("start", "z")
    assert not unknown.ok
    assert "'z'" in unknown.message
    assert not (await stage.tell("load", "a")).ok
    asleep = await stage.tell("sleep", "a")
    assert not asleep.ok
    assert "cold" in asleep.message
    await stage.tell("wake", "a")
    await stage.becomes("a", "hot")
    assert "can't sleep" in (await stage.tell("sleep", "a")).message
    assert pool.facts["bases"] == ["a"]


async def test_an_engine_that_never_starts_says_why_and_holds_nobody_up(stage: Stage, tmp_path: Path) -> None:
    broken = ONE | {"settings": {"worker.metrics_host": "203.0.113.1"}}
    await stage.start(written(tmp_path / "pool.toml", {"bad": broken, "a": ONE}))
    await until(lambda: ready(stage.http))
    failing = asyncio.create_task(stage.ask("bad", "never"))
    failed = await stage.becomes("bad", "failed")
    assert "its log is" in failed.reason
    await stage.ask("a", "another")
    assert not failing.done()
    failing.cancel()


async def test_the_metrics_of_its_engines_are_told(stage: Stage, tmp_path: Path) -> None:
    pool = await stage.start(written(tmp_path / "pool.toml", {"a": ONE}))
    await stage.tell("start", "a")
    await stage.becomes("a", "hot")
    file = tmp_path / "fleet" / "metrics-p.json"
    group = await until(lambda: file.exists() and json.loads(file.read_text()))
    assert group[0]["labels"] == {"part": "p-a"}
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://{group[0]['targets'][0]}/metrics")).text
        assert "headrace_engine" in text
        text = (await http.get(pool.facts["metrics"])).text
    assert 'headrace_pool_instances{base="a",state="hot"} 1.0' in text
    assert 'headrace_pool_memory_bytes{figure="used"} 10.0' in text


async def test_sigint_reaches_the_engines_through_the_pool_alone(stage: Stage, tmp_path: Path) -> None:
    pool = await stage.start(written(tmp_path / "pool.toml", {"a": ONE}))
    await stage.tell("start", "a")
    await stage.becomes("a", "hot")
    pool.process.send_signal(signal.SIGINT)
    assert await pool.ended() == 0
