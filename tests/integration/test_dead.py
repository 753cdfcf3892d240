"""`headrace dead` as an operator runs it, on letters of a real fleet's."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import httpx
import orjson

from broker import base, bodies, client, errors, letters, objects, replies, subjects
from broker.config import BrokerConfig
from broker.messages import Attempt, DeadLetter, Request
from broker.server import NatsServer
from tests.integration import command
from tests.integration.serving import answer, ingress, ready, register, worker
from tests.waiting import LIMIT, until

HISTORY = tuple(
    Attempt(epoch=epoch, worker=f"w{epoch}", at_ms=1_764_000_000_000, what="worker lost") for epoch in (1, 2)
)


async def dead(url: str, *arguments: str) -> tuple[int, str, str]:
    return await command.run("dead", url, *arguments)


async def die(broker: base.Broker, request: Request) -> None:
    """What a fleet leaves of a request that killed its workers, when the second of them had begun."""
    await (await broker.enqueue(str(request.subject), request.body, request.headers()))
    (record,) = await broker.read(subjects.REQUESTS, subjects.ALL_REQUESTS)
    await replies.Writer(broker, request.reply_to, 1).beat("w1")
    writer = replies.Writer(broker, request.reply_to, 2)
    await writer.head(200, {"content-type": "text/event-stream; charset=utf-8"}, "w2", b"data: {}\n\n", [])
    await broker.delete(subjects.REQUESTS, record.seq)
    fault = errors.WorkerLost("it killed 2 workers")
    await letters.dead_letter(broker, record.subject, record.headers, record.data, fault, 3, HISTORY)


def chat(tenant: str, request_id: str, tokens: int) -> Request:
    messages = [{"role": "user", "content": "again"}]
    body = {"model": "sim", "stream": True, "max_tokens": tokens, "messages": messages}
    return Request(
        subject=subjects.RequestSubject("sim", "standard", tenant, "sim"),
        request_id=request_id,
        reply_to=subjects.reply(tenant, "gone", request_id),
        path="/v1/chat/completions",
        body=orjson.dumps(body),
        deadline_ms=1,
    )


async def test_what_is_no_request_is_seen_and_dropped(nats_server: NatsServer) -> None:
    config, url = BrokerConfig(url=nats_server.url), nats_server.url
    async with await client.connect(config, "publisher") as broker, worker(config, model="sim"):
        assert (await dead(url, "list"))[:2] == (0, "")
        await (await broker.enqueue("req.sim.standard.acme.sim", b'{"a":[1]}', {"Odd": "one"}))

        async def died() -> base.Record | None:
            return await broker.last(subjects.DEAD, subjects.dead("malformed_message"))

        await until(died)
        status, out, _ = await dead(url, "list", "--reason", "malformed_message", "--tenant", "acme")
        assert status == 0
        seq, when, reason, tenant, model, request, message = out.splitlines()[1].split(maxsplit=6)
        assert (seq, reason, tenant, model, request) == ("1", "malformed_message", "acme", "sim", "-")
        assert when.endswith("+00:00")
        assert message.startswith("header Reply-To must be out.")
        status, out, _ = await dead(url, "show", "1", "--body")
        assert status == 0
        assert out.endswith('\n\n{\n  "a": [\n    1\n  ]\n}\n')
        assert "Odd" in out

        status, _, err = await dead(url, "replay", "--all")
        assert (status, err.splitlines()[-1]) == (1, "headrace dead: 0 done, 1 not")
        assert "1: it would die again: header Reply-To" in err
        status, _, err = await dead(url, "drop", "1")
        assert (status, "say --yes" in err) == (1, True)
        assert await dead(url, "drop", "1", "--yes") == (0, "1: dropped\n", "headrace dead: 1 done, 0 not\n")
        assert await dead(url, "show", "1") == (1, "", "headrace dead: there is no dead letter 1\n")


async def test_a_request_that_died_is_put_back_and_answered(nats_server: NatsServer) -> None:
    config, url = BrokerConfig(url=nats_server.url), nats_server.url
    async with (
        await client.connect(config, "fleet") as broker,
        ingress(config) as address,
        httpx.AsyncClient(base_url=address, timeout=LIMIT, trust_env=False) as http,
    ):
        await register(broker, "sim")
        await die(broker, chat("anonymous", "r1", 40))
        assert "it killed 2 workers" in (await http.get("/v1/requests/r1/stream")).text
        status, out, _ = await dead(url, "show", "1")
        assert status == 0
        assert [line.split()[1] for line in out.splitlines() if line.endswith("worker lost")] == ["w1", "w2"]

        assert await dead(url, "replay", "1") == (
            *(0, "1: in the queue as 2\n"),
            "headrace dead: 1 done, 0 not\n",
        )
        assert await broker.last(subjects.DEAD, subjects.ALL_DEAD) is None
        async with worker(config, model="sim"):
            await until(lambda: ready(http))

            async def read() -> str | None:
                text = (await http.get("/v1/requests/r1/stream")).text
                return text if "[DONE]" in text else None

            text = await until(read)
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert "killed" not in text
        assert events.pop() == "[DONE]"
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == answer("again", 40)
        assert await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS) == {}


async def test_a_request_too_large_for_its_letter_is_put_back_whole(nats_server: NatsServer) -> None:
    """It just fitted into its message, and as base64 it does not."""
    config = BrokerConfig(url=nats_server.url)
    async with await client.connect(config, "publisher") as broker:
        request = chat("acme", "r3", 5)
        room = bodies.room(broker) - len(request.body)
        request = replace(request, body=request.body[:-1] + b" " * room + request.body[-1:])
        await die_unseen(broker, request)
        record = await broker.last(subjects.DEAD, subjects.ALL_DEAD)
        assert record is not None
        name = DeadLetter.model_validate_json(record.data).headers[subjects.BODY_OBJECT]
        status, out, _ = await dead(nats_server.url, "show", "1", "--body")
        assert (status, f"the body is the object {name}" in out) == (0, True)
        whole = await objects.get(broker, subjects.PAYLOADS, name, len(request.body))
        await objects.remove(broker, subjects.PAYLOADS, name)
        status, _, err = await dead(nats_server.url, "replay", "1")
        assert (status, "the body of the request can't be read" in err) == (1, True)
        await objects.put(broker, subjects.PAYLOADS, name, whole)
        assert (await dead(nats_server.url, "replay", "1"))[0] == 0
        heard: list[bytes] = []
        await broker.subscribe(request.reply_to, lambda message: heard.append(message.data))
        async with worker(config, model="sim"):
            await until(lambda: any(b'"kind":"end"' in data for data in heard))
        assert await broker.last(subjects.DEAD, subjects.ALL_DEAD) is None

        async def gone() -> bool:
            with contextlib.suppress(objects.Missing):
                await objects.get(broker, subjects.PAYLOADS, name, len(request.body))
                return False
            return True

        await until(gone)


async def test_an_answer_to_a_replayed_request_is_heard_live(nats_server: NatsServer) -> None:
    """By the publisher, who still listens where it asked to be answered."""
    config = BrokerConfig(url=nats_server.url)
    async with await client.connect(config, "publisher") as broker, worker(config, model="sim"):
        heard: list[bytes] = []
        await broker.subscribe("out.acme.gone.r2", lambda message: heard.append(message.data))
        await die_unseen(broker, chat("acme", "r2", 5))
        before = len(heard)
        assert (await dead(nats_server.url, "replay", "--reason", "worker_lost"))[0] == 0
        await until(lambda: any(b'"kind":"end"' in data for data in heard[before:]))


async def die_unseen(broker: base.Broker, request: Request) -> None:
    """While a worker is there to take it: the letter alone."""
    fault = errors.WorkerLost("it killed 2 workers")
    await letters.dead_letter(broker, str(request.subject), request.headers(), request.body, fault, 3)


async def test_an_operator_changes_nothing_of_the_streams(nats_server: NatsServer) -> None:
    """Whose settings know nothing of the fleet's."""
    config = BrokerConfig(url=nats_server.url, max_queued=2)
    async with await client.connect(config, "fleet") as broker:
        await die(broker, chat("acme", "r1", 5))
        assert (await dead(nats_server.url, "list"))[0] == 0
        for n in range(2):
            await (await broker.enqueue("req.sim.standard.acme.sim", b"", {"Nats-Msg-Id": str(n)}))
        status, _, err = await dead(nats_server.url, "replay", "--all")
        assert (status, "1: the queue is full" in err) == (1, True)
        assert await broker.last(subjects.DEAD, subjects.ALL_DEAD) is not None


async def test_a_server_without_a_fleet_is_told_in_one_line(nats_server: NatsServer) -> None:
    status, out, err = await dead(nats_server.url, "list")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "stream DEAD can't be read" in err


async def test_no_broker_is_told_in_one_line(unused_port: int) -> None:
    status, out, err = await dead(f"nats://127.0.0.1:{unused_port}", "list", "--set", "broker.timeout=0.2")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "no broker at nats://127.0.0.1" in err
