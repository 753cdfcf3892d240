"""Workers and schedulers that are killed or hung under running requests, as processes of their own.

What is asked for here are whole answers, so that nothing has reached a caller when a worker is lost. The ack
wait is longer than any test may take, but where it is what is tested: only a leader can hand on before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker import base, client, codec, subjects
from broker.config import BrokerConfig
from broker.messages import Heartbeat, UsageEvent
from tests.integration import command
from tests.integration.fleet import Fleet, Part
from tests.integration.serving import answer, ready
from tests.waiting import LIMIT, until

CHAT = "/v1/chat/completions"
CALLS = 6
LOST_AFTER = 1.0
"""Seconds of silence: a process that waits for its share of a busy machine is not to be taken for dead."""
TOKENS = 40


class Under:
    """A fleet under test. The first worker is so slow that it is lost before it has answered anything, the
    second quick to take over."""

    def __init__(self, fleet: Fleet, http: httpx.AsyncClient, broker: base.Broker, ack_wait: float) -> None:
        self.fleet, self.http, self.broker, self.ack_wait = fleet, http, broker, ack_wait
        self.beats: dict[str, Heartbeat] = {}

    def on_heartbeat(self, message: base.Message) -> None:
        beat = Heartbeat.model_validate_json(message.data)
        self.beats[beat.worker] = beat

    async def start(self, part: str, **settings: object) -> Part:
        if part == "scheduler":
            settings["scheduler__lost_after"] = LOST_AFTER
        return await self.fleet.start(part, broker__ack_wait=self.ack_wait, **settings)

    async def worker(self, name: str, itl_ms: int, **more: object) -> Part:
        made = await self.start("worker", worker__name=name, sim__ttft_ms=20, sim__itl_ms=itl_ms, **more)
        await until(lambda: name in self.beats)
        return made

    async def leader(self) -> Part:
        made = await self.start("scheduler")
        await until(lambda: self.leads(made))
        return made

    async def leads(self, scheduler: Part) -> bool:
        return await self.metric(scheduler, "headrace_leader") == 1

    async def metric(self, part: Part, name: str) -> float:
        lines = (await self.http.get(part.facts["metrics"])).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    async def ask(self, number: int) -> str:
        """One whole answer, checked; the worker that gave it."""
        said = [{"role": "user", "content": f"question {number}"}]
        body: dict[str, Any] = {"model": "sim", "max_tokens": TOKENS, "messages": said}
        response = await self.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        content = response.json()["choices"][0]["message"]["content"]
        assert content == answer(f"question {number}", TOKENS)
        return response.headers["x-headrace-worker"]

    async def heard(self, epoch: int, request_id: str) -> None:
        """Until the journal has a word of that attempt."""

        async def said() -> bool:
            records = await self.broker.read(subjects.REPLIES, subjects.replies_to("anonymous", request_id))
            return epoch in {codec.decode(record.data).epoch for record in records}

        await until(said)

    def asks(self, first: int) -> list[asyncio.Task[str]]:
        return [asyncio.create_task(self.ask(first + number)) for number in range(CALLS)]

    async def running(self, worker: str) -> list[asyncio.Task[str]]:
        """Requests that `worker` runs, all of them announced."""
        calls = self.asks(0)
        await until(lambda: self.beats[worker].credit.running == CALLS and self.beats[worker].told > 0)
        return calls

    async def settled(self) -> list[UsageEvent]:
        """The usage events, once the queue is empty."""

        async def empty() -> bool:
            return not await self.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)

        await until(empty)
        records = await self.broker.read(subjects.USAGE, subjects.ALL_USAGE)
        return [UsageEvent.model_validate_json(record.data) for record in records]


@contextlib.asynccontextmanager
async def under(path: Path, ack_wait: float = 300.0, itl_ms: int = 500) -> AsyncIterator[tuple[Under, Part]]:
    """The fleet, and the slow worker `w1`."""
    async with Fleet(path) as fleet:
        config = BrokerConfig(url=fleet.nats.url, ack_wait=ack_wait)
        ingress = await fleet.start("ingress", broker__ack_wait=ack_wait)
        async with (
            await client.connect(config, "test") as broker,
            httpx.AsyncClient(base_url=ingress.url, timeout=LIMIT, trust_env=False) as http,
        ):
            made = Under(fleet, http, broker, ack_wait)
            await broker.subscribe(subjects.ALL_HEARTBEATS, made.on_heartbeat)
            slow = await made.worker("w1", itl_ms)
            await until(lambda: ready(http))
            yield made, slow


async def test_a_killed_workers_requests_are_answered_by_another(tmp_path: Path) -> None:
    async with under(tmp_path) as (fleet, slow):
        scheduler = await fleet.leader()
        calls = await fleet.running("w1")
        await fleet.worker("w2", 5)
        await slow.kill()
        assert await asyncio.gather(*calls) == ["w2"] * CALLS
        events = await fleet.settled()
        assert [(e.outcome, e.worker, e.epoch) for e in events] == [("finished", "w2", 2)] * CALLS
        assert await fleet.metric(scheduler, "headrace_handed_on_total") == CALLS
        assert await fleet.metric(scheduler, "headrace_workers_lost_total") == 1


async def test_a_request_that_kills_its_workers_is_buried_and_the_fleet_lives_on(tmp_path: Path) -> None:
    async with under(tmp_path) as (fleet, slow):
        await fleet.leader()
        body = {"model": "sim", "max_tokens": TOKENS, "messages": [{"role": "user", "content": "poison"}]}
        call = asyncio.create_task(fleet.http.post(CHAT, json=body, headers={"X-Request-Id": "poison"}))
        victim = slow
        for epoch, heir in enumerate(("w2", "w3"), 1):
            await fleet.heard(epoch, "poison")  # else it counts as no death
            successor = await fleet.worker(heir, 500, worker__max_deaths=2)
            await victim.kill()
            victim = successor
        response = await call
        assert (response.status_code, response.json()["error"]["code"]) == (500, "poisoned")
        code, out, _ = await command.run("dead", fleet.fleet.nats.url, "list")
        assert code == 0
        assert "poisoned" in out
        await fleet.worker("w4", 5)
        assert await fleet.ask(1) in ("w3", "w4")


@pytest.mark.parametrize("together", [False, True])
async def test_a_killed_leader_is_replaced_and_a_killed_workers_requests_are_handed_on(
    tmp_path: Path, together: bool
) -> None:
    """Also where the two die at once: the standby knew what the worker held."""
    async with under(tmp_path) as (fleet, slow):
        leader = await fleet.leader()
        standby = await fleet.start("scheduler")
        calls = await fleet.running("w1")
        await fleet.worker("w2", 5)
        assert not await fleet.leads(standby)
        await leader.kill()
        if not together:
            await until(lambda: fleet.leads(standby))
        await slow.kill()
        assert await asyncio.gather(*calls) == ["w2"] * CALLS
        assert await fleet.metric(standby, "headrace_handed_on_total") == CALLS
        assert len(await fleet.settled()) == CALLS


async def test_a_leader_that_ends_hands_the_lead_over(tmp_path: Path) -> None:
    async with under(tmp_path) as (fleet, _):
        leader = await fleet.start("scheduler", scheduler__lease=300)
        await until(lambda: fleet.leads(leader))
        standby = await fleet.start("scheduler", scheduler__lease=1)
        leader.term()
        assert await leader.ended() == 0
        await until(lambda: fleet.leads(standby))


async def test_without_a_scheduler_the_ack_wait_hands_on(tmp_path: Path) -> None:
    async with under(tmp_path, ack_wait=1.0) as (fleet, slow):
        calls = await fleet.running("w1")
        await fleet.worker("w2", 5)
        await slow.kill()
        assert await asyncio.gather(*calls) == ["w2"] * CALLS
        assert len(await fleet.settled()) == CALLS


async def test_a_hung_workers_requests_are_answered_once_though_it_wakes_up(tmp_path: Path) -> None:
    async with under(tmp_path, itl_ms=250) as (fleet, slow):
        scheduler = await fleet.leader()
        calls = await fleet.running("w1")
        quick = await fleet.worker("w2", 5)
        slow.stop()
        # Its pulls stand on: some of these go to it, before and after it counts as lost.
        calls += fleet.asks(CALLS)
        assert await asyncio.gather(*calls) == ["w2"] * len(calls)
        assert await asyncio.gather(*fleet.asks(2 * CALLS)) == ["w2"] * CALLS
        assert await fleet.metric(scheduler, "headrace_handed_on_total") == CALLS
        asleep = fleet.beats["w1"].seq
        slow.resume()
        await until(lambda: fleet.beats["w1"].seq > asleep and fleet.beats["w1"].credit.running == 0)
        events = await fleet.settled()
        assert len({event.request_id for event in events}) == len(events) == 3 * CALLS
        # It is a worker like any other again.
        await quick.kill()
        assert await fleet.ask(99) == "w1"
