"""Bad input gets a clear error each time, and nobody else notices."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import orjson
import psutil
import pytest

from tests.acceptance.conftest import MODEL, Fleet

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]

CHAT = "/v1/chat/completions"


def chat(**more: Any) -> bytes:
    return orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]} | more)


def deep(levels: int) -> bytes:
    return chat()[:-1] + b',"metadata":' + b"[" * levels + b"]" * levels + b"}"


# name: (path, body, status, what the message says)
BAD: dict[str, tuple[str, bytes, int, str]] = {
    "no JSON": (CHAT, b"{not json", 400, "not valid JSON"),
    "empty": (CHAT, b"", 400, "not valid JSON"),
    "no object": (CHAT, b"[1, 2]", 400, "must be a JSON object"),
    "no model": (CHAT, b'{"messages": []}', 400, "`model` is missing"),
    "unknown model": (CHAT, chat(model="no such/model.*>"), 404, MODEL),
    "messages of a wrong type": (CHAT, chat(messages="hello"), 400, "messages"),
    "no messages": (CHAT, chat(messages=[]), 400, ""),
    "unknown role": (CHAT, chat(messages=[{"role": "miller", "content": 3}]), 400, ""),
    "max_tokens of a wrong type": (CHAT, chat(max_tokens="ten"), 400, "max_tokens"),
    "max_tokens negative": (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    "max_tokens huge": (CHAT, chat(max_tokens=10**9), 400, "2048"),
    "max_tokens beyond 64 bits": (CHAT, chat()[:-1] + b',"max_tokens":' + b"9" * 30 + b"}", 400, ""),
    "temperature out of range": (CHAT, chat(temperature=99), 400, "temperature"),
    "n out of range": (CHAT, chat(n=0), 400, "n"),
    "stream of a wrong type": (CHAT, chat(stream="yes"), 422, "`stream`"),
    "a field the engine refuses": (CHAT, chat(response_format={"type": "poem"}), 400, "response_format"),
    "a schema that is none": (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}),
        400,
        "",
    ),
    "prompt past the context": (
        CHAT,
        chat(messages=[{"role": "user", "content": "water " * 5000}]),
        400,
        "2048",
    ),
    "NUL": (CHAT, chat(messages=[{"role": "user", "content": "a\0b"}]), 400, "NUL"),
    "broken unicode": (CHAT, chat()[:-1] + b',"user":"\xff\xfe"}', 400, "not valid JSON"),
    "a lone surrogate": (CHAT, chat()[:-1] + b',"user":"\\ud800"}', 400, "not valid JSON"),
    "deeply nested": (CHAT, deep(100_000), 400, ""),
    "40 MB": (CHAT, chat(user="x" * 40_000_000), 413, "33,554,432"),
    "prompt of a wrong type": (
        "/v1/completions",
        orjson.dumps({"model": MODEL, "prompt": {"a": 1}}),
        400,
        "",
    ),
    "unknown token": ("/v1/completions", orjson.dumps({"model": MODEL, "prompt": [10**6]}), 400, ""),
    "no input": ("/v1/responses", orjson.dumps({"model": MODEL}), 400, "input"),
    "no max_tokens": ("/v1/messages", chat(), 400, "max_tokens"),
    "unknown path": ("/v1/nothing", chat(), 404, ""),
}


@pytest.mark.parametrize("name", BAD)
async def test_it_is_told(http: httpx.AsyncClient, name: str) -> None:
    path, body, status, words = BAD[name]
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert words in error["message"] or words in str(error.get("param"))
    assert len(answer.content) < 4000


async def test_all_at_once_disturb_nobody(
    fleet: Fleet, http: httpx.AsyncClient, openai_client: openai.AsyncOpenAI
) -> None:
    family = {member.pid for member in psutil.Process(fleet.process.pid).children(recursive=True)}

    async def stream() -> int:
        tokens = 0
        async for chunk in await openai_client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Tell me of the mill"}],
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return tokens

    bystander = asyncio.create_task(stream())
    answers = await asyncio.gather(*(http.post(path, content=body) for path, body, _, _ in BAD.values()))
    assert await bystander == 60
    assert [answer.status_code for answer in answers] == [status for _, _, status, _ in BAD.values()]
    assert {member.pid for member in psutil.Process(fleet.process.pid).children(recursive=True)} == family
