"""What every engine does (`workers.engines.base.Engine`), whichever it is.

Written for any text model: nothing here knows the simulated engine's tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from broker import errors
from tests import asgi
from tests.waiting import until
from workers.config import HttpConfig, SimConfig
from workers.engines import base, http, sim

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FAST = SimConfig(beta0=1, max_num_seqs=8, context_tokens=2048, kv_blocks=256)


@asynccontextmanager
async def sim_engine() -> AsyncIterator[base.Engine]:
    engine = await sim.start(FAST)
    yield engine
    await engine.close()


@asynccontextmanager
async def http_engine() -> AsyncIterator[base.Engine]:
    """The HTTP engine before a simulated one, over a real socket."""
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(sim.serve(FAST, "127.0.0.1", 0, stop, url.set_result))
    try:
        engine = await http.start(HttpConfig(url=await url, concurrency=8))
        yield engine
        await engine.close()
    finally:
        stop.set()
        await server


@pytest.fixture(scope="module")
async def sim_fixture() -> AsyncIterator[base.Engine]:
    async with sim_engine() as made:
        yield made


@pytest.fixture(scope="module")
async def http_fixture() -> AsyncIterator[base.Engine]:
    async with http_engine() as made:
        yield made


# The warnings are vLLM's, of its own protocol fields.
VLLM = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(
    params=["sim_fixture", "http_fixture", pytest.param("vllm_engine", marks=VLLM)],
    ids=["sim", "http", "vllm"],
)
def engine(request: pytest.FixtureRequest) -> base.Engine:
    made: base.Engine = request.getfixturevalue(request.param)
    return made


def chat(engine: base.Engine, text: str = "Say something.", **more: Any) -> dict[str, Any]:
    body = {"model": engine.base, "messages": [{"role": "user", "content": text}]}
    return body | {"max_tokens": 12, "temperature": 0} | more


def idle(engine: base.Engine) -> bool:
    stats = engine.stats()
    return not stats.running and not stats.waiting and stats.kv_tokens_free == stats.kv_tokens_total


async def test_the_cards_name_the_base_first_and_its_paths(engine: base.Engine) -> None:
    assert engine.models[0].id == engine.base
    assert engine.models[0].context_tokens >= 1024
    for card in engine.models:
        assert card.base == engine.base
        assert {CHAT, COMPLETIONS} <= set(card.paths)
    assert not engine.died.done()


async def test_a_stream_is_one_chat_answer_from_role_to_usage(engine: base.Engine) -> None:
    body = chat(engine, stream=True, stream_options={"include_usage": True})
    async with asgi.request(engine.app, CHAT, body) as call:
        events = [event async for event in call.events()]
    assert call.status == 200
    assert call.headers["content-type"].startswith("text/event-stream")
    assert b"".join(call.parts).endswith(b"data: [DONE]\n\n")
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert set(reasons[:-1]) == {None}
    assert reasons[-1] in ("length", "stop")
    assert events[-1]["choices"] == []
    usage = events[-1]["usage"]
    assert 0 < usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_streamed_or_whole_the_text_is_the_same(engine: base.Engine, path: str) -> None:
    body = chat(engine) if path == CHAT else {"model": engine.base, "prompt": "One, two", "temperature": 0}
    whole = (await asgi.ask(engine.app, path, body))["choices"][0]
    async with asgi.request(engine.app, path, body | {"stream": True}) as call:
        choices = [event["choices"][0] async for event in call.events()]
    if path == CHAT:
        assert "".join(choice["delta"]["content"] for choice in choices) == whole["message"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_tap_counts_what_the_usage_says(engine: base.Engine, stream: bool) -> None:
    body = chat(engine, "Count with me.", stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    before = time.monotonic()
    async with asgi.request(engine.app, CHAT, body) as call:
        if stream:
            usage = [event async for event in call.events()][-1]["usage"]
        else:
            usage = (await call.json())["usage"]
    tap = call.tap
    assert (tap.prompt_tokens, tap.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert tap.scheduled_at is not None
    assert tap.first_token_at is not None
    assert before < tap.scheduled_at < tap.first_token_at < time.monotonic()


async def test_a_repeated_prompt_is_found_in_the_prefix_cache(engine: base.Engine) -> None:
    body = chat(engine, "The same long beginning of every prompt. " * 12)
    await asgi.ask(engine.app, CHAT, body)
    async with asgi.request(engine.app, CHAT, body) as call:
        usage = (await call.json())["usage"]
    assert 0 < (call.tap.cached_tokens or 0) < usage["prompt_tokens"]


async def test_the_tap_has_the_ids_of_each_chunk_before_it_is_sent(engine: base.Engine) -> None:
    if engine.name == "http":
        pytest.skip("a server behind HTTP doesn't tell its token ids")
    body = chat(engine, stream=True, return_token_ids=True)
    tapped: list[int] = []
    sent: list[int] = []
    async with asgi.request(engine.app, CHAT, body) as call:
        async for event in call.events():
            tapped += [token for _, ids in call.tap.ids for token in ids]
            call.tap.ids.clear()
            sent += event["choices"][0].get("token_ids") or []
            assert tapped[: len(sent)] == sent
    assert tapped == sent
    assert len(sent) == call.tap.output_tokens


async def test_several_choices_come_interleaved_each_in_order(engine: base.Engine) -> None:
    if engine.name == "vllm":
        pytest.skip("it refuses several greedy choices, and sampled ones are not the same twice")
    body = chat(engine, n=3)
    whole = await asgi.ask(engine.app, CHAT, body)
    texts = ["", "", ""]
    async with asgi.request(engine.app, CHAT, body | {"stream": True}) as call:
        async for event in call.events():
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


async def test_requests_at_once_do_not_mix(engine: base.Engine) -> None:
    if engine.name == "vllm":
        pytest.skip("its bf16 sums, and so its greedy words, depend on what runs beside")
    bodies = [chat(engine, f"Request number {n}") for n in range(12)]
    alone = [await asgi.ask(engine.app, CHAT, body) for body in bodies[:3]]
    together = await asyncio.gather(*(asgi.ask(engine.app, CHAT, body) for body in bodies))
    for one, other in zip(alone, together[:3], strict=True):
        assert one["choices"][0]["message"] == other["choices"][0]["message"]
    await until(lambda: idle(engine))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_stops_the_run_and_frees_the_engine(engine: base.Engine, stream: bool) -> None:
    seen: list[base.EngineStats] = []
    engine.on_change = lambda: seen.append(engine.stats())
    try:
        async with asgi.request(engine.app, CHAT, chat(engine, stream=stream, max_tokens=1500)) as call:
            await until(lambda: engine.stats().running == 1)
            if stream:
                await anext(call.chunks())
            call.disconnect()
            await call.ended()
        await until(lambda: idle(engine))
    finally:
        engine.on_change = None
    assert any(stats.running == 1 for stats in seen)
    assert not seen[-1].running


async def test_a_disconnect_of_a_request_that_waits_frees_it_too(engine: base.Engine) -> None:
    slots = engine.stats().max_running
    long = chat(engine, max_tokens=1500, ignore_eos=True)
    running = [asgi.Call(engine.app, "POST", CHAT, orjson.dumps(long)) for _ in range(slots)]
    await until(lambda: engine.stats().running == slots)
    async with asgi.request(engine.app, CHAT, long) as last:
        await until(lambda: engine.stats().waiting == 1)
        last.disconnect()
        await last.ended()
        assert last.status == 0
    for call in running:
        call.disconnect()
        await call.ended()
    await until(lambda: idle(engine))


@pytest.mark.parametrize(
    ("status", "path", "body"),
    [
        (400, CHAT, b"{not json"),
        (400, CHAT, b"[1, 2]"),
        (400, CHAT, {"messages": "hello"}),
        (400, CHAT, {"messages": []}),
        (400, CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": "ten"}),
        (400, CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}),
        (400, CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1_000_000}),
        (400, CHAT, {"messages": [{"role": "user", "content": "much too long " * 20_000}]}),
        (400, CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 0}),
        (400, COMPLETIONS, {"prompt": {"a": 1}}),
        (404, CHAT, {"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]}),
        (404, "/v1/no/such/path", {}),
    ],
)
async def test_errors_have_openai_s_shape(engine: base.Engine, status: int, path: str, body: Any) -> None:
    async with asgi.request(engine.app, path, body) as call:
        answer = await call.json()
    assert call.status == status, answer
    assert isinstance(answer["error"]["message"], str)
    assert answer["error"]["message"]
    assert {"type", "code"} <= answer["error"].keys()
    assert idle(engine)


async def test_one_that_can_not_sleep_says_so_and_serves_on(engine: base.Engine) -> None:
    assert not engine.can_sleep
    with pytest.raises(errors.EngineFailed, match="sleep"):
        await engine.sleep()
    assert (await asgi.ask(engine.app, CHAT, chat(engine)))["choices"]


async def test_the_simulated_one_answers_after_it_slept() -> None:
    engine = await sim.start(FAST.model_copy(update={"sleep": True, "wake_ms": 1}))
    try:
        assert engine.can_sleep
        await engine.sleep()
        async with asgi.request(engine.app, CHAT, chat(engine)) as call:
            await call.ended()
            assert call.status == 503
        await engine.wake()
        assert (await asgi.ask(engine.app, CHAT, chat(engine)))["choices"]
    finally:
        await engine.close()


async def test_close_is_idempotent() -> None:
    for make in (sim_engine, http_engine):
        async with make() as engine:
            await engine.close()
            await engine.close()
