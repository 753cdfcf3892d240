"""Streams of the official clients, each with the bytes that it came as."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, NamedTuple, Self

import anthropic
import httpx
import openai

from tests.acceptance.conftest import MODEL

NOISE = 0.5
"""By how much the logit of a greedy token may be below the highest, as another run sees them: bf16 has 8
significant bits, and logits are about 20."""

_ID = re.compile(rb"(\d+)-(\d+)-(\d+)")


class Event(NamedTuple):
    """One server-sent event: `place` is its id's (epoch, frame, number), or empty; `at` is monotonic time."""

    place: tuple[int, ...]
    data: str
    at: float


class Clients:
    """The official clients of one ingress. An async context manager."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
        more: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60}
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", **more)
        self.anthropic = anthropic.AsyncAnthropic(base_url=url, **more)
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for client in (self.http, self.openai, self.anthropic):
            await self._open.enter_async_context(client)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._open.aclose()

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = await self.http.post(path, json={"model": MODEL} | body)
        assert answer.status_code == 200, answer.text
        return answer.json()


class Stream:
    """One answer as its client reads it.

    Attributes:
        text: what was said, as content or as a tool call's arguments.
        ids: token ids, on endpoints that can tell them.
        tokens: events that brought a token; on an undisturbed stream there is one for each.
        within: the last token ended inside a character, so that its text is still to come.
        events: the whole events that the answer came as.
        moved: when the last bytes came, in monotonic time.
    """

    def __init__(self, clients: Clients, api: str, asked: Mapping[str, Any]) -> None:
        self.request_id = uuid.uuid4().hex
        self.text, self.tool, self.reason = "", "", ""
        self.ids: list[int] = []
        self.tokens = 0
        self.usage = 0
        self.within = False
        self.events: list[Event] = []
        self.moved = time.monotonic()
        self._rest = b""
        self._clients = clients
        self._api = api
        self._asked = {"model": MODEL, "stream": True} | dict(asked)
        self._answer: Any = None

    async def begin(self) -> str:
        """The worker that answers."""
        create: Any = {
            "chat": self._clients.openai.chat.completions.create,
            "responses": self._clients.openai.responses.create,
            "messages": self._clients.anthropic.messages.create,
        }[self._api]
        self._answer = await create(**self._asked, extra_headers={"X-Request-Id": self.request_id})
        response = self._answer.response
        response.aiter_bytes = self._teed(
            response.aiter_bytes()
        )  # what the client reads, whatever its HTTP library
        return str(response.headers.get("x-headrace-worker", ""))  # untold where it waited for long

    async def leave(self) -> None:
        await self._answer.response.aclose()

    async def read(self) -> Self:
        """To its end."""
        take = {"chat": self._chat, "responses": self._response, "messages": self._message}[self._api]
        async for event in self._answer:
            take(event)
        assert not self._rest, "the stream ended in the middle of an event"
        return self

    def _teed(self, parts: AsyncIterator[bytes]) -> Callable[[], AsyncIterator[bytes]]:
        async def teed() -> AsyncIterator[bytes]:
            async for part in parts:
                self._feed(part)
                yield part

        return teed

    def _feed(self, part: bytes) -> None:
        self.moved = time.monotonic()
        *events, self._rest = (self._rest + part).split(b"\n\n")
        for event in events:
            lines = dict(line.partition(b": ")[::2] for line in event.split(b"\n"))
            if b"data" in lines:
                found = _ID.fullmatch(lines.get(b"id", b""))
                place = tuple(map(int, found.groups())) if found else ()
                self.events.append(Event(place, lines[b"data"].decode(), self.moved))

    def epochs(self) -> set[int]:
        return {event.place[0] for event in self.events if event.place}

    def _said(self, text: str, ids: list[int]) -> None:
        self.text += text
        self.ids += ids
        if text or ids:
            self.tokens += 1
            self.within = bool(ids) and not text

    def _chat(self, chunk: Any) -> None:
        if chunk.usage:
            self.usage = chunk.usage.completion_tokens
        for choice in chunk.choices:
            calls = [call.function for call in choice.delta.tool_calls or ()]
            self.tool += "".join(call.name or "" for call in calls)
            text = "".join([choice.delta.content or "", *(call.arguments or "" for call in calls)])
            self._said(text, getattr(choice, "token_ids", None) or [])
            self.reason = choice.finish_reason or self.reason

    def _response(self, event: Any) -> None:
        if event.type == "response.output_text.delta":
            self._said(event.delta, [])
        elif event.type in ("response.completed", "response.incomplete"):
            self.usage = event.response.usage.output_tokens
            details = event.response.incomplete_details
            self.reason = details.reason if details else "completed"

    def _message(self, event: Any) -> None:
        if event.type == "content_block_delta":
            self._said(event.delta.text, [])
        elif event.type == "message_delta":
            self.usage = event.usage.output_tokens
            self.reason = event.delta.stop_reason


async def lead(clients: Clients, messages: list[dict[str, str]], text: str) -> float:
    """By how much another token was likelier than the one taken, at most, in a greedy answer."""
    prompt = (await clients.post("/tokenize", {"messages": messages}))["tokens"]
    said = await clients.post("/tokenize", {"prompt": text, "add_special_tokens": False})
    whole = [*prompt, *said["tokens"]]
    asked = {"prompt": whole, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
    told = (await clients.post("/v1/completions", asked))["choices"][0]["prompt_logprobs"]
    leads: list[float] = [
        max(other["logprob"] for other in likely.values()) - likely[str(token)]["logprob"]
        for token, likely in list(zip(whole, told, strict=True))[len(prompt) :]
    ]
    return max(leads)


def kinds(events: list[Event]) -> list[str]:
    """What each event is: its type, `[DONE]`, or "chunk"."""
    return [
        event.data if event.data == "[DONE]" else json.loads(event.data).get("type", "chunk")
        for event in events
    ]
