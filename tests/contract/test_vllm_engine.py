"""What only the real engine can show: every endpoint is tapped and heeds a disconnect; no process is left."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import psutil
import pytest

from broker import errors
from ingress import prompt
from kvstate import prefix
from tests import asgi
from tests.contract.conftest import ROOT
from tests.waiting import LIMIT, until
from workers.config import VllmConfig
from workers.engines import base, vllm

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    # vLLM's, of its own protocol fields and of FastAPI's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:ORJSONResponse is deprecated"),
]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
MODEL = ROOT / ".data/models/SmolLM2-135M-Instruct"
ASK = [{"role": "user", "content": "Who are you?"}]
LONG = [{"role": "user", "content": "Once upon a time there was a mill. " * 180}]
"""More than three steps of prefill."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,  # the grammar then holds the arguments to the schema, not the envelope alone
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def engine(vllm_engine: base.Engine) -> base.Engine:
    return vllm_engine


def body_for(path: str, messages: list[dict[str, Any]], tokens: int, **more: Any) -> dict[str, Any]:
    """The same question in each endpoint's words."""
    words: dict[str, Any] = {"model": MODEL.name, "temperature": 0}
    match path:
        case "/v1/completions":
            words |= {"prompt": messages[0]["content"], "max_tokens": tokens}
        case "/v1/responses":
            words |= {"input": messages, "max_output_tokens": tokens}
        case _:
            words |= {"messages": messages, "max_tokens": tokens}
    return words | more


def idle(engine: base.Engine) -> bool:
    stats = engine.stats()
    return not stats.running and not stats.waiting and stats.kv_tokens_free == stats.kv_tokens_total


async def test_the_converted_model_knows_its_capitals(engine: base.Engine) -> None:
    body = {"model": engine.base, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    assert "Paris" in (await asgi.ask(engine.app, COMPLETIONS, body))["choices"][0]["text"]


async def test_a_generative_model_offers_no_embeddings(engine: base.Engine) -> None:
    paths = engine.models[0].paths
    assert {CHAT, COMPLETIONS, RESPONSES, MESSAGES, "/tokenize", "/detokenize"} <= set(paths)
    assert "/v1/embeddings" not in paths
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        assert path in paths
        answer = await asgi.ask(engine.app, path, {"model": engine.base, "messages": ASK})
        assert (answer.get("count") or answer["input_tokens"]) == 34


def counted(usage: dict[str, Any]) -> tuple[int, int, int]:
    """(prompt, cached, output) tokens of a usage object in any dialect."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens", usage.get("cache_read_input_tokens")) or 0
    prompt = usage["prompt_tokens"] if "prompt_tokens" in usage else usage["input_tokens"]
    if "cache_read_input_tokens" in usage:
        prompt += cached  # Anthropic counts what the cache had apart
    output = usage["completion_tokens"] if "completion_tokens" in usage else usage["output_tokens"]
    return prompt, cached, output


def last_usage(events: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for event in events:
        for holder in (event, event.get("response") or {}, event.get("message") or {}):
            found |= holder.get("usage") or {}
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_every_endpoint_is_tapped(engine: base.Engine, path: str, stream: bool) -> None:
    body = body_for(path, ASK, 12, stream=stream)
    if stream and path in (CHAT, COMPLETIONS):
        body["stream_options"] = {"include_usage": True}
    before = time.monotonic()
    async with asgi.request(engine.app, path, body) as call:
        events = [event async for event in call.events()] if stream else [await call.json()]
    assert call.status == 200
    tap = call.tap
    assert (tap.prompt_tokens, tap.cached_tokens, tap.output_tokens) == counted(last_usage(events))
    assert tap.output_tokens == sum(len(ids) for _, ids in tap.ids) > 0
    assert tap.scheduled_at is not None
    assert tap.first_token_at is not None
    assert before < tap.scheduled_at < tap.first_token_at < time.monotonic()


async def test_what_its_cache_holds_is_told(engine: base.Engine) -> None:
    told = engine.blocks
    assert told is not None
    messages = [{"role": "system", "content": "The mill stands by the river. " * 80}, *ASK]
    body = body_for(CHAT, messages, 2)
    names = prefix.read(prompt.hashes(body, 0, engine.base))
    assert len(names) == 4

    async def ask(messages: list[dict[str, Any]], chain: tuple[int, ...]) -> set[int]:
        """What of `names` it holds then."""
        async with asgi.request(engine.app, CHAT, body_for(CHAT, messages, 2)) as call:
            call.tap.chain, call.tap.body_size = chain, len(orjson.dumps(body))
            await call.json()
        told.changes()
        return set(names) & set(told.held())

    async def is_told() -> bool:
        return await ask(messages, names) == set(names)

    async def is_gone() -> bool:
        return not await ask(ASK, ())

    await until(is_told)
    loaded: Any = engine
    await loaded._llm.reset_prefix_cache()
    await until(is_gone)
    await until(is_told)


async def test_choices_of_several_prompts_number_on(engine: base.Engine) -> None:
    body = {"model": engine.base, "prompt": ["One, two,", "Red, green,"], "n": 2, "max_tokens": 6, "seed": 1}
    async with asgi.request(engine.app, COMPLETIONS, body | {"return_token_ids": True}) as call:
        answer = await call.json()
    tapped: dict[int, list[int]] = {}
    for index, ids in call.tap.ids:
        tapped.setdefault(index, []).extend(ids)
    assert tapped == {choice["index"]: choice["token_ids"] for choice in answer["choices"]}
    assert sorted(tapped) == [0, 1, 2, 3]
    assert call.tap.prompt_tokens == answer["usage"]["prompt_tokens"]


async def test_a_whole_answer_tells_of_its_first_token_while_it_is_made(engine: base.Engine) -> None:
    """Else it would hold the worker's prefill credit to its end."""
    first = asyncio.Event()
    body = body_for(CHAT, ASK, 500, ignore_eos=True, n=2, temperature=1)  # greedy allows no second choice
    async with asgi.request(engine.app, CHAT, body) as call:
        call.tap.on_first_token = first.set
        await asyncio.wait_for(first.wait(), LIMIT)
        assert call.tap.output_tokens == 0
        assert engine.stats().running
        assert call.tap.scheduled_at is not None
        assert call.tap.first_token_at is not None
        assert call.tap.scheduled_at < call.tap.first_token_at
        call.disconnect()
        await call.ended()
    await until(lambda: idle(engine))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_a_disconnect_in_prefill_stops_it(engine: base.Engine, path: str, stream: bool) -> None:
    body = body_for(path, LONG, 200, stream=stream)
    # A prompt of its own each time: a prefix hit would skip the prefill.
    body |= (
        {"cache_salt": f"{path}{stream}".replace("/", ".")}
        if path != MESSAGES
        else {"system": f"{path}{stream}"}
    )
    async with asgi.request(engine.app, path, body) as call:
        await until(lambda: engine.stats().running == 1)
        assert call.tap.first_token_at is None
        call.disconnect()
        await call.ended()
    assert call.tap.output_tokens == 0
    await until(lambda: idle(engine))


async def test_each_step_is_told(engine: base.Engine) -> None:
    seen: list[base.EngineStats] = []
    engine.on_change = lambda: seen.append(engine.stats())
    try:
        await asgi.ask(engine.app, CHAT, body_for(CHAT, ASK, 8, ignore_eos=True))
        await until(lambda: idle(engine))
    finally:
        engine.on_change = None
    steps = [stats.steps for stats in seen]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    assert len(steps) >= 8
    held = max(stats.kv_tokens_total - stats.kv_tokens_free for stats in seen)
    assert held == 64  # 34 prompt tokens and 8 more, in blocks of 32
    assert seen[-1].kv_block_tokens == 32


async def test_the_callers_request_id_is_the_engines(engine: base.Engine) -> None:
    async def named(scope: base.Scope, receive: base.Receive, send: base.Send) -> None:
        scope["headers"].append((b"x-request-id", b"mill-7"))
        await engine.app(scope, receive, send)

    assert (await asgi.ask(named, CHAT, body_for(CHAT, ASK, 1)))["id"] == "chatcmpl-mill-7"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_required_tool_is_called_by_its_schema(engine: base.Engine, stream: bool) -> None:
    body = body_for(CHAT, [{"role": "user", "content": "Weather in Oslo?"}], 60, stream=stream)
    body |= {"tools": [WEATHER], "tool_choice": "required"}
    async with asgi.request(engine.app, CHAT, body) as call:
        if stream:
            pieces = [
                piece["function"]
                async for event in call.events()
                for choice in event["choices"]
                for piece in choice["delta"].get("tool_calls") or ()
            ]
            function = {
                "name": "".join(piece.get("name") or "" for piece in pieces),
                "arguments": "".join(piece.get("arguments") or "" for piece in pieces),
            }
        else:
            (tool_call,) = (await call.json())["choices"][0]["message"]["tool_calls"]
            function = tool_call["function"]
    assert function["name"] == "get_weather"
    assert json.loads(function["arguments"]) == {"city": "Oslo"}


async def test_structured_output_and_logprobs(engine: base.Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "ok": {"type": "boolean"}},
        "required": ["size", "ok"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    body = body_for(CHAT, ASK, 60, response_format=format_, logprobs=True, top_logprobs=3)
    choice = (await asgi.ask(engine.app, CHAT, body))["choices"][0]
    answer = json.loads(choice["message"]["content"])
    assert answer["size"] in ("small", "large")
    assert isinstance(answer["ok"], bool)
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith(choice["message"]["content"])
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in tokens)


async def test_refuses_what_it_cannot_start() -> None:
    with pytest.raises(errors.EngineFailed, match="no directory with a model"):
        await vllm.start(VllmConfig(model="/nowhere"))
    with pytest.raises(errors.EngineFailed, match="no-such-option"):
        await vllm.start(VllmConfig(model=str(MODEL), extra={"no_such_option": 1}))
    with pytest.raises(errors.EngineFailed, match=r"max_model_len|8192"):
        await vllm.start(VllmConfig(model=str(MODEL), max_model_len=10**6))


# Processes. Each of these starts an engine of its own.

SMALL = VllmConfig(model=str(MODEL), max_num_seqs=4, kv_cache_bytes=64 * 2**20)
SCRIPT = """
import asyncio, sys
import uvloop
from tests import asgi
from workers.config import VllmConfig
from workers.engines import vllm

async def main():
    engine = await vllm.start(VllmConfig.model_validate_json(sys.argv[1]))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await engine.close()
    await engine.close()

uvloop.run(main())
"""


@pytest.fixture
async def process() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has started an engine; a line on its stdin closes it."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SCRIPT,
        SMALL.model_dump_json(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 120) == b"ready\n"
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def core_of(pid: int) -> psutil.Process:
    (core,) = (child for child in psutil.Process(pid).children() if "EngineCore" in "".join(child.cmdline()))
    return core


def ended(process: psutil.Process) -> bool:
    """An orphan may stay a zombie where no init reaps it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def test_close_leaves_no_process_and_no_noise(process: asyncio.subprocess.Process) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    assert core_of(process.pid) in children
    _, noise = await asyncio.wait_for(process.communicate(b"\n"), LIMIT)
    assert process.returncode == 0
    assert noise == b""
    await until(lambda: all(ended(child) for child in children), 2.0)  # multiprocessing's tracker goes last


async def test_the_core_dies_with_a_killed_worker(process: asyncio.subprocess.Process) -> None:
    core = core_of(process.pid)
    process.kill()
    await until(lambda: ended(core), 2.0)


async def test_an_embedding_model_offers_embeddings_only(vllm_engine: base.Engine) -> None:
    """The demo model, its last hidden state taken for an embedding."""
    engine = await vllm.start(SMALL.model_copy(update={"extra": {"runner": "pooling", "convert": "embed"}}))
    try:
        assert "/v1/embeddings" in engine.models[0].paths
        assert not {CHAT, COMPLETIONS} & set(engine.models[0].paths)
        body = {"model": engine.base, "input": ["A mill.", "A water wheel."]}
        async with asgi.request(engine.app, "/v1/embeddings", body) as call:
            answer = await call.json()
        assert [len(item["embedding"]) for item in answer["data"]] == [576, 576]
        assert call.tap.prompt_tokens == answer["usage"]["prompt_tokens"] > 0
        await until(lambda: idle(engine))
    finally:
        await engine.close()


async def test_a_killed_core_is_noticed_at_once(vllm_engine: base.Engine) -> None:
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    engine = await vllm.start(SMALL)
    try:
        (core,) = (
            child
            for child in psutil.Process().children(recursive=True)
            if child.pid not in mine and "EngineCore" in "".join(child.cmdline())
        )
        async with asgi.request(
            engine.app, CHAT, body_for(CHAT, ASK, 500, stream=True, ignore_eos=True)
        ) as call:
            await anext(call.chunks())
            core.kill()
            with pytest.raises(errors.EngineFailed, match="exit code -9"):
                await asyncio.wait_for(asyncio.shield(engine.died), 0.5)
            await asyncio.wait_for(call.ended(), LIMIT)
    finally:
        await engine.close()
    assert ended(core)
    assert not vllm_engine.died.done()
