"""The official OpenAI client against the real engine through the real queue."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import openai
import pytest

from tests.acceptance.conftest import MODEL, Fleet

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]

ASK: list[Any] = [{"role": "user", "content": "Who are you?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer"}},
    "required": ["size", "count"],
    "additionalProperties": False,
}


async def test_models(openai_client: openai.AsyncOpenAI) -> None:
    assert MODEL in [model.id async for model in openai_client.models.list()]


async def test_chat_and_its_usage_event(fleet: Fleet, openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=24, temperature=0, extra_headers={"X-Request-Id": "accept-1"}
    )
    choice = answer.choices[0]
    assert answer.id == "chatcmpl-accept-1"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    event = await fleet.usage("accept-1")
    assert (event.outcome, event.status, event.model) == ("finished", 200, MODEL)
    assert event.prompt_tokens == answer.usage.prompt_tokens == 34
    assert event.completion_tokens == answer.usage.completion_tokens
    parts = event.latency
    assert None not in (parts.queue, parts.engine_wait, parts.prefill, parts.ttft, parts.decode, parts.total)


async def test_stream_says_what_the_whole_answer_says(openai_client: openai.AsyncOpenAI) -> None:
    whole = await openai_client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=24, temperature=0
    )
    text, usage, reasons = "", None, []
    async for chunk in await openai_client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


async def test_cached_tokens_of_a_repeated_prompt(openai_client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "The wheel turns and the water runs. " * 20}]
    cached = []
    for _ in range(2):
        answer = await openai_client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        cached.append((details.cached_tokens if details else 0) or 0)
    assert cached[0] < cached[1]
    assert cached[1] % 32 == 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_tools(openai_client: openai.AsyncOpenAI, choice: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
    answer = await openai_client.chat.completions.create(
        model=MODEL, messages=messages, tools=[TOOL], tool_choice=choice, max_tokens=60, temperature=0
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    # The result goes back in, and the model answers in words.
    messages += [answer.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear", "celsius": 3}'}]
    after = await openai_client.chat.completions.create(
        model=MODEL, messages=messages, tools=[TOOL], tool_choice="none", max_tokens=24, temperature=0
    )
    assert after.choices[0].message.content


async def test_tools_streamed(openai_client: openai.AsyncOpenAI) -> None:
    name, arguments, reason = "", "", None
    async for chunk in await openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather in Oslo?"}],
        tools=[TOOL],
        tool_choice="required",
        max_tokens=60,
        temperature=0,
        stream=True,
    ):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for piece in choice.delta.tool_calls or ():
                assert piece.function is not None
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Oslo"})
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_json_schema(openai_client: openai.AsyncOpenAI, stream: bool) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How many wheels has the mill? Answer in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "mill", "schema": SCHEMA}},
        "max_tokens": 80,
        "temperature": 0,
    }
    if stream:
        chunks = [chunk async for chunk in await openai_client.chat.completions.create(**asked, stream=True)]
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    else:
        text = (await openai_client.chat.completions.create(**asked)).choices[0].message.content
    answer = json.loads(text)
    assert answer["size"] in ("small", "large")
    assert isinstance(answer["count"], int)


async def test_logprobs(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 8
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.001
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy takes the likeliest


async def test_two_choices(openai_client: openai.AsyncOpenAI) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": ASK,
        "max_tokens": 10,
        "n": 2,
        "extra_body": {"ignore_eos": True},
    }
    answer = await openai_client.chat.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    texts = {0: "", 1: ""}
    async for chunk in await openai_client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(texts.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_completions(openai_client: openai.AsyncOpenAI, stream: bool) -> None:
    asked: Any = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    if stream:
        chunks = [chunk async for chunk in await openai_client.completions.create(**asked, stream=True)]
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    else:
        text = (await openai_client.completions.create(**asked)).choices[0].text
    assert "Paris" in text


async def test_responses(openai_client: openai.AsyncOpenAI) -> None:
    whole = await openai_client.responses.create(
        model=MODEL, input="Who are you?", max_output_tokens=24, temperature=0
    )
    assert whole.output_text
    assert whole.usage is not None
    assert 0 < whole.usage.output_tokens <= 24
    text, last = "", ""
    async for event in await openai_client.responses.create(
        model=MODEL, input="Who are you?", max_output_tokens=24, temperature=0, stream=True
    ):
        last = event.type
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == whole.output_text
    assert last in ("response.completed", "response.incomplete")


async def test_tokenize_and_back(openai_client: openai.AsyncOpenAI) -> None:
    tokens = await openai_client.post(
        "/../tokenize", body={"model": MODEL, "prompt": "a mill"}, cast_to=object
    )
    assert isinstance(tokens, dict)
    assert tokens["count"] == len(tokens["tokens"]) > 0
    text = await openai_client.post(
        "/../detokenize", body={"model": MODEL, "tokens": tokens["tokens"]}, cast_to=object
    )
    assert text == {"prompt": "a mill"}


async def test_embeddings_are_refused_with_what_is_served(openai_client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"does not serve /v1/embeddings.*/v1/chat/completions"):
        await openai_client.embeddings.create(model=MODEL, input="water")


async def test_streams_beyond_the_slots_all_finish(fleet: Fleet, openai_client: openai.AsyncOpenAI) -> None:
    """Three times as many as the engine holds: the rest waits in the queue, and nothing mixes."""

    async def one(number: int) -> int:
        pieces = 0
        async for chunk in await openai_client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Story number {number}"}],
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            extra_headers={"X-Request-Id": f"crowd-{number}"},
        ):
            assert chunk.id == f"chatcmpl-crowd-{number}"
            pieces = chunk.usage.completion_tokens if chunk.usage else pieces
        return pieces

    assert await asyncio.gather(*map(one, range(12))) == [16] * 12
    assert (await fleet.usage("crowd-11")).outcome == "finished"
