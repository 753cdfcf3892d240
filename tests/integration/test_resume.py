"""A reply read on at another ingress, by whoever comes back: nothing missing, nothing twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from broker import base, codec, subjects
from broker.config import BrokerConfig
from broker.messages import Frame, FrameKind
from tests.integration.fleet import Fleet
from tests.integration.reading import CHAT, Reader, chat, connected, where
from tests.integration.serving import answer, ingress, ready
from tests.waiting import until


@pytest.mark.parametrize("events", [1, 7, 30])
async def test_a_detached_stream_goes_on_where_it_was_left(
    https: list[httpx.AsyncClient], events: int
) -> None:
    reader = Reader()
    head = {"X-Detach": "true", "X-Request-Id": f"left-{events}"}
    await reader.read(https[0], "POST", CHAT, events, json=chat("left", 60), headers=head)
    assert len(reader.data) < 60
    response = await reader.resume(https[1], f"left-{events}")
    assert reader.text == answer("left", 60)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-request-id"] == f"left-{events}"


async def test_a_reader_may_leave_again_and_again(https: list[httpx.AsyncClient]) -> None:
    reader = Reader()
    head = {"X-Detach": "true", "X-Request-Id": "restless"}
    await reader.read(https[0], "POST", CHAT, 3, json=chat("restless", 50), headers=head)
    for stay in range(8, 48, 5):
        await reader.resume(https[stay % 2], "restless", until_events=stay)
    await reader.resume(https[0], "restless")
    assert reader.text == answer("restless", 50)


async def test_several_readers_follow_one_stream(https: list[httpx.AsyncClient]) -> None:
    first, *others = [Reader() for _ in range(4)]
    head = {"X-Request-Id": "watched"}
    asking = asyncio.create_task(first.read(https[0], "POST", CHAT, json=chat("watched", 80), headers=head))
    await until(lambda: len(first.data) > 5)
    await asyncio.gather(*(other.resume(https[n % 2], "watched") for n, other in enumerate(others)))
    await asking
    for reader in (first, *others):
        assert reader.text == answer("watched", 80)
        assert reader.last == first.last


async def test_an_answer_in_one_piece_is_fetched_again(https: list[httpx.AsyncClient]) -> None:
    head = {"X-Request-Id": "whole"}
    response = await https[0].post(CHAT, json=chat("whole", 5, stream=False), headers=head)
    again = await https[1].get(where("whole"))
    assert again.status_code == 200
    assert again.content == response.content
    assert again.headers["content-type"] == response.headers["content-type"]


async def test_an_answer_in_one_piece_is_waited_for(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    head = {"X-Request-Id": "awaited"}
    asking = asyncio.create_task(https[0].post(CHAT, json=chat("awaited", 80, stream=False), headers=head))

    async def taken() -> bool:
        return bool(await broker.read(subjects.REPLIES, subjects.replies_to("anonymous", "awaited")))

    await until(taken)
    again = await https[1].get(where("awaited"))
    assert again.headers["content-type"] == "application/json"
    assert again.content == (await asking).content


async def test_a_refusal_is_fetched_again(https: list[httpx.AsyncClient], broker: base.Broker) -> None:
    head = {"X-Request-Id": "refused"}
    response = await https[0].post(CHAT, json=chat("refused", -1, stream=False), headers=head)
    # The answer is here as soon as it is said, which the journal may hear of later.
    await until(lambda: broker.last(subjects.REPLIES, subjects.replies_to("anonymous", "refused")))
    again = await https[1].get(where("refused"))
    assert again.status_code == response.status_code == 400
    assert again.json() == response.json()


async def test_a_detached_request_is_not_cancelled(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    for request_id, detach, outcome in (("stays", "true", "finished"), ("goes", "false", "cancelled")):
        head = {"X-Detach": detach, "X-Request-Id": request_id, "X-Headrace-Tenant": request_id}
        await Reader().read(https[0], "POST", CHAT, 2, json=chat("detach", 40), headers=head)
        assert await _outcome(broker, request_id) == outcome


async def _outcome(broker: base.Broker, tenant: str) -> str:
    events: list[base.Record] = []

    async def told() -> bool:
        events[:] = await broker.read(subjects.USAGE, subjects.usage(tenant, "sim"))
        return bool(events)

    await until(told)
    return str(json.loads(events[0].data)["outcome"])


@pytest.mark.parametrize("same", [True, False])
async def test_an_id_used_twice_is_the_newer_requests(
    https: list[httpx.AsyncClient], broker: base.Broker, same: bool
) -> None:
    """The journal outlives the dedup window: what lies under an id may be of two requests, of one ingress
    or of two. The second one's first worker gave it back unread."""
    for request_id, content in ((f"older-{same}", "the first"), (f"newer-{same}", "the second")):
        await https[0].post(CHAT, json=chat(content, 30), headers={"X-Request-Id": request_id})
    records = await broker.read(subjects.REPLIES, subjects.replies_to("anonymous", f"newer-{same}"))
    (old, *_) = await broker.read(subjects.REPLIES, subjects.replies_to("anonymous", f"older-{same}"))
    subject = old.subject if same else subjects.reply("anonymous", "another", f"older-{same}")
    for record in records:
        frame = codec.decode(record.data)
        frame.epoch = 2
        await broker.publish(subject, codec.encode(frame))

    async def stored() -> bool:
        last = await broker.last(subjects.REPLIES, subject)
        return (
            last is not None and (ended := codec.decode(last.data)).kind is FrameKind.END and ended.epoch == 2
        )

    await until(stored)
    reader = Reader()
    await reader.resume(https[1], f"older-{same}")
    assert reader.text == answer("the second", 30)
    assert reader.last.startswith("2-")


async def test_a_reply_is_its_tenants_own(https: list[httpx.AsyncClient]) -> None:
    mine, other = {"X-Headrace-Tenant": "mine"}, {"X-Headrace-Tenant": "other"}
    head = {"X-Request-Id": "private", **mine}
    await https[0].post(CHAT, json=chat("private", 5, stream=False), headers=head)
    assert (await https[1].get(where("private"), headers=mine)).status_code == 200
    assert (await https[1].get(where("private"), headers=other)).status_code == 404


async def test_a_reply_that_is_forgotten_before_its_end_is_a_loss(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    subject = subjects.reply("anonymous", "box", "endless")
    extra = {"status": 200, "headers": {"content-type": "text/event-stream"}}
    head = Frame(1, 0, FrameKind.HEAD, payload=b"data: 1\n\n", extra=extra)
    await broker.publish(subject, codec.encode(head))
    await until(lambda: broker.last(subjects.REPLIES, subject))
    reader = Reader()
    reading = asyncio.create_task(reader.resume(https[0], "endless"))
    await until(lambda: reader.data)
    (record,) = await broker.read(subjects.REPLIES, subject)
    await broker.delete(subjects.REPLIES, record.seq)
    await reading
    assert json.loads(reader.data[-1])["error"]["code"] == "frames_lost"


async def test_a_long_reply_is_read_back_whole(https: list[httpx.AsyncClient], broker: base.Broker) -> None:
    subject = subjects.reply("anonymous", "box", "long")
    extra = {"status": 200, "headers": {"content-type": "text/event-stream"}}
    await broker.publish(subject, codec.encode(Frame(1, 0, FrameKind.HEAD, extra=extra)))
    for number in range(3000):
        frame = Frame(1, number + 1, FrameKind.DATA, payload=b"data: %d\n\n" % number)
        await broker.publish(subject, codec.encode(frame))
    await broker.publish(subject, codec.encode(Frame(1, 3001, FrameKind.END)))
    await until(lambda: broker.last(subjects.REPLIES, subject))
    reader = Reader()
    await reader.resume(https[0], "long")
    assert reader.data == [b"%d" % number for number in range(3000)]


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        (where("nobody"), {}, 404, "not_found"),
        (where("whole"), {"Last-Event-ID": "seventeen"}, 400, "invalid_request"),
        (where("a b"), {}, 404, "not_found"),
        (where("\N{SNOWMAN}"), {}, 404, "not_found"),
        (where("x" * 129), {}, 404, "not_found"),
        ("/v1/requests//stream", {}, 404, "not_found"),
    ],
)
async def test_what_cannot_be_resumed_is_told(
    https: list[httpx.AsyncClient], path: str, headers: dict[str, str], status: int, code: str
) -> None:
    response = await https[0].get(path, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


async def test_readers_count_as_streams(https: list[httpx.AsyncClient], config: BrokerConfig) -> None:
    head = {"X-Detach": "true", "X-Request-Id": "counted"}
    await Reader().read(https[0], "POST", CHAT, 2, json=chat("counted", 200), headers=head)
    async with ingress(config, max_streams=1) as url, connected(url) as http:
        reader = Reader()
        reading = asyncio.create_task(reader.resume(http, "counted"))
        await until(lambda: reader.data)
        refused = await http.get(where("counted"))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        await reading
        assert (await http.get(where("counted"))).status_code == 200


async def test_detach_is_true_or_false(https: list[httpx.AsyncClient]) -> None:
    response = await https[0].post(CHAT, json=chat("x", 1), headers={"X-Detach": "maybe"})
    assert response.status_code == 422
    assert "X-Detach" in response.json()["error"]["message"]


async def test_a_stream_survives_its_ingress(tmp_path: Path) -> None:
    """SIGKILL to the ingress that had the client: the other one goes on at the next event."""
    async with Fleet(tmp_path / "fleet") as fleet:
        dying, other, _ = await asyncio.gather(
            fleet.start("ingress"),
            fleet.start("ingress"),
            fleet.start("worker", sim__ttft_ms=5, sim__itl_ms=10),
        )
        async with connected(dying.url) as http, connected(other.url) as elsewhere:
            await until(lambda: ready(http))
            reader = Reader()
            asking = asyncio.create_task(
                reader.read(http, "POST", CHAT, json=chat("killed", 100), headers={"X-Request-Id": "killed"})
            )
            await until(lambda: len(reader.data) > 10)
            await dying.kill()
            with pytest.raises(httpx.TransportError):
                await asking
            await reader.resume(elsewhere, "killed")
            assert reader.text == answer("killed", 100)
