"""Requests and answers larger than a message, on a nats-server that carries 1 MiB in one, its default."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nats
import orjson
import pytest

from broker import base, client, codec, objects, subjects
from broker.config import BrokerConfig
from broker.messages import TERMINAL, Frame, FrameKind
from broker.server import NatsServer
from tests.integration.fleet import Fleet
from tests.integration.serving import answer, ingress, ready, register, streaming, worker
from tests.waiting import LIMIT, until

CHAT = "/v1/chat/completions"
MESSAGE = 2**20
LONG = {"context_tokens": 2**20, "kv_blocks": 2**16}
STORE = subjects.objects(subjects.PAYLOADS)
SUBJECT = "req.sim.standard.acme.sim"


@pytest.fixture
async def server(anyio_backend: object, tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path / "nats", sync_always=False, max_payload=MESSAGE) as made:
        yield made


@pytest.fixture
async def config(server: NatsServer) -> BrokerConfig:
    return BrokerConfig(url=server.url)


@pytest.fixture
async def broker(config: BrokerConfig) -> AsyncIterator[base.Broker]:
    async with await client.connect(config, "test") as connected:
        yield connected


def connected(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False)


def prompt(seed: str = "a", size: int = 3_000_000) -> str:
    """Every part of it is another: chunks out of place, lost or doubled would change the answer."""
    return "".join(f"{seed}{n:07d}" for n in range(size // 8))


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "sim", "max_tokens": 8, "messages": [{"role": "user", "content": content}]} | more


def text(body: bytes) -> str:
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]", body[-200:]
    chunks = [orjson.loads(line) for line in lines]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def kept(broker: base.Broker) -> int:
    """Messages of the object store."""
    return sum((await broker.counts(STORE, subjects.all_objects(subjects.PAYLOADS))).values())


async def queued(broker: base.Broker) -> int:
    return sum((await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).values())


async def cleared(broker: base.Broker) -> bool:
    return not await kept(broker) and not await queued(broker)


async def waits(broker: base.Broker) -> bool:
    """A request is in the queue, and its body in the store."""
    return await queued(broker) == 1 and await kept(broker) > 1


async def lists(http: httpx.AsyncClient, model: str) -> bool:
    return model in {card["id"] for card in (await http.get("/v1/models")).json()["data"]}


async def test_a_3_mb_prompt_streams_its_answer_and_leaves_nothing(
    config: BrokerConfig, broker: base.Broker
) -> None:
    written: list[base.Message] = []
    asked: list[base.Message] = []
    await broker.subscribe(subjects.all_objects(subjects.PAYLOADS), written.append)
    await broker.subscribe(subjects.ALL_REQUESTS, asked.append)
    async with ingress(config) as url, worker(config, **LONG), connected(url) as http:
        await until(partial(ready, http))
        prompts = [prompt(seed) for seed in "ab"]
        replies = await asyncio.gather(*(http.post(CHAT, json=chat(p, stream=True)) for p in prompts))
        for reply, given in zip(replies, prompts, strict=True):
            assert reply.status_code == 200
            assert text(reply.content) == answer(given, 8)
        await until(partial(cleared, broker))
    assert sum(len(message.data) for message in written) > 6_000_000
    assert [message.data for message in asked] == [b"", b""]
    assert all((message.headers or {})["Body-Object"].startswith("anonymous.") for message in asked)


async def test_a_small_prompt_does_not_touch_the_store(config: BrokerConfig, broker: base.Broker) -> None:
    written: list[base.Message] = []
    await broker.subscribe(subjects.all_objects(subjects.PAYLOADS), written.append)
    async with ingress(config) as url, worker(config, **LONG), connected(url) as http:
        await until(partial(ready, http))
        given = prompt(size=1_000_000)
        reply = await http.post(CHAT, json=chat(given))
        assert reply.json()["choices"][0]["message"]["content"] == answer(given, 8)
    assert written == []


async def test_a_worker_killed_under_a_large_prompt_is_replaced(
    anyio_backend: object, tmp_path: Path
) -> None:
    """The redelivered request finds its body; only the answer takes it away."""
    settings = {f"sim__{name}": value for name, value in LONG.items()} | {"broker__ack_wait": 0.5}
    fleet = Fleet(tmp_path / "fleet")
    fleet.nats.max_payload = MESSAGE
    async with fleet, await client.connect(BrokerConfig(url=fleet.nats.url, ack_wait=0.5), "test") as broker:
        front, doomed = await asyncio.gather(
            fleet.start("ingress", broker__ack_wait=0.5),
            fleet.start("worker", sim__ttft_ms=600_000, sim__itl_ms=1, **settings),
        )
        taken: list[Frame] = []
        await broker.subscribe("out.>", lambda message: taken.append(codec.decode(message.data)))
        async with connected(front.url) as http:
            await until(partial(ready, http))
            given = prompt()
            asking = asyncio.create_task(http.post(CHAT, json=chat(given)))
            await until(lambda: taken)  # its beat
            await doomed.kill()
            assert await waits(broker)
            await fleet.start("worker", sim__ttft_ms=1, sim__itl_ms=1, **settings)
            reply = await asking
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] == answer(given, 8)
        assert max(frame.epoch for frame in taken) > 1
        await until(partial(cleared, broker))


@pytest.mark.parametrize("ends", ["the client goes", "the deadline passes"])
async def test_a_request_that_ends_in_the_queue_takes_its_body_along(
    config: BrokerConfig, broker: base.Broker, ends: str
) -> None:
    await register(broker, "lone")
    async with ingress(config, keepalive=0.05) as url, connected(url) as http:
        await until(partial(lists, http, "lone"))
        body = chat(prompt(), model="lone", stream=True)
        timeout = {"X-Headrace-Timeout": "60" if ends == "the client goes" else "2"}
        async with streaming(http, body, timeout) as (_, parts):
            if ends == "the client goes":
                assert await waits(broker)
            else:
                assert b"deadline_exceeded" in b"".join([part async for part in parts])
        await until(partial(cleared, broker))


async def test_a_client_that_goes_in_the_run_takes_its_body_along(
    config: BrokerConfig, broker: base.Broker
) -> None:
    async with ingress(config) as url, worker(config, itl_ms=100, **LONG) as engine, connected(url) as http:
        await until(partial(ready, http))
        async with streaming(http, chat(prompt(), max_tokens=100_000, stream=True)):
            assert engine.stats().running == 1
        await until(partial(cleared, broker))
        await until(lambda: not engine.stats().running)


async def test_a_full_store_is_told_and_nothing_is_queued(server: NatsServer) -> None:
    small = BrokerConfig(url=server.url, payload_bytes=4 * MESSAGE)
    async with await client.connect(small, "test") as broker, ingress(small) as url, connected(url) as http:
        await register(broker, "sim")
        await until(partial(lists, http, "sim"))
        await objects.put(broker, subjects.PAYLOADS, "else.1", b"x" * 2 * MESSAGE)
        before = await kept(broker)
        reply = await http.post(CHAT, json=chat(prompt()))
        assert reply.status_code == 429, reply.text
        assert reply.headers["retry-after"] == "5"
        assert reply.json()["error"]["code"] == "overloaded"
        assert "store for bodies of more than 1,043,456 bytes is full" in reply.json()["error"]["message"]
        assert (await queued(broker), await kept(broker)) == (0, before)


async def test_more_large_bodies_than_places_are_all_answered(
    config: BrokerConfig, broker: base.Broker
) -> None:
    async with ingress(config, max_large=1) as url, worker(config, **LONG) as _, connected(url) as http:
        await until(partial(ready, http))
        prompts = [prompt(seed, 1_200_000) for seed in "abcd"]
        replies = await asyncio.gather(*(http.post(CHAT, json=chat(p)) for p in prompts))
        contents = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
        assert contents == [answer(p, 8) for p in prompts]
        await until(partial(cleared, broker))


async def test_a_whole_answer_larger_than_a_message_comes_whole(
    anyio_backend: object, tmp_path: Path
) -> None:
    tokens = 4000
    async with NatsServer(tmp_path / "narrow", sync_always=False, max_payload=2**16) as server:
        config = BrokerConfig(url=server.url)
        async with ingress(config) as url, worker(config, itl_ms=0.01) as _, connected(url) as http:
            await until(partial(ready, http))
            reply = await http.post(CHAT, json=chat("hello", max_tokens=tokens, return_token_ids=True))
            assert reply.status_code == 200, reply.text[:500]
            assert len(reply.content) > 2**16
            assert reply.json()["choices"][0]["message"]["content"] == answer("hello", tokens)
            assert len(reply.json()["choices"][0]["token_ids"]) == tokens


# Direct publishers


async def direct(broker: base.Broker, url: str, name: str, headers: dict[str, str] | None = None) -> Frame:
    """Publish, as any NATS client may, a request whose body is the object `name`; its last frame."""
    connection = await nats.connect(url)
    try:
        replies = await connection.subscribe("out.acme.shell.r1")
        head = {
            "Nats-Msg-Id": "acme:r1",
            "Reply-To": "out.acme.shell.r1",
            "Path": CHAT,
            "Body-Object": name,
        }
        await connection.jetstream().publish(SUBJECT, b"", headers=head | (headers or {}))
        while (frame := codec.decode((await replies.next_msg(LIMIT)).data)).kind not in TERMINAL:
            continue
        return frame
    finally:
        await connection.close()


async def test_a_direct_publisher_stores_its_body_with_its_own_client(
    server: NatsServer, config: BrokerConfig, broker: base.Broker
) -> None:
    given = prompt()
    connection = await nats.connect(server.url)
    store = await connection.jetstream().object_store("payloads")
    await store.put("acme.r1", orjson.dumps(chat(given)))
    await connection.close()
    async with worker(config, **LONG):
        frame = await direct(broker, server.url, "acme.r1")
        assert frame.kind is FrameKind.END
        assert frame.extra["usage"]["prompt_tokens"] >= 3_000_000 / 4
        said = await broker.read(subjects.REPLIES, "out.acme.shell.r1")
        body = b"".join(codec.decode(record.data).payload for record in said)
        assert orjson.loads(body)["choices"][0]["message"]["content"] == answer(given, 8)
        await until(partial(cleared, broker))


async def test_our_objects_are_those_of_every_nats_client(server: NatsServer, broker: base.Broker) -> None:
    data = prompt().encode()
    await objects.put(broker, subjects.PAYLOADS, "acme.r1", data)
    connection = await nats.connect(server.url)
    store = await connection.jetstream().object_store("payloads")
    assert (await store.get("acme.r1")).data == data  # which checks the digest
    await store.delete("acme.r1")
    await connection.close()
    with pytest.raises(objects.Missing):
        await objects.get(broker, subjects.PAYLOADS, "acme.r1", len(data))


async def test_a_body_that_is_not_there_is_told_and_the_next_request_runs(
    server: NatsServer, config: BrokerConfig, broker: base.Broker
) -> None:
    async with worker(config, **LONG):
        frame = await direct(broker, server.url, "acme.nowhere")
        assert (frame.kind, frame.extra["code"]) == (FrameKind.ERROR, "body_lost")
        assert b"there is no object 'acme.nowhere'" in frame.payload
        await until(partial(cleared, broker))
        await objects.put(broker, subjects.PAYLOADS, "acme.r2", orjson.dumps(chat("hello")))
        again = {"Nats-Msg-Id": "acme:r2"}
        assert (await direct(broker, server.url, "acme.r2", again)).kind is FrameKind.END


async def test_nobody_may_name_another_tenants_body(
    server: NatsServer, config: BrokerConfig, broker: base.Broker
) -> None:
    await objects.put(broker, subjects.PAYLOADS, "other.r1", orjson.dumps(chat("secret")))
    before = await kept(broker)
    async with worker(config, **LONG):
        frame = await direct(broker, server.url, "other.r1")
        assert (frame.kind, frame.extra["code"]) == (FrameKind.ERROR, "malformed_message")

        async def dead() -> bool:
            return bool(await broker.read(subjects.DEAD, subjects.ALL_DEAD))

        await until(dead)
        assert await kept(broker) == before


async def test_a_deadline_that_passed_takes_the_body_along(
    server: NatsServer, config: BrokerConfig, broker: base.Broker
) -> None:
    """At the worker that meets it."""
    await objects.put(broker, subjects.PAYLOADS, "acme.r1", orjson.dumps(chat("late")))
    async with worker(config, **LONG):
        passed = {"Deadline": str(int(time.time() * 1000) - 1)}
        frame = await direct(broker, server.url, "acme.r1", passed)
        assert frame.extra["code"] == "deadline_exceeded"
        await until(partial(cleared, broker))
