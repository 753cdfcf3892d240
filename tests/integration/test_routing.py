"""Names that lead to models, over HTTP and a real nats-server: aliases, capabilities, routers, fallbacks."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from broker import base, entries, subjects
from broker.config import BrokerConfig
from broker.entries import ModelEntry, Target, Version
from broker.messages import parse_request
from ops import cli
from tests.integration.serving import ingress, register, worker
from tests.pushing import push
from tests.waiting import LIMIT, until

CHAT = "/v1/chat/completions"
ROUTES = """
default = "one"
margin = 0.05
[[route]]
name = "sums"
model = "two"
examples = ["What is 2 plus 2?", "Add 17 and 4", "How much is 9 times 8?", "Compute 3 minus 1"]
[[route]]
name = "greetings"
model = "one"
examples = ["Hello there", "Good morning to you", "Hi, nice to meet you", "Good evening"]
"""


@pytest.fixture(scope="module")
async def http(config: BrokerConfig, broker: base.Broker) -> AsyncIterator[httpx.AsyncClient]:
    """Two bases; `lone` is known, and no worker serves it."""
    await register(broker, "lone")
    async with contextlib.AsyncExitStack() as stack:
        for name in ("one", "two"):
            await stack.enter_async_context(worker(config, model=name, name=f"worker-{name}"))
        url = await stack.enter_async_context(ingress(config, no_fallback=("strict",)))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False)
        )
        for name in ("one", "two"):
            await until(lambda name=name: _serving(http, name))  # type: ignore[misc]
        yield http


@pytest.fixture(autouse=True)
async def _clean(broker: base.Broker, http: httpx.AsyncClient) -> AsyncIterator[None]:
    """No test's names are another's."""
    yield
    for name in ("one", "two", "lone", "way", "tuned", "auto"):
        await entries.change(broker, name, lambda _: None)
    await until(lambda: _is(http, "way", 404))


async def _serving(http: httpx.AsyncClient, name: str) -> bool:
    response = await http.get(f"/v1/models/{name}")
    return response.status_code == 200 and bool(response.json()["serving"])


async def _is(http: httpx.AsyncClient, name: str, status: int) -> bool:
    return (await http.post("/v1/route", json=chat(name))).status_code == status


async def declare(broker: base.Broker, name: str, kind: Any = "base", **more: Any) -> None:
    await entries.change(broker, name, lambda _: ModelEntry(name=name, kind=kind, **more))


def chat(model: str, content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 3, "messages": [{"role": "user", "content": content}]} | more


async def goes_to(http: httpx.AsyncClient, model: str, body: dict[str, Any], **headers: str) -> bool:
    response = await http.post("/v1/route", json=body, headers=headers)
    return response.status_code == 200 and response.json()["model"] == model


class TestAliases:
    async def test_an_alias_is_served_and_told_and_counted_under_what_was_asked(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        await declare(broker, "way", "alias", targets=(Target(model="two"),), latency_class="interactive")
        await until(lambda: goes_to(http, "two", chat("way")))
        response = await http.post(CHAT, json=chat("way"))
        assert response.status_code == 200
        assert response.headers["x-headrace-worker"] == "worker-two"
        assert response.headers["x-headrace-model"] == "two"
        assert response.headers["x-headrace-route"] == "alias way: two"
        records = await until(lambda: broker.read(subjects.USAGE, subjects.usage("anonymous", "two")))
        event = orjson.loads(records[-1].data)
        assert (event["asked"], event["model"], event["service_class"]) == ("way", "two", "interactive")

    async def test_a_model_that_was_named_is_not_told_again(self, http: httpx.AsyncClient) -> None:
        response = await http.post(CHAT, json=chat("one"))
        assert response.status_code == 200
        assert not {"x-headrace-model", "x-headrace-route"} & response.headers.keys()

    async def test_a_change_serves_with_no_restart_and_a_stream_tells_it_too(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        for name in ("one", "two"):
            await declare(broker, "way", "alias", targets=(Target(model=name),))
            await until(lambda name=name: goes_to(http, name, chat("way")))  # type: ignore[misc]
            response = await http.post(CHAT, json=chat("way", stream=True))
            assert response.headers["x-headrace-model"] == name
            assert b"data: [DONE]\n" in response.content

    async def test_openais_client_sees_the_headers(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        await declare(broker, "way", "alias", targets=(Target(model="two"),))
        await until(lambda: goes_to(http, "two", chat("way")))
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none") as asked:
            raw = await asked.chat.completions.with_raw_response.create(
                model="way", max_tokens=3, messages=[{"role": "user", "content": "hello"}]
            )
        assert raw.headers["x-headrace-model"] == "two"
        assert raw.parse().choices[0].message.content

    async def test_a_repeat_under_a_key_has_the_first_ones_answer_wherever_its_name_leads_now(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        answers = []
        for name in ("one", "two"):
            await declare(broker, "way", "alias", targets=(Target(model=name),))
            await until(lambda name=name: goes_to(http, name, chat("way")))  # type: ignore[misc]
            response = await http.post(CHAT, json=chat("way"), headers={"Idempotency-Key": "again"})
            assert response.status_code == 200
            answers.append((response.content, response.headers["x-headrace-worker"]))
        assert answers[0] == answers[1]

    async def test_an_adapters_request_names_its_version_and_is_wanted(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        made = tuple(Version(number=n, digest="d", rank=8) for n in (1, 2))
        await declare(broker, "tuned", "adapter", base="lone", versions=made, current=2)
        await until(lambda: goes_to(http, "tuned@2", chat("tuned")))
        wanted: list[str] = []
        listening = await broker.subscribe(
            subjects.wants("lone"), lambda message: wanted.append(message.subject)
        )
        await broker.sync()
        headers = {"X-Headrace-Timeout": "30", "X-Request-Id": "tuned-1"}
        asking = asyncio.create_task(http.post(CHAT, json=chat("tuned"), headers=headers))
        try:
            await until(lambda: wanted == [subjects.want("lone", "tuned@2")])
            subject = "req.lone.*.*.*"
            (record,) = await until(lambda: broker.read(subjects.REQUESTS, subject))
            request = parse_request(record.subject, record.headers, record.data)
            assert (request.subject.base, request.subject.model) == ("lone", "tuned@2")
            assert request.asked == "tuned"
        finally:
            asking.cancel()
            await asyncio.wait({asking})
            await listening.close()


class TestVersions:
    async def test_a_canary_of_two_versions_is_served_by_both_and_a_conversation_by_one(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        for _ in range(2):
            await push(broker, "tuned", base_model="one")
        await declare(
            broker, "way", "alias", targets=tuple(Target(model=f"tuned@{n}", weight=1) for n in (1, 2))
        )
        await until(lambda: _is(http, "way", 200))
        seen: dict[str, str] = {}
        for content in [f"hello {number}" for number in range(12)] * 2:
            response = await http.post(CHAT, json=chat("way", content))
            assert response.status_code == 200, response.text
            model = response.headers["x-headrace-model"]
            assert response.json()["model"] == model
            assert seen.setdefault(content, model) == model
        assert set(seen.values()) == {"tuned@1", "tuned@2"}


class TestRefusals:
    async def test_the_incapable_is_refused_before_it_is_queued(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        await declare(broker, "one", capabilities=("chat",))
        await declare(broker, "two", capabilities=("chat", "tools"))
        tools = [{"type": "function", "function": {"name": "f"}}]
        await until(lambda: _refused(http, chat("one", tools=tools)))
        response = await http.post(CHAT, json=chat("one", tools=tools))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "model_incapable", "model")
        assert error["message"] == "model 'one' lacks tools; these have it: two"
        assert await goes_to(http, "two", chat("auto", tools=tools))

    async def test_who_may_not_use_a_model_is_not_told_of_it(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        await declare(broker, "two", tenants=("acme",))
        await until(lambda: _is(http, "two", 404))
        response = await http.post(CHAT, json=chat("two"))
        assert response.json()["error"]["code"] == "model_not_found"
        assert "two" not in response.json()["error"]["message"].partition("known models")[2]
        assert (
            await http.post(CHAT, json=chat("two"), headers={"X-Headrace-Tenant": "acme"})
        ).status_code == 200

    @pytest.mark.parametrize("header", ["X-Headrace-Fallback", "X-Headrace-Language"])
    async def test_a_header_that_says_nothing_is_refused(self, http: httpx.AsyncClient, header: str) -> None:
        response = await http.post(CHAT, json=chat("one"), headers={header: "?"})
        assert response.status_code == 422
        assert header in response.json()["error"]["message"]


async def _refused(http: httpx.AsyncClient, body: dict[str, Any]) -> bool:
    return (await http.post("/v1/route", json=body)).status_code == 400


class TestFallbacks:
    async def test_another_serves_for_one_that_is_down_if_its_caller_lets_it(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        await declare(broker, "lone", fallbacks=("two",))
        await until(lambda: goes_to(http, "two", chat("lone")))
        response = await http.post(CHAT, json=chat("lone"))
        assert response.headers["x-headrace-model"] == "two"
        assert response.headers["x-headrace-route"] == "lone is served by no worker now; fallback to two"
        assert await goes_to(http, "lone", chat("lone"), **{"X-Headrace-Fallback": "off"})
        assert await goes_to(http, "lone", chat("lone"), **{"X-Headrace-Tenant": "strict"})

    async def test_another_serves_for_one_that_has_no_room(
        self, config: BrokerConfig, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        async with worker(config, model="small", name="worker-small", max_num_seqs=1, itl_ms=50):
            await declare(broker, "small", fallbacks=("one",))
            await until(lambda: goes_to(http, "small", chat("small")))
            busy = chat("small", max_tokens=2000, stream=True)
            async with http.stream("POST", CHAT, json=busy) as stream:
                assert stream.headers["x-headrace-worker"] == "worker-small"
                await until(lambda: goes_to(http, "one", chat("small")))
                response = await http.post(CHAT, json=chat("small"))
                assert response.headers["x-headrace-route"] == "small has no room; fallback to one"
        await entries.change(broker, "small", lambda _: None)


class TestRouter:
    async def test_routes_are_learned_serve_are_explained_and_removed_with_no_restart(
        self, config: BrokerConfig, http: httpx.AsyncClient, tmp_path: Path
    ) -> None:
        file = tmp_path / "routes.toml"
        file.write_text(ROUTES)
        out = await _headrace(config, "learn", str(file), "--no-embeddings")
        assert "router auto, version 1: sums, greetings" in out
        await until(lambda: goes_to(http, "two", chat("auto", "What is 3 plus 9?")))
        response = await http.post(CHAT, json=chat("auto", "What is 3 plus 9?"))
        assert response.status_code == 200
        assert response.headers["x-headrace-model"] == "two"
        assert response.headers["x-headrace-route"].startswith("auto: route sums, score ")
        assert await goes_to(http, "one", chat("auto", "Good morning there"))
        later = chat("auto", "What is 3 plus 9?")
        later["messages"] += [
            {"role": "assistant", "content": "12"},
            {"role": "user", "content": "Hello, hi there!"},
        ]
        assert await goes_to(http, "two", later)
        assert (await _headrace(config, "test", "Add 3 and 4")).startswith("two  (auto: route sums")
        assert "sums, greetings" in await _headrace(config, "list")
        assert "of 8 examples" in await _headrace(config, "show", "auto")
        assert await _headrace(config, "remove", "auto") == "removed auto\n"
        await until(lambda: goes_to(http, "one", chat("auto", "What is 3 plus 9?")))

    async def test_a_dry_run_explains_and_runs_nothing(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        before = await broker.counts(subjects.USAGE, subjects.ALL_USAGE)
        await declare(broker, "way", "alias", targets=(Target(model="one"), Target(model="two")))
        await until(lambda: _is(http, "way", 200))
        found = (await http.post("/v1/route", json=chat("way"))).json()
        assert found["asked"] == "way"
        assert {each["model"] for each in found["candidates"]} == {"one", "two"}
        assert found["why"] == [f"alias way: {found['model']}, 1 of 2"]
        assert found["needs"]["capabilities"] == ["chat"]
        completion = {"model": "way", "prompt": "hello"}
        found = (await http.post("/v1/route?path=/v1/completions", json=completion)).json()
        assert found["needs"]["capabilities"] == ["completions"]
        assert await _is_named(http, chat("way", max_tokens=2**64 - 1), "one", "two")
        assert (await http.post("/v1/route?path=/nope", json=completion)).status_code == 400
        assert (await http.get("/v1/route")).status_code == 405
        assert await broker.counts(subjects.USAGE, subjects.ALL_USAGE) == before

    async def test_a_dry_run_names_no_base_that_is_hidden(
        self, http: httpx.AsyncClient, broker: base.Broker
    ) -> None:
        made = Version(number=1, digest="sha256:0", rank=8)
        await declare(broker, "one", tenants=("acme",))
        await declare(broker, "tuned", "adapter", base="one", versions=(made,), current=1)
        await until(lambda: _is(http, "tuned", 200))
        await until(lambda: _is(http, "one", 404))
        for headers, told in (({}, None), ({"X-Headrace-Tenant": "acme"}, "one")):
            found = (await http.post("/v1/route", json=chat("tuned"), headers=headers)).json()
            assert (found["base"], [each["base"] for each in found["candidates"]]) == (told, [told])

    async def test_a_name_that_a_model_has_is_no_routers(
        self, config: BrokerConfig, broker: base.Broker, tmp_path: Path
    ) -> None:
        await declare(broker, "way", "alias", targets=(Target(model="one"),))
        file = tmp_path / "routes.toml"
        file.write_text(ROUTES)
        arguments = ["routes", "learn", str(file), "--no-embeddings", "--router", "way", "--nats", config.url]
        assert await asyncio.to_thread(cli.main, arguments) == 1


async def _is_named(http: httpx.AsyncClient, body: dict[str, Any], *models: str) -> bool:
    response = await http.post("/v1/route", content=orjson.dumps(body))
    return response.status_code == 200 and response.json()["model"] in models


async def _headrace(config: BrokerConfig, *arguments: str) -> str:
    """What `headrace routes …` prints."""
    out = io.StringIO()

    def run() -> int:
        with contextlib.redirect_stdout(out):
            return cli.main(["routes", *arguments, "--nats", config.url])

    assert await asyncio.to_thread(run) == 0
    return out.getvalue()
