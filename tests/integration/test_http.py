"""The HTTP face over a real nats-server: every answer and every refusal that a client can get."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from broker import base, client, subjects
from broker.config import BrokerConfig
from broker.server import NatsServer
from tests.integration.serving import answer, ingress, ready, register, streaming, worker
from tests.waiting import LIMIT, until
from workers.engines import sim
from workers.engines.base import Receive, Scope, Send

CHAT = "/v1/chat/completions"
KEY = "schlüssel".encode()
ODD = "my org/model.v1 *ü"
TRAPS = ["sim.v1", "*", ">", "req.>", "sim sim", "ümlaut", "模型", "sim\n", "../sim", "%73im", "s" * 256]


@pytest.fixture(scope="module")
async def nats(anyio_backend: object, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="module")
async def config(nats: NatsServer) -> BrokerConfig:
    return BrokerConfig(url=nats.url)


@pytest.fixture(scope="module")
async def broker(config: BrokerConfig) -> AsyncIterator[base.Broker]:
    """Our own connection. `lone` is a model that the fleet knows and no worker serves."""
    async with await client.connect(config, "test") as connected:
        await register(connected, "lone")
        yield connected


@pytest.fixture(scope="module")
async def engine(config: BrokerConfig) -> AsyncIterator[sim.SimEngine]:
    async with worker(config, model="sim", name="first") as started, worker(config, model=ODD):
        yield started


@pytest.fixture(scope="module")
async def slow(config: BrokerConfig) -> AsyncIterator[sim.SimEngine]:
    """A worker whose streams end only when they are told to."""
    async with worker(config, model="slow", name="second", itl_ms=50) as started:
        yield started


@pytest.fixture(scope="module")
async def http(
    config: BrokerConfig, broker: base.Broker, engine: object, slow: object
) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        ingress(config, keepalive=0.05) as url,
        httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False) as connected,
    ):
        for model in ("sim", ODD, "slow", "lone"):
            await known(connected, model)
        yield connected


def chat(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "sim", "max_tokens": 5, "messages": [{"role": "user", "content": content}]} | more


def refused(response: httpx.Response, status: int, code: str | int) -> str:
    """The message of an error answer in the shape that every error has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    return str(error["message"])


def events(body: bytes) -> list[Any]:
    """The data of each SSE event; comments are left out."""
    assert re.search(rb"\n\n(: keep-alive\n)*\Z", body)  # the last bytes come before word that it is the end
    data = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [one.decode() if one == b"[DONE]" else orjson.loads(one) for one in data]


def text(body: bytes) -> str:
    *chunks, done = events(body)
    assert done == "[DONE]"
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def usage(broker: base.Broker, tenant: str, model: str) -> list[dict[str, Any]]:
    records = await broker.read(subjects.USAGE, subjects.usage(tenant, model))
    return [orjson.loads(record.data) for record in records]


class TestAnswers:
    async def test_a_whole_one_has_its_length_and_its_worker(self, http: httpx.AsyncClient) -> None:
        response = await http.post(CHAT, json=chat("whole"), headers={"X-Request-Id": "whole-1"})
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == answer("whole", 5)
        assert response.headers["x-request-id"] == "whole-1"
        assert response.headers["x-headrace-worker"] == "first"
        assert int(response.headers["content-length"]) == len(response.content)

    async def test_a_stream_ends_in_done(self, http: httpx.AsyncClient) -> None:
        response = await http.post(CHAT, json=chat("stream", stream=True, max_tokens=40))
        assert response.status_code == 200
        assert text(response.content) == answer("stream", 40)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["x-headrace-worker"] == "first"

    @pytest.mark.parametrize("stream", [True, False])
    async def test_the_bytes_are_the_engines_own(
        self, http: httpx.AsyncClient, engine: sim.SimEngine, stream: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[bytes] = []
        inner = engine.app

        async def recording(scope: Scope, receive: Receive, send: Send) -> None:
            async def record(message: Any) -> None:
                sent.append(message.get("body", b""))
                await send(message)

            await inner(scope, receive, record)

        monkeypatch.setattr(engine, "app", recording)
        body = chat(stream=stream, max_tokens=100, stream_options={"include_usage": True}, n=2)
        response = await http.post(CHAT, json=body)
        assert response.status_code == 200
        assert len(sent) > 20 if stream else sent
        without_comments = response.content.replace(b": keep-alive\n", b"").replace(b": queued\n\n", b"")
        assert re.sub(rb"\nid: [\d-]+\n\n", b"\n\n", without_comments) == b"".join(sent)

    async def test_the_body_reaches_the_engine_untouched(self, http: httpx.AsyncClient) -> None:
        raw = '{"max_tokens":3 ,\n "model":"sim","messages":[{"role":"user","content":"ü\\u00fc\\\\u0000"}] }'
        response = await http.post(CHAT, content=raw.encode())
        assert response.json()["choices"][0]["message"]["content"] == answer("üü\\u0000", 3)

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", {"prompt": "x", "max_tokens": 3}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
            ("/v1/responses", {"input": "x", "max_output_tokens": 16}),
            ("/tokenize", {"prompt": "x"}),
        ],
    )
    async def test_the_other_paths(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        response = await http.post(path, json={"model": "sim", **body})
        assert response.status_code == 200, response.text
        assert "error" not in response.json() or response.json()["error"] is None

    async def test_a_model_of_any_name_is_served(self, http: httpx.AsyncClient) -> None:
        response = await http.post(CHAT, json=chat("odd", model=ODD))
        assert response.status_code == 200, response.text
        assert response.json()["model"] == ODD
        assert response.json()["choices"][0]["message"]["content"] == answer("odd", 5)
        assert ODD in {card["id"] for card in (await http.get("/v1/models")).json()["data"]}
        assert (await http.get("/v1/models/my%20org%2Fmodel.v1%20%2A%C3%BC")).json()["id"] == ODD

    async def test_a_tenant_of_any_name_is_served(self, http: httpx.AsyncClient, broker: base.Broker) -> None:
        tenant = "\N{SNOWMAN}" * 85
        response = await http.post(CHAT, json=chat(), headers={b"X-Headrace-Tenant": tenant.encode()})
        assert response.status_code == 200, response.text
        assert (await one_usage(broker, tenant, "sim"))["outcome"] == "finished"


class TestRefusals:
    """Each is told to its caller, and disturbs nobody else."""

    @pytest.fixture(scope="class", autouse=True)
    async def bystander(self, http: httpx.AsyncClient) -> AsyncIterator[None]:
        """A stream that is open while all of them are refused."""
        body = chat("bystander", stream=True, max_tokens=4000)
        reading = asyncio.create_task(http.post(CHAT, json=body))
        yield
        assert text((await reading).content) == answer("bystander", 4000)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"no json",
            b"{",
            b"\xff\xfe",
            b"[" * 100_000 + b"]" * 100_000,
            b'{"model":"sim","messages":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
            b'{"model":"sim","prompt":"a\x00b"}',
            b'{"model":"sim\x00","prompt":"a"}',
            b'{"model":"sim","prompt":"a\\u0000b"}',
            b'{"model":"sim\\u0000","prompt":"a"}',
            b'{"model":"\\ud800","prompt":"a"}',
            b'["model"]',
            b'"model"',
            b"null",
            b"17",
            b"{}",
            b'{"model":null}',
        ],
        ids=lambda body: repr(body[:24]),
    )
    async def test_400_what_is_no_request(self, http: httpx.AsyncClient, body: bytes) -> None:
        refused(await http.post("/v1/completions", content=body), 400, "invalid_request")

    @pytest.mark.parametrize("request_id", [b"", b"a b", b"x" * 129, "ü".encode(), b"a\tb"])
    async def test_400_a_bad_request_id(self, http: httpx.AsyncClient, request_id: bytes) -> None:
        response = await http.post(CHAT, json=chat(), headers={b"X-Request-Id": request_id})
        assert "X-Request-Id" in refused(response, 400, "invalid_request")
        assert response.headers["x-request-id"].startswith("req_")

    @pytest.mark.parametrize("stream", [True, False])
    async def test_400_of_the_engine_a_prompt_past_the_context(
        self, http: httpx.AsyncClient, stream: bool
    ) -> None:
        response = await http.post(CHAT, json=chat("x" * 200_000, stream=stream))
        assert "context length" in refused(response, 400, 400)

    @pytest.mark.parametrize("limit", [-1, 0, 10**6, 10**30, "many", 1.5])
    async def test_400_of_the_engine_a_bad_limit(self, http: httpx.AsyncClient, limit: object) -> None:
        refused(await http.post(CHAT, content=any_json(chat(max_tokens=limit))), 400, 400)

    async def test_401_without_the_right_key(self, config: BrokerConfig, engine: object) -> None:
        async with (
            ingress(config, api_keys={"acme": KEY.decode()}) as url,
            httpx.AsyncClient(base_url=url, trust_env=False) as http,
        ):
            for wrong in (
                {},
                {b"Authorization": b"Bearer no"},
                {b"Authorization": b"Digest " + KEY},
                {b"x-api-key": b"no"},
                {b"X-Headrace-Tenant": b"acme"},
            ):
                refused(await http.post(CHAT, json=chat(), headers=wrong), 401, "invalid_api_key")
            await serves(http)
            for right in ({b"Authorization": b"bearer " + KEY}, {b"X-Api-Key": KEY}):
                assert (await http.post(CHAT, json=chat(), headers=right)).status_code == 200

    @pytest.mark.parametrize("model", TRAPS)
    async def test_404_an_unknown_model(self, http: httpx.AsyncClient, model: str) -> None:
        message = refused(await http.post(CHAT, json=chat(model=model)), 404, "model_not_found")
        assert message.endswith(f"known models: lone, {ODD}, sim, slow")

    async def test_404_an_unknown_path(self, http: httpx.AsyncClient) -> None:
        refused(await http.post("/v1/nothing", json=chat()), 404, "not_found")
        refused(await http.get("/"), 404, "not_found")
        refused(await http.get("/v1/models/nobody"), 404, "model_not_found")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [("GET", CHAT, "POST"), ("DELETE", "/v1/messages", "POST"), ("POST", "/v1/models", "GET, HEAD")],
    )
    async def test_405_the_wrong_method(
        self, http: httpx.AsyncClient, method: str, path: str, allowed: str
    ) -> None:
        response = await http.request(method, path)
        refused(response, 405, "method_not_allowed")
        assert sorted(response.headers["allow"].split(", ")) == allowed.split(", ")

    async def test_408_a_slow_body(self, config: BrokerConfig) -> None:
        async with ingress(config, body_timeout=0.1) as url:
            async with asyncio.timeout(LIMIT):
                reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.read()  # to the end: the connection is closed
                writer.close()
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nretry-after: 1\r\n" in head
        assert orjson.loads(body)["error"]["code"] == "request_timeout"

    async def test_409_an_id_in_use_and_an_id_used_before(self, http: httpx.AsyncClient) -> None:
        same = {"X-Request-Id": "twice"}
        async with http.stream(
            "POST", CHAT, json=chat(model="slow", stream=True, max_tokens=500), headers=same
        ) as first:
            assert first.status_code == 200
            again = await http.post(CHAT, json=chat(model="slow"), headers=same)
            refused(again, 409, "duplicate_request")
        done = {"X-Request-Id": "done-before"}
        assert (await http.post(CHAT, json=chat(), headers=done)).status_code == 200
        refused(await http.post(CHAT, json=chat(), headers=done), 409, "duplicate_request")
        other = done | {"X-Headrace-Tenant": "another"}
        assert (await http.post(CHAT, json=chat(), headers=other)).status_code == 200

    @pytest.mark.parametrize("chunked", [True, False])
    async def test_413_a_body_of_40_mb(self, http: httpx.AsyncClient, chunked: bool) -> None:
        body = orjson.dumps(chat("x" * 40_000_000))

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 65536):
                yield body[start : start + 65536]

        response = await http.post(CHAT, content=chunks() if chunked else body)
        assert "33,554,432 bytes" in refused(response, 413, "request_too_large")

    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            ({"model": 5}, {}),
            ({"model": ""}, {}),
            ({"model": "m" * 257}, {}),
            ({"model": ["sim"]}, {}),
            ({"stream": "yes"}, {}),
            ({"stream": 1}, {}),
            ({"service_tier": "gold"}, {}),
            ({"service_tier": 1}, {}),
            ({}, {"X-Priority": "now"}),
            ({}, {"X-Priority": ""}),
            ({}, {"X-Headrace-Timeout": "soon"}),
            ({}, {"X-Headrace-Timeout": "0"}),
            ({}, {"X-Headrace-Timeout": "-1"}),
            ({}, {"X-Headrace-Timeout": "nan"}),
            ({}, {"X-Headrace-Timeout": "inf"}),
        ],
    )
    async def test_422_a_value_of_the_wrong_type(
        self, http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]
    ) -> None:
        refused(await http.post(CHAT, json=chat(**body), headers=headers), 422, "invalid_value")

    async def test_429_a_full_ingress(self, config: BrokerConfig, slow: sim.SimEngine) -> None:
        async with (
            ingress(config, max_streams=1) as url,
            httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False) as http,
        ):
            await known(http, "sim")
            await known(http, "slow")
            async with streaming(http, chat(model="slow", stream=True, max_tokens=1000)):
                response = await http.post(CHAT, json=chat())
                refused(response, 429, "overloaded")
                assert response.headers["retry-after"] == "1"
            await until(lambda: slow.stats().running == 0)
            await serves(http)

    async def test_429_a_full_queue(self, nats_server: NatsServer) -> None:
        config = BrokerConfig(url=nats_server.url, max_queued=2)
        async with (
            await client.connect(config, "test") as broker,
            ingress(config) as url,
            httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False) as http,
        ):
            await register(broker, "lone")
            waiting = [asyncio.create_task(http.post(CHAT, json=chat(model="lone"))) for _ in range(2)]
            await until(lambda: queued(broker, "lone", 2))
            response = await http.post(CHAT, json=chat(model="lone"))
            assert "queue is full" in refused(response, 429, "overloaded")
            assert response.headers["retry-after"] == "1"
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            # Their cancels make room again.
            await until(lambda: queued(broker, "lone", 0))

    async def test_503_without_a_broker_and_well_again_with_it(self, nats_server: NatsServer) -> None:
        config = BrokerConfig(url=nats_server.url)
        async with (
            await client.connect(config, "test") as broker,
            worker(config, model="sim"),
            ingress(config) as url,
            httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False) as http,
        ):
            await register(broker, "sim")  # or it is forgotten with its worker's last heartbeat
            await serves(http)
            await nats_server.stop()
            await until(lambda: unready(http))
            assert (await http.get("/health/ready")).json()["broker"] is False
            assert (await http.get("/health/live")).status_code == 200
            for stream in (True, False):
                response = await http.post(CHAT, json=chat(stream=stream), headers={"X-Request-Id": "lost"})
                refused(response, 503, "unavailable")
                assert response.headers["retry-after"] == "1"
                assert response.headers["x-request-id"] == "lost"
            await nats_server.start()
            await serves(http)
            await until(lambda: ready(http))

    async def test_504_past_the_deadline_in_the_queue(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        response = await http.post(CHAT, json=chat(model="lone"), headers={"X-Headrace-Timeout": "0.1"})
        refused(response, 504, "deadline_exceeded")
        await until(lambda: queued(broker, "lone", 0))

    async def test_504_past_the_deadline_while_it_runs(
        self, http: httpx.AsyncClient, slow: sim.SimEngine
    ) -> None:
        body = chat(model="slow", max_tokens=1000)
        response = await http.post(CHAT, json=body, headers={"X-Headrace-Timeout": "0.2"})
        refused(response, 504, "deadline_exceeded")
        await until(lambda: slow.stats().running == 0)

    async def test_anthropics_shape_on_its_path(self, http: httpx.AsyncClient) -> None:
        for body, status in (({"model": "nobody"}, 404), ({"model": "sim", "messages": []}, 400)):
            response = await http.post("/v1/messages", json=body)
            assert response.status_code == status
            assert response.json()["type"] == "error"
            assert response.json()["error"]["message"]
        assert (await http.get("/v1/messages")).json()["type"] == "error"


class TestStreams:
    async def test_comments_while_queued_then_an_event_that_says_why_it_ends(
        self, http: httpx.AsyncClient
    ) -> None:
        deadline = {"X-Headrace-Timeout": "1"}
        response = await http.post(CHAT, json=chat(model="lone", stream=True), headers=deadline)
        assert response.status_code == 200
        assert response.content.count(b": queued, no worker serves lone now\n\n") >= 3
        (event,) = events(response.content)
        assert event["error"]["code"] == "deadline_exceeded"

    async def test_that_event_in_the_shape_of_each_api(self, http: httpx.AsyncClient) -> None:
        deadline = {"X-Headrace-Timeout": "0.5"}  # a comment has begun the stream by then
        body = {"model": "lone", "stream": True}
        messages = await http.post("/v1/messages", json=body, headers=deadline)
        assert b"event: error\ndata: " in messages.content
        (event,) = events(messages.content)
        assert (event["type"], event["error"]["code"]) == ("error", "deadline_exceeded")
        responses = await http.post("/v1/responses", json=body, headers=deadline)
        assert b"event: error\ndata: " in responses.content
        (event,) = events(responses.content)
        assert (event["type"], event["code"]) == ("error", "deadline_exceeded")

    async def test_a_whole_answer_keeps_its_status_however_long_it_waits(
        self, http: httpx.AsyncClient
    ) -> None:
        deadline = {"X-Headrace-Timeout": "0.2"}
        refused(await http.post(CHAT, json=chat(model="lone"), headers=deadline), 504, "deadline_exceeded")

    async def test_it_begins_when_a_worker_comes(
        self, http: httpx.AsyncClient, config: BrokerConfig, broker: base.Broker
    ) -> None:
        await register(broker, "late")
        async with (
            streaming(http, chat("late", model="late", stream=True)) as (first, rest),
            worker(config, model="late"),
        ):
            assert first == b": queued, no worker serves late now\n\n"
            body = first + b"".join([part async for part in rest])
        assert text(body) == answer("late", 5)

    async def test_an_engines_refusal_after_the_wait_is_an_event(
        self, http: httpx.AsyncClient, config: BrokerConfig, broker: base.Broker
    ) -> None:
        await register(broker, "later")
        async with (
            streaming(http, chat(model="later", stream=True, max_tokens=-1)) as (first, rest),
            worker(config, model="later"),
        ):
            body = first + b"".join([part async for part in rest])
        (event,) = events(body)
        assert event["error"]["code"] == 400

    async def test_comments_keep_a_silent_stream_alive(
        self, http: httpx.AsyncClient, config: BrokerConfig
    ) -> None:
        async with worker(config, model="silent", itl_ms=300):
            await serves(http, "silent", max_tokens=1)
            response = await http.post(CHAT, json=chat(model="silent", stream=True, max_tokens=2))
        assert response.content.count(b": keep-alive\n") >= 2
        assert text(response.content) == answer("hello", 2)

    async def test_the_official_client_skips_them(
        self, http: httpx.AsyncClient, config: BrokerConfig
    ) -> None:
        asked: Any = chat(model="still", stream=True, max_tokens=3)
        url = str(http.base_url.join("/v1"))
        async with (
            worker(config, model="still", itl_ms=300),
            openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as official,
        ):
            await serves(http, "still", max_tokens=1)
            chunks = [chunk async for chunk in await official.chat.completions.create(**asked)]
        pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(pieces) == answer("hello", 3)


class TestDisconnects:
    async def test_499_while_it_runs_frees_the_engine(
        self, http: httpx.AsyncClient, slow: sim.SimEngine, broker: base.Broker
    ) -> None:
        tenant = {"X-Headrace-Tenant": "runs"}
        before = await metrics(http)
        async with streaming(http, chat(model="slow", stream=True, max_tokens=1000), tenant):
            assert slow.stats().running == 1
        await until(lambda: slow.stats().running == 0)
        event = await one_usage(broker, "runs", "slow")
        assert (event["outcome"], event["status"], event["worker"]) == ("cancelled", 499, "second")
        after = await metrics(http)
        requests = 'headrace_requests_total{path="/v1/chat/completions",status="499"}'
        assert after[requests] == before.get(requests, 0) + 1
        assert after["headrace_cancel_seconds_count"] == before["headrace_cancel_seconds_count"] + 1
        assert after["headrace_abort_seconds_count"] == before["headrace_abort_seconds_count"] + 1

    async def test_499_in_prefill(
        self, http: httpx.AsyncClient, config: BrokerConfig, broker: base.Broker
    ) -> None:
        async with worker(config, model="prefill", ttft_ms=60_000) as engine:
            await known(http, "prefill")
            async with streaming(http, chat(model="prefill", stream=True)):
                await until(lambda: engine.stats().running == 1)
            await until(lambda: engine.stats().running == 0)

    async def test_499_in_the_queue_takes_it_out(
        self, http: httpx.AsyncClient, broker: base.Broker, config: BrokerConfig
    ) -> None:
        await register(broker, "queue")
        async with streaming(http, chat(model="queue", stream=True), {"X-Headrace-Tenant": "queued"}):
            assert await broker.counts(subjects.REQUESTS, "req.queue.>")
        event = await one_usage(broker, "queued", "queue")
        assert (event["outcome"], event["status"], event["worker"]) == ("cancelled", 499, "")
        assert not await broker.counts(subjects.REQUESTS, "req.queue.>")

    async def test_499_without_a_stream_too(self, http: httpx.AsyncClient, slow: sim.SimEngine) -> None:
        asked = asyncio.create_task(http.post(CHAT, json=chat(model="slow", max_tokens=1000)))
        await until(lambda: slow.stats().running == 1)
        asked.cancel()
        await until(lambda: slow.stats().running == 0)

    async def test_before_the_body_is_there(self, http: httpx.AsyncClient) -> None:
        before = await metrics(http)
        _, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        gone = 'headrace_requests_total{path="/v1/embeddings",status="499"}'

        async def counted() -> bool:
            return (await metrics(http)).get(gone, 0) == before.get(gone, 0) + 1

        await until(counted)


class TestPages:
    async def test_models(self, http: httpx.AsyncClient) -> None:
        found = (await http.get("/v1/models")).json()
        assert found["object"] == "list"
        by_id = {card["id"]: card for card in found["data"]}
        assert by_id["sim"]["object"] == "model"
        assert by_id["sim"]["max_model_len"] == 8192
        assert CHAT in by_id["sim"]["paths"]
        assert (await http.get("/v1/models/sim")).json() == by_id["sim"]

    async def test_ready_only_with_a_worker(self, nats_server: NatsServer) -> None:
        config = BrokerConfig(url=nats_server.url)
        async with ingress(config) as url, httpx.AsyncClient(base_url=url, trust_env=False) as http:
            without = await http.get("/health/ready")
            assert (without.status_code, without.json()["worker"]) == (503, False)
            async with worker(config, model="sim"):
                await until(lambda: ready(http))
            # It said goodbye.
            assert (await http.get("/health/ready")).json()["worker"] is False

    async def test_each_part_of_the_latency_is_measured(self, http: httpx.AsyncClient) -> None:
        before = await metrics(http)
        await http.post(CHAT, json=chat(stream=True, max_tokens=10), headers={"X-Priority": "batch"})
        labels = 'class="batch",model="sim"'
        expected = {
            "headrace_ingress_admit_seconds_count": 1,
            "headrace_publish_ack_seconds_count": 1,
            f"headrace_queue_wait_seconds_count{{{labels}}}": 1,
            f"headrace_engine_wait_seconds_count{{{labels}}}": 1,
            f"headrace_prefill_seconds_count{{{labels}}}": 1,
            f"headrace_ttft_seconds_count{{{labels}}}": 1,
            f"headrace_itl_seconds_count{{{labels}}}": 1,
            'headrace_request_seconds_count{class="batch",model="sim",outcome="finished"}': 1,
            "headrace_frame_seconds_count": 2,
        }

        async def measured() -> bool:
            after = await metrics(http)
            return all(after.get(name, 0) >= before.get(name, 0) + least for name, least in expected.items())

        await until(measured)  # the worker counts after its last frame


async def test_an_ingress_may_listen_on_ipv6(config: BrokerConfig) -> None:
    async with ingress(config, host="::1") as url:
        assert url.startswith("http://[::1]:")
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.get("/health/live")).status_code == 200


async def test_503_comes_in_time_when_the_broker_hangs(nats_server: NatsServer) -> None:
    """Stopped, not gone: connections stand, and nobody answers."""
    config = BrokerConfig(url=nats_server.url, timeout=20)
    assert nats_server.pid is not None
    async with (
        worker(config),
        ingress(config, publish_timeout=0.2) as url,
        httpx.AsyncClient(base_url=url, timeout=10) as http,
    ):
        await serves(http)
        os.kill(nats_server.pid, signal.SIGSTOP)
        try:
            refused(await http.post(CHAT, json=chat()), 503, "unavailable")
        finally:
            os.kill(nats_server.pid, signal.SIGCONT)
        await serves(http)


def any_json(value: object) -> bytes:
    """JSON with integers of any size."""
    return json.dumps(value).encode()


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[:1] != "#")}


async def serves(http: httpx.AsyncClient, model: str = "sim", max_tokens: int = 5) -> None:
    """Until a request is answered."""

    async def answered() -> bool:
        body = chat(model=model, max_tokens=max_tokens)
        response = await http.post(CHAT, json=body, headers={b"x-api-key": KEY})
        return response.status_code == 200

    await until(answered)


async def known(http: httpx.AsyncClient, model: str) -> None:
    async def listed() -> bool:
        return model in {card["id"] for card in (await http.get("/v1/models")).json()["data"]}

    await until(listed)


async def unready(http: httpx.AsyncClient) -> bool:
    return not await ready(http)


async def queued(broker: base.Broker, model: str, count: int) -> bool:
    found = await broker.counts(subjects.REQUESTS, subjects.request_filter(model, "standard"))
    return sum(found.values()) == count


async def one_usage(broker: base.Broker, tenant: str, model: str) -> dict[str, Any]:
    """The usage event of a request, and only one."""
    found: list[dict[str, Any]] = await until(lambda: usage(broker, tenant, model))
    (event,) = found
    return event
