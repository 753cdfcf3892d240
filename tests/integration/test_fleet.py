"""Ingresses and workers as processes of their own: one queue, whoever comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from broker import base, client, errors, replies, subjects
from broker.config import BrokerConfig
from broker.messages import FrameKind, Heartbeat, Request
from ops import explain
from tests.integration.fleet import Fleet
from tests.integration.serving import answer, ready, register, streaming
from tests.waiting import LIMIT, until

CHAT = "/v1/chat/completions"


def chat(content: str, tokens: int, model: str = "sim", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "max_tokens": tokens, "messages": messages, "stream": True} | more


def text(body: bytes) -> str:
    """The answer that an SSE body carries, which must be complete."""
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]", body[-200:]
    chunks = [orjson.loads(line) for line in lines]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def rest_of(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in parts])


async def ask(http: httpx.AsyncClient, content: str, tokens: int, model: str = "sim") -> str:
    """Stream one chat, check every token of it, and name the worker that answered."""
    response = await http.post(CHAT, json=chat(content, tokens, model))
    assert response.status_code == 200, response.text
    assert text(response.content) == answer(content, tokens)
    return response.headers["x-headrace-worker"]


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False, limits=limits) as http:
        yield http


async def lists(http: httpx.AsyncClient, *models: str) -> bool:
    return set(models) <= {card["id"] for card in (await http.get("/v1/models")).json()["data"]}


@pytest.fixture(scope="module")
async def fleet(anyio_backend: object, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Two ingresses, three workers and a scheduler. `lone` is known and nobody serves it."""
    async with Fleet(tmp_path_factory.mktemp("fleet")) as started:
        workers = (
            started.start("worker", worker__name=f"w{n}", sim__ttft_ms=5, sim__itl_ms=5) for n in range(3)
        )
        # A comment before the worker is known would leave its name out of the headers.
        ingresses = (started.start("ingress", ingress__keepalive=30) for _ in range(2))
        await asyncio.gather(*workers, *ingresses, started.start("scheduler"))
        yield started


@pytest.fixture(scope="module")
async def broker(fleet: Fleet) -> AsyncIterator[base.Broker]:
    async with await client.connect(BrokerConfig(url=fleet.nats.url), "test") as own:
        await register(own, "lone")
        yield own


@pytest.fixture(scope="module")
async def https(fleet: Fleet, broker: base.Broker) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client for each ingress."""
    async with contextlib.AsyncExitStack() as stack:
        urls = [part.url for part in fleet.parts if part.facts["part"] == "ingress"]
        https = [await stack.enter_async_context(connected(url)) for url in urls]
        for http in https:
            await until(partial(ready, http))
            await until(partial(lists, http, "sim", "lone"))
        yield https


@pytest.fixture(scope="module")
async def impatient(fleet: Fleet, broker: base.Broker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an ingress that lets no stream be silent for long."""
    part = await fleet.start("ingress", ingress__keepalive=0.05)
    async with connected(part.url) as http:
        await until(lambda: lists(http, "sim", "lone"))
        yield http


async def test_200_streams_over_two_ingresses_and_three_workers(https: list[httpx.AsyncClient]) -> None:
    streams = (ask(https[n % 2], f"stream {n}", 10 + n % 30) for n in range(200))
    served = Counter(await asyncio.gather(*streams))
    assert served.keys() == {"w0", "w1", "w2"}
    assert served.total() == 200


async def test_a_new_worker_takes_its_part(fleet: Fleet, https: list[httpx.AsyncClient]) -> None:
    settings = {"sim__model": "grow", "sim__max_num_seqs": 2, "sim__itl_ms": 10}
    old = await fleet.start("worker", worker__name="old", **settings)
    await until(lambda: lists(https[0], "grow"))
    served: Counter[str] = Counter()

    async def client_of(number: int) -> None:
        while not ("new" in served and served["new"] >= 5):
            served[await ask(https[0], f"{number} after {served.total()}", 10, "grow")] += 1

    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(client_of(number))
        await until(lambda: served["old"] >= 5)
        assert "new" not in served
        new = await fleet.start("worker", worker__name="new", **settings)
    assert served.keys() == {"old", "new"}
    await asyncio.gather(old.kill(), new.kill())


async def test_a_worker_told_to_stop_finishes_what_it_runs(
    fleet: Fleet, https: list[httpx.AsyncClient]
) -> None:
    settings = {"sim__model": "drain", "sim__itl_ms": 10, "sim__max_num_seqs": 3}
    parts = {name: await fleet.start("worker", worker__name=name, **settings) for name in ("leaves", "stays")}
    await until(lambda: lists(https[0], "drain"))
    async with contextlib.AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(streaming(https[n % 2], chat(f"s{n}", 80, "drain")))
            for n in range(6)
        ]
        # Both are full, so both have some; and four more wait in the queue.
        waiting = [asyncio.create_task(ask(https[0], f"q{n}", 5, "drain")) for n in range(4)]
        parts["leaves"].term()
        bodies = [first + await rest_of(rest) for first, rest in running]
    assert [text(body) for body in bodies] == [answer(f"s{n}", 80) for n in range(6)]
    assert await parts["leaves"].ended() == 0
    assert len(await asyncio.gather(*waiting)) == 4
    assert await ask(https[0], "after", 3, "drain") == "stays"
    await parts["stays"].kill()


async def test_an_ingress_told_to_stop_finishes_its_streams(fleet: Fleet, https: object) -> None:
    part = await fleet.start("ingress")
    async with connected(part.url) as http, contextlib.AsyncExitStack() as stack:
        await until(lambda: ready(http))
        running = [await stack.enter_async_context(streaming(http, chat(f"i{n}", 60))) for n in range(4)]
        part.term()
        bodies = [first + await rest_of(rest) for first, rest in running]
        assert [text(body) for body in bodies] == [answer(f"i{n}", 60) for n in range(4)]
        assert await part.ended() == 0
        with pytest.raises(httpx.ConnectError):
            await http.get("/health/live")


async def test_an_ingress_out_of_time_leaves_what_it_cuts_to_another(
    fleet: Fleet, https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    part = await fleet.start("ingress", ingress__drain_timeout=0)
    tenant = {"X-Headrace-Tenant": "cut"}

    async def whole() -> httpx.Response:
        body = chat("whole", 800, stream=False)
        return await http.post(CHAT, json=body, headers=tenant | {"X-Request-Id": "whole"})

    async with connected(part.url) as http:
        await until(lambda: ready(http))
        unstreamed = asyncio.create_task(whole())
        await until(lambda: broker.last(subjects.REPLIES, subjects.replies_to("cut", "whole")))
        async with streaming(http, chat("cut", 800), tenant | {"X-Request-Id": "cut"}) as (first, rest):
            part.term()
            said, _, error = (first + await rest_of(rest)).rpartition(b"data: ")
        refused = await unstreamed
    assert await part.ended() == 0
    assert orjson.loads(error)["error"]["code"] == "ingress_stopped"
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ingress_stopped")
    assert "/v1/requests/whole/stream" in refused.json()["error"]["message"]
    answers = await https[0].get("/v1/requests/whole/stream", headers=tenant)
    assert answers.json()["choices"][0]["message"]["content"] == answer("whole", 800)
    last = tenant | {"Last-Event-ID": said.rpartition(b"id: ")[2].decode().strip()}
    answers = await https[0].get("/v1/requests/cut/stream", headers=last)
    assert text(said + answers.content) == answer("cut", 800)


async def test_what_waits_or_is_read_on_at_an_ingress_out_of_time_goes_on_too(
    fleet: Fleet, https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    await register(broker, "later")
    part = await fleet.start("ingress", ingress__drain_timeout=0)
    async with connected(part.url) as http, contextlib.AsyncExitStack() as stack:
        await until(lambda: lists(http, "sim", "later"))
        _, first = await stack.enter_async_context(
            streaming(https[0], chat("read", 800), {"X-Request-Id": "read"})
        )
        read = asyncio.create_task(http.get("/v1/requests/read/stream"))
        waits = asyncio.create_task(
            http.post(CHAT, json=chat("waits", 3, "later"), headers={"X-Request-Id": "waits"})
        )
        await until(lambda: broker.counts(subjects.REQUESTS, subjects.request_filter("later", "standard")))
        await until(lambda: opened(http, 2))
        part.term()
        for cut in (read, waits):
            assert b"ingress_stopped" in (await cut).content
        await rest_of(first)
    assert await part.ended() == 0
    worker = await fleet.start("worker", worker__name="late", sim__model="later")
    assert text((await https[0].get("/v1/requests/waits/stream")).content) == answer("waits", 3)
    await worker.kill()


async def opened(http: httpx.AsyncClient, count: int) -> bool:
    """Whether an ingress has so many requests open."""
    return f"headrace_ingress_streams {count}.0" in (await http.get("/metrics")).text


async def test_the_urgent_overtake_at_a_full_worker(
    fleet: Fleet, https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    settings = {"sim__model": "one", "sim__itl_ms": 20, "sim__max_num_seqs": 1}
    worker = await fleet.start("worker", worker__name="one", **settings)
    await until(lambda: lists(https[0], "one"))

    async def post(name: str, **body: Any) -> None:
        response = await https[0].post(
            CHAT, json=chat(name, 3, "one", **body), headers={"X-Request-Id": name}
        )
        assert text(response.content) == answer(name, 3)

    async def waits(name: str) -> bool:
        """In the dispatcher's hands: what only lies in the stream is not there yet to overtake anybody."""
        try:
            return bool((await explain.ask(broker, name, "anonymous"))["outcome"] == "queued")
        except (errors.NotFound, errors.Unavailable):
            return False

    async with streaming(https[0], chat("first", 4000, "one")):
        posts = []
        for n in range(3):
            posts.append(asyncio.create_task(post(f"batch-{n}", service_tier="flex")))
            await until(partial(waits, f"batch-{n}"))
        posts.append(asyncio.create_task(post("standard")))
        await until(lambda: waits("standard"))
        posts.append(asyncio.create_task(post("urgent", service_tier="priority")))
        await until(lambda: waits("urgent"))
    await asyncio.gather(*posts)

    async def finished() -> list[str] | None:
        records = await broker.read(subjects.USAGE, subjects.usage("anonymous", "one"))
        return (
            [orjson.loads(record.data)["request_id"] for record in records][1:] if len(records) == 6 else None
        )

    assert await until(finished) == ["urgent", "standard", "batch-0", "batch-1", "batch-2"]
    await worker.kill()


@pytest.mark.parametrize(
    ("body", "headers", "service_class"),
    [
        ({}, {}, "standard"),
        ({"service_tier": "auto"}, {}, "standard"),
        ({"service_tier": "default"}, {}, "standard"),
        ({"service_tier": "priority"}, {}, "interactive"),
        ({"service_tier": "flex"}, {}, "batch"),
        ({"service_tier": "batch"}, {}, "batch"),
        ({}, {"X-Priority": "interactive"}, "interactive"),
        ({"service_tier": "priority"}, {"X-Priority": "Batch"}, "batch"),
    ],
)
async def test_the_class_asked_for_is_the_subjects(
    impatient: httpx.AsyncClient,
    broker: base.Broker,
    body: dict[str, str],
    headers: dict[str, str],
    service_class: str,
) -> None:
    async with streaming(impatient, chat("x", 5, "lone", **body), headers):
        found = await broker.counts(subjects.REQUESTS, "req.lone.>")
        assert found == {f"req.lone.{service_class}.anonymous.lone": 1}
    await until(lambda: nothing_queued(broker, "lone"))


async def nothing_queued(broker: base.Broker, model: str) -> bool:
    return not await broker.counts(subjects.REQUESTS, f"req.{model}.>")


async def test_what_was_accepted_survives_the_loss_of_every_process(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        config = BrokerConfig(url=fleet.nats.url)
        async with await client.connect(config, "before") as broker:
            await register(broker, "sim")
            ingress = await fleet.start("ingress", ingress__keepalive=0.05)
            async with connected(ingress.url) as http:
                await until(lambda: lists(http, "sim"))
                async with streaming(http, chat("over http", 5), {"X-Request-Id": "kept"}) as (_, rest):
                    await (await enqueue(broker, "published"))
                    await fleet.kill()
                    with pytest.raises(httpx.RemoteProtocolError):
                        await rest_of(rest)
        await fleet.nats.start()
        async with await client.connect(config, "after") as broker, replies.Mailbox(broker, "own") as mailbox:
            stream = mailbox.open("anonymous", "published")
            await fleet.start("worker")
            frames = []
            async with asyncio.timeout(LIMIT):
                while not stream.finished:
                    frames += await stream.next(1)
            assert frames[-1].kind is FrameKind.END
            assert text(b"".join(frame.payload for frame in frames)) == answer("published", 5)
            subject = subjects.usage("anonymous", "sim")

            async def finished() -> dict[str, str] | None:
                events = [orjson.loads(r.data) for r in await broker.read(subjects.USAGE, subject)]
                return {e["request_id"]: e["outcome"] for e in events} if len(events) == 2 else None

            assert await until(finished) == {"kept": "finished", "published": "finished"}


async def enqueue(broker: base.Broker, name: str) -> asyncio.Future[base.Stored]:
    """Publish a chat as a direct publisher does."""
    request = Request(
        subject=subjects.RequestSubject("sim", "standard", "anonymous", "sim"),
        request_id=name,
        reply_to=subjects.reply("anonymous", "own", name),
        path=CHAT,
        body=orjson.dumps(chat(name, 5)),
    )
    return await broker.enqueue(str(request.subject), request.body, request.headers())


async def test_a_disconnect_frees_the_worker_and_its_metrics_tell(
    https: list[httpx.AsyncClient], broker: base.Broker
) -> None:
    urls: dict[str, str] = {}

    def heard(message: base.Message) -> None:
        beat = Heartbeat.model_validate_json(message.data)
        urls[beat.worker] = beat.metrics_url

    subscription = await broker.subscribe(subjects.ALL_HEARTBEATS, heard)
    await until(lambda: {"w0", "w1", "w2"} <= urls.keys())
    await subscription.close()

    async def figures(worker: str) -> dict[str, float]:
        lines = (await https[0].get(urls[worker])).text.splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x[:1] != "#")}

    async with https[0].stream("POST", CHAT, json=chat("leaving", 5000)) as response:
        parts = response.aiter_raw()
        await anext(parts)
        worker = response.headers["x-headrace-worker"]
        before = await figures(worker)
        assert before["headrace_running"] == 1

    async def idle() -> dict[str, float] | None:
        found = await figures(worker)
        freed = found["headrace_running"] == 0 == found['headrace_engine{figure="running"}']
        aborted = found["headrace_abort_seconds_count"] == before["headrace_abort_seconds_count"] + 1
        return found if freed and aborted else None

    found = await until(idle)
    for part in ("queue_wait", "engine_wait", "prefill", "worker_ttft", "itl"):
        assert found[f'headrace_{part}_seconds_count{{class="standard",model="sim"}}'] >= 1, part
    cancelled = 'headrace_worker_request_seconds_count{class="standard",model="sim",outcome="cancelled"}'
    assert found[cancelled] == before.get(cancelled, 0) + 1


async def test_an_answers_head_tells_how_it_was_served(fleet: Fleet, https: list[httpx.AsyncClient]) -> None:
    # Of its own, with an engine that caches prompts: those of fixed times have no steps.
    worker = await fleet.start("worker", worker__name="caches", sim__model="cached")
    await until(lambda: lists(https[1], "cached"))
    body = chat("the same long prompt, " * 100, 5, "cached")

    async def handed_out() -> httpx.Response | None:
        response = await https[1].post(CHAT, json=body)
        assert response.status_code == 200, response.text
        return response if "predicted" in response.headers["server-timing"] else None

    response = await until(handed_out)
    assert text(response.content)
    times = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert times.keys() == {"queue", "ttft", "predicted"}
    assert float(times["queue"]) >= 0
    assert float(times["ttft"]) > 0
    assert float(times["predicted"]) > 0
    again = await https[1].post(CHAT, json=body)
    cached, prompt = map(int, again.headers["x-headrace-prefix-hit"].split("/"))
    assert prompt / 2 < cached < prompt
    worker.term()
    assert await worker.ended() == 0


async def test_a_worker_before_another_server(fleet: Fleet, https: list[httpx.AsyncClient]) -> None:
    server = await fleet.start("sim-engine", sim__model="front", sim__ttft_ms=5, sim__itl_ms=5)
    async with connected(server.url) as direct:
        body = chat("directly", 9, "front")
        assert text((await direct.post(CHAT, json=body)).content) == answer("directly", 9)
    worker = await fleet.start("worker", worker__name="proxy", worker__engine="http", http__url=server.url)
    assert worker.facts["base"] == "front"
    await until(lambda: lists(https[0], "front"))
    assert (
        await asyncio.gather(*(ask(https[n % 2], f"f{n}", 20, "front") for n in range(10))) == ["proxy"] * 10
    )
    # What the server says against a request reaches its caller as it is.
    refused = await https[0].post(CHAT, json=chat("x" * 200_000, 5, "front"))
    assert refused.status_code == 400
    assert "context length" in refused.json()["error"]["message"]
    async with streaming(https[0], chat("cut", 5000, "front")) as (_, rest):
        await server.kill()
        assert b"engine_failed" in await rest_of(rest)
    assert await worker.ended() == 1
    assert "Traceback" not in worker.log.read_text()


class TestTheOpenAIClient:
    @pytest.fixture
    async def api(self, https: list[httpx.AsyncClient]) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(
            base_url=f"{https[0].base_url}/v1", api_key="none", max_retries=0, timeout=LIMIT
        ) as api:
            yield api

    async def test_a_chat(self, api: openai.AsyncOpenAI) -> None:
        made = await api.chat.completions.create(
            model="sim", max_tokens=7, messages=[{"role": "user", "content": "hi"}]
        )
        assert made.choices[0].message.content == answer("hi", 7)
        assert made.choices[0].finish_reason == "length"
        assert made.usage is not None
        assert made.usage.completion_tokens == 7

    async def test_a_stream(self, api: openai.AsyncOpenAI) -> None:
        stream = await api.chat.completions.create(
            model="sim",
            max_tokens=30,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        said, tokens = "", 0
        async for chunk in stream:
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        assert (said, tokens) == (answer("hi", 30), 30)

    async def test_the_models(self, api: openai.AsyncOpenAI) -> None:
        assert {"sim", "lone"} <= {model.id async for model in api.models.list()}
        assert (await api.models.retrieve("sim")).id == "sim"

    async def test_its_errors(self, api: openai.AsyncOpenAI) -> None:
        hi: list[Any] = [{"role": "user", "content": "hi"}]
        create = api.chat.completions.create
        with pytest.raises(openai.NotFoundError, match=r"known models: .*sim") as unknown:
            await create(model="nobody", messages=hi)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        assert unknown.value.request_id is not None
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await create(model="sim", messages=hi, max_tokens=-1)
        with pytest.raises(openai.UnprocessableEntityError, match="service_tier"):
            await create(model="sim", messages=hi, extra_body={"service_tier": "gold"})
        with pytest.raises(openai.BadRequestError, match="does not serve /v1/embeddings"):
            await api.embeddings.create(model="sim", input="hi")

    async def test_a_rate_limit(self, fleet: Fleet, https: list[httpx.AsyncClient]) -> None:
        part = await fleet.start("ingress", ingress__max_streams=1)
        async with (
            connected(part.url) as http,
            openai.AsyncOpenAI(base_url=f"{part.url}/v1", api_key="none", max_retries=0) as api,
        ):
            await until(lambda: ready(http))
            async with streaming(http, chat("full", 5000)):
                with pytest.raises(openai.RateLimitError, match="streams open"):
                    await api.completions.create(model="sim", prompt="x")
        await part.kill()

    async def test_an_error_in_the_midst_of_a_stream(
        self, api: openai.AsyncOpenAI, impatient: httpx.AsyncClient
    ) -> None:
        stream = await api.with_options(base_url=f"{impatient.base_url}/v1").chat.completions.create(
            model="lone",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_headers={"X-Headrace-Timeout": "1"},
        )
        with pytest.raises(openai.APIError, match="deadline passed") as error:
            async for _ in stream:
                pass
        assert error.value.code == "deadline_exceeded"
