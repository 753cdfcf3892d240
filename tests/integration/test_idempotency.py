"""`Idempotency-Key`: a request that is repeated, at any ingress, runs once and answers each time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker import base, client, subjects
from broker.config import BrokerConfig
from broker.server import NatsServer
from tests.integration.fleet import Fleet
from tests.integration.reading import CHAT, Reader, chat, connected, where
from tests.integration.serving import answer, ready, register, worker
from tests.waiting import until


@pytest.fixture(scope="module")
async def config(
    anyio_backend: object, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[BrokerConfig]:
    """Its queue forgets ids at once: what a test does after that, it does without the deduplication."""
    async with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield BrokerConfig(url=server.url, dedup_window=1.0)


@pytest.fixture(scope="module")
async def broker(config: BrokerConfig) -> AsyncIterator[base.Broker]:
    async with await client.connect(config, "test") as connected:
        await register(connected, "lone")
        yield connected


def keyed(key: str, **more: str) -> dict[str, str]:
    """Headers, with a tenant of the key's own."""
    return {"Idempotency-Key": key, "X-Headrace-Tenant": key.replace(" ", "-"), **more}


async def usage(broker: base.Broker, tenant: str, model: str = "sim") -> list[dict[str, Any]]:
    """The events of all that was run for a tenant, once there is one."""

    async def told() -> list[base.Record]:
        return await broker.read(subjects.USAGE, subjects.usage(tenant, model))

    return [json.loads(record.data) for record in await until(told)]


async def queued(broker: base.Broker, tenant: str) -> int:
    counts = await broker.counts(subjects.REQUESTS, f"req.*.*.{subjects.token(tenant)}.*")
    return sum(counts.values())


async def noted(broker: base.Broker, tenant: str) -> bool:
    return bool(await broker.read(subjects.REPLIES, f"out.{subjects.token(tenant)}.*.*"))


async def forgets_ids(broker: base.Broker, config: BrokerConfig) -> None:
    """Until an id that was used before this call counts as new."""
    head = {subjects.MSG_ID: "t:probe"}
    subject = "req.probe.standard.t.probe"
    first = await (await broker.enqueue(subject, b"", head))

    async def new() -> bool:
        stored = await (await broker.enqueue(subject, b"", head))
        await broker.delete(subjects.REQUESTS, stored.seq)
        return stored.seq != first.seq

    await until(new)


@pytest.mark.parametrize("at", [0, 1])
async def test_a_key_runs_once_and_answers_each_time(
    https: list[httpx.AsyncClient], broker: base.Broker, at: int
) -> None:
    """The second comes while the first runs, at the same ingress or another; the third when it has ended."""
    key, body = f"once-{at}", chat("once", 60)
    first, second, third = Reader(), Reader(), Reader()
    asking = asyncio.create_task(first.read(https[0], "POST", CHAT, json=body, headers=keyed(key)))
    await until(lambda: len(first.data) > 5)
    response = await second.read(https[at], "POST", CHAT, json=body, headers=keyed(key))
    assert (await asking).headers["x-request-id"] == response.headers["x-request-id"]
    await third.read(https[1], "POST", CHAT, json=body, headers=keyed(key))
    for reader in (first, second, third):
        assert reader.text == answer("once", 60)
        assert reader.last == first.last
    assert [event["outcome"] for event in await usage(broker, key)] == ["finished"]


@pytest.mark.parametrize("stream", [True, False])
async def test_all_who_ask_at_the_same_instant_get_one_run(
    https: list[httpx.AsyncClient], broker: base.Broker, stream: bool
) -> None:
    key, body = f"instant-{stream}", chat("instant", 20, stream=stream)
    asked = [https[n % 2].post(CHAT, json=body, headers=keyed(key)) for n in range(16)]
    first, *others = await asyncio.gather(*asked)
    assert first.status_code == 200
    for other in others:
        # Comments may come between the events of a stream, by when each began to wait.
        assert _events(other.content) == _events(first.content)
    assert len(await usage(broker, key)) == 1


def _events(body: bytes) -> list[bytes]:
    lines = [line for line in body.split(b"\n") if not line.startswith(b":")]
    return [block for block in b"\n".join(lines).split(b"\n\n") if block.strip()]


async def test_an_answer_in_one_piece_comes_again(https: list[httpx.AsyncClient]) -> None:
    body = chat("whole", 5, stream=False)
    responses = [await http.post(CHAT, json=body, headers=keyed("whole")) for http in (*https, *https)]
    assert responses[0].json()["choices"][0]["message"]["content"] == answer("whole", 5)
    for response in responses:
        assert (response.status_code, response.content) == (200, responses[0].content)
        assert response.headers["content-type"] == "application/json"


async def test_a_refusal_comes_again(https: list[httpx.AsyncClient]) -> None:
    responses = [
        await http.post(CHAT, json=chat("x", -1, stream=False), headers=keyed("refused")) for http in https
    ]
    assert [response.status_code for response in responses] == [400, 400]
    assert responses[0].json() == responses[1].json()


async def test_a_stream_goes_on_where_it_was_left(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    """It needs no X-Detach: who sends a key means to come again."""
    reader, body = Reader(), chat("again", 80)
    await reader.read(https[0], "POST", CHAT, 9, json=body, headers=keyed("again"))
    for stay in (20, 35):
        head = keyed("again", **{"Last-Event-ID": reader.last})
        await reader.read(https[stay % 2], "POST", CHAT, stay, json=body, headers=head)
    head = keyed("again", **{"Last-Event-ID": reader.last})
    await reader.read(https[0], "POST", CHAT, json=body, headers=head)
    assert reader.text == answer("again", 80)
    assert [event["outcome"] for event in await usage(broker, "again")] == ["finished"]


async def test_a_queued_key_is_waited_for_also_when_the_queue_forgot_its_id(
    https: list[httpx.AsyncClient], config: BrokerConfig, broker: base.Broker
) -> None:
    body, readers = chat("patient", 5, model="lone"), [Reader() for _ in range(3)]

    def ask(n: int) -> asyncio.Task[httpx.Response]:
        head = keyed("patient")
        return asyncio.create_task(readers[n].read(https[n % 2], "POST", CHAT, json=body, headers=head))

    asking = [ask(0)]
    await until(lambda: noted(broker, "patient"))
    asking.append(ask(1))
    await forgets_ids(broker, config)
    asking.append(ask(2))
    other = await https[1].post(CHAT, json=chat("other", 5, model="lone"), headers=keyed("patient"))
    assert other.status_code == 422
    async with worker(config, model="lone"):
        await asyncio.gather(*asking)
    for reader in readers:
        assert reader.text == answer("patient", 5)
    assert len(await usage(broker, "patient", "lone")) == 1


async def test_an_ended_key_answers_also_when_the_queue_forgot_its_id(
    https: list[httpx.AsyncClient], config: BrokerConfig, broker: base.Broker
) -> None:
    body = chat("late", 5, stream=False)
    first = await https[0].post(CHAT, json=body, headers=keyed("late"))
    await forgets_ids(broker, config)
    assert (await https[1].post(CHAT, json=body, headers=keyed("late"))).content == first.content
    assert len(await usage(broker, "late")) == 1


async def test_one_key_for_two_requests_is_refused(https: list[httpx.AsyncClient]) -> None:
    """While the first is queued, while it runs, and when it has ended; at its ingress and the other."""
    head, reader, body = keyed("two"), Reader(), chat("one", 60)
    asking = asyncio.create_task(reader.read(https[0], "POST", CHAT, json=body, headers=head))
    others = [
        (CHAT, chat("two", 60)),
        (CHAT, chat("one", 60, stream=False)),
        ("/v1/messages", body),
    ]
    await until(lambda: reader.data)
    for ended in (False, True):
        for http in https:
            for path, other in others:
                response = await http.post(path, json=other, headers=head)
                assert response.status_code == 422, response.text
                assert response.json()["error"]["code"] == "idempotency_key_reused"
                assert response.json()["error"]["type"] == "invalid_request_error"
        assert asking.done() is ended
        await asking
    assert reader.text == answer("one", 60)


async def test_two_requests_under_one_key_at_the_same_instant(https: list[httpx.AsyncClient]) -> None:
    bodies = [chat(f"body {n % 2}", 20, stream=False) for n in range(8)]
    asked = [
        https[n // 2 % 2].post(CHAT, json=body, headers=keyed("at once")) for n, body in enumerate(bodies)
    ]
    responses = await asyncio.gather(*asked)
    statuses = [response.status_code for response in responses]
    assert sorted(statuses) == [200] * 4 + [422] * 4
    (which,) = {n % 2 for n, status in enumerate(statuses) if status == 200}
    for n in range(which, 8, 2):
        text = responses[n].json()["choices"][0]["message"]["content"]
        assert text == answer(f"body {which}", 20)


async def test_a_key_is_its_tenants_own(https: list[httpx.AsyncClient]) -> None:
    for tenant in ("t1", "t2"):
        head = {"Idempotency-Key": "shared", "X-Headrace-Tenant": tenant}
        response = await https[0].post(CHAT, json=chat(tenant, 5, stream=False), headers=head)
        assert response.json()["choices"][0]["message"]["content"] == answer(tenant, 5)


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tulator", "caf\u00e9"])
async def test_a_key_that_cannot_be_used_is_refused(https: list[httpx.AsyncClient], key: str) -> None:
    head = {"Idempotency-Key": key.encode("latin-1")}
    response = await https[0].post(CHAT, json=chat("x", 1), headers=head)  # type: ignore[arg-type]
    assert response.status_code == 400
    assert "Idempotency-Key" in response.json()["error"]["message"]


async def test_the_longest_key(https: list[httpx.AsyncClient]) -> None:
    head = {"Idempotency-Key": '~ "' + "x" * 252}
    response = await https[0].post(CHAT, json=chat("x", 1, stream=False), headers=head)
    assert response.status_code == 200


async def test_a_bad_event_id_is_refused_before_anything_is_queued(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    head = keyed("bad-id", **{"Last-Event-ID": "seventeen"})
    response = await https[0].post(CHAT, json=chat("x", 1), headers=head)
    assert response.status_code == 400
    assert "Last-Event-ID" in response.json()["error"]["message"]
    assert not await broker.read(subjects.REPLIES, "out.bad-id.*.*")


async def test_the_rest_of_a_reply_that_is_gone_is_not_run_anew(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    """Another run's tokens would not go on from those that the client has."""
    head = keyed("gone", **{"Last-Event-ID": "1-3-0"})
    response = await https[0].post(CHAT, json=chat("x", 1), headers=head)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    assert not await broker.read(subjects.REPLIES, "out.gone.*.*")


async def test_who_follows_a_queued_request_is_told_of_its_cancel(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    """The first asked not to be detached, and left; one repeats it, one reads it by its id."""
    body = chat("left", 5, model="lone")
    leaving = asyncio.create_task(
        https[0].post(CHAT, json=body, headers=keyed("left", **{"X-Detach": "false"}))
    )
    await until(lambda: noted(broker, "left"))
    (note,) = await broker.read(subjects.REPLIES, "out.left.*.*")
    request_id = subjects.name(note.subject.rpartition(".")[2])
    again = Reader()
    following = [
        asyncio.create_task(again.read(https[1], "POST", CHAT, json=body, headers=keyed("left"))),
        asyncio.create_task(https[1].get(where(request_id), headers={"X-Headrace-Tenant": "left"})),
    ]
    await until(lambda: again.comments)
    leaving.cancel()
    _, read = await asyncio.gather(*following)
    assert json.loads(again.data[-1])["error"]["code"] == "cancelled"
    assert read.json()["error"]["code"] == "cancelled"
    assert await queued(broker, "left") == 0
    assert [event["outcome"] for event in await usage(broker, "left", "lone")] == ["cancelled"]


async def test_who_follows_a_queued_request_is_told_of_its_deadline(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    body = chat("late", 5, model="lone", stream=False)
    head = keyed("overdue", **{"X-Headrace-Timeout": "1"})
    first = asyncio.create_task(https[0].post(CHAT, json=body, headers=head))
    await until(lambda: noted(broker, "overdue"))
    second = await https[1].post(CHAT, json=body, headers=keyed("overdue"))
    assert (await first).status_code == second.status_code == 504
    assert second.json()["error"]["code"] == "deadline_exceeded"
    third = await https[1].post(CHAT, json=body, headers=keyed("overdue"))
    assert third.status_code == 504
    assert await queued(broker, "overdue") == 0


async def test_a_stream_survives_its_ingress(tmp_path: Path) -> None:
    """SIGKILL to the ingress that had the client: the same POST at the other goes on at the next event."""
    async with Fleet(tmp_path / "fleet") as fleet:
        dying, other, _ = await asyncio.gather(
            fleet.start("ingress"),
            fleet.start("ingress"),
            fleet.start("worker", sim__ttft_ms=5, sim__itl_ms=10),
        )
        async with connected(dying.url) as http, connected(other.url) as elsewhere:
            await until(lambda: ready(http))
            await until(lambda: ready(elsewhere))
            reader, body, head = Reader(), chat("killed", 100), {"Idempotency-Key": "killed"}
            asking = asyncio.create_task(reader.read(http, "POST", CHAT, json=body, headers=head))
            await until(lambda: len(reader.data) > 10)
            await dying.kill()
            with pytest.raises(httpx.TransportError):
                await asking
            whole = Reader()
            await reader.read(
                elsewhere, "POST", CHAT, json=body, headers=head | {"Last-Event-ID": reader.last}
            )
            await whole.read(elsewhere, "POST", CHAT, json=body, headers=head)
            assert reader.text == whole.text == answer("killed", 100)
            async with await client.connect(BrokerConfig(url=fleet.nats.url), "test") as broker:
                assert [event["outcome"] for event in await usage(broker, "anonymous")] == ["finished"]


async def test_a_queued_request_survives_its_ingress(tmp_path: Path) -> None:
    """Killed before any worker came: whoever repeats it, or reads it by its id, has the answer of one run."""
    async with Fleet(tmp_path / "fleet") as fleet:
        dying, other = await asyncio.gather(fleet.start("ingress"), fleet.start("ingress"))
        config = BrokerConfig(url=fleet.nats.url)
        async with (
            connected(dying.url) as http,
            connected(other.url) as elsewhere,
            await client.connect(config, "test") as broker,
        ):
            await register(broker, "sim")
            body, head = chat("killed", 30), {"Idempotency-Key": "killed"}
            await until(lambda: _known(http))
            asking = asyncio.create_task(http.post(CHAT, json=body, headers=head))
            await until(lambda: noted(broker, "anonymous"))
            await dying.kill()
            with pytest.raises(httpx.TransportError):
                await asking
            reader, by_id = Reader(), Reader()
            (note,) = await broker.read(subjects.REPLIES, subjects.ALL_REPLIES)
            both = asyncio.gather(
                reader.read(elsewhere, "POST", CHAT, json=body, headers=head),
                by_id.read(elsewhere, "GET", where(note.subject.rpartition(".")[2])),
            )
            async with worker(config, model="sim"):
                await both
            assert reader.text == by_id.text == answer("killed", 30)
            assert len(await usage(broker, "anonymous")) == 1


async def _known(http: httpx.AsyncClient) -> bool:
    return bool((await http.get("/v1/models")).json()["data"])
