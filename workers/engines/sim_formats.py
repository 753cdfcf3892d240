"""The four response formats of the simulated engine, streamed and whole.

A streamed token costs one concatenation of bytes: everything around its text is made once a request.
The text is ASCII that JSON need not escape (`sim_tokens.text_of`).
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import orjson

from workers.engines.sim_request import Generation

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """The text of one choice so far, and how it ended."""

    prompt: list[int]
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt: int
    cached: int
    output: int

    def openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.output,
            "completion_tokens": self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Format(ABC):
    """One response. Streamed: `opening`, then `token` and `last` for each choice, then `closing`."""

    def __init__(self, model: str, generation: Generation, prompts: list[list[int]]) -> None:
        self.model = model
        self.generation = generation
        self.prompts = prompts
        self.id = uuid.uuid4().hex
        self.created = int(time.time())

    @abstractmethod
    def opening(self) -> bytes:
        """Events before the first token. `prompts` has one entry a choice."""

    @abstractmethod
    def token(self, index: int, text: str, ids: list[int]) -> bytes:
        """The event of one token of choice `index`; `text` may lag behind `ids`."""

    @abstractmethod
    def last(self, index: int, text: str, ids: list[int], reason: str) -> bytes:
        """As `token`, for the token that ends the choice. `reason`: "stop" or "length"."""

    @abstractmethod
    def closing(self, choices: list[Choice], usage: Usage) -> bytes: ...

    @abstractmethod
    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The response that is not streamed."""


class Completions(Format):
    """`/v1/completions`; chat differs in the names."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    before: bytes = b'"text":"'
    after: bytes = b'"'

    def __init__(self, model: str, generation: Generation, prompts: list[list[int]]) -> None:
        super().__init__(model, generation, prompts)
        self._head = b"data: " + orjson.dumps(self._envelope(self.chunk_kind))[:-1] + b',"choices":['
        self._heads = [self._head + b'{"index":%d,' % i + self.before for i in range(len(prompts))]
        self._tail = self.after + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._return_ids = generation.return_ids

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self) -> bytes:
        return b""

    def token(self, index: int, text: str, ids: list[int]) -> bytes:
        if self._return_ids:
            return self._event(index, text, ids, None)
        return self._heads[index] + text.encode() + self._tail

    def last(self, index: int, text: str, ids: list[int], reason: str) -> bytes:
        return self._event(index, text, ids, reason)

    def _event(self, index: int, text: str, ids: list[int], reason: str | None) -> bytes:
        more: dict[str, Any] = {"logprobs": None, "finish_reason": reason}
        if self._return_ids:
            more["token_ids"] = ids
        # orjson's opening brace becomes the comma between the two parts of the choice.
        return self._heads[index] + text.encode() + self.after + b"," + orjson.dumps(more)[1:] + b"]}\n\n"

    def closing(self, choices: list[Choice], usage: Usage) -> bytes:
        if not self.generation.usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(usage.openai()) + b"}\n\n" + DONE

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        made = [
            self._choice(choice)
            | {"index": index, "logprobs": None, "finish_reason": choice.reason}
            | ({"token_ids": choice.ids} if self._return_ids else {})
            for index, choice in enumerate(choices)
        ]
        return self._envelope(self.kind) | {"choices": made, "usage": usage.openai()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        ids = {"prompt_token_ids": choice.prompt} if self._return_ids else {}
        return {"text": "".join(choice.text)} | ids


class Chat(Completions):
    """`/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    before = b'"delta":{"content":"'
    after = b'"}'

    def opening(self) -> bytes:
        role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        end = b"}\n\n"
        if self._return_ids:
            end = b',"prompt_token_ids":' + orjson.dumps(self.prompts[0]) + end
        return b"".join(self._head + role % index + end for index in range(len(self.prompts)))

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        ids = {"prompt_token_ids": choices[0].prompt} if self._return_ids else {}
        return super().whole(choices, usage) | ids

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": "".join(choice.text)}}


def _event(value: dict[str, Any]) -> bytes:
    kind: str = value["type"]
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"


class Responses(Format):
    """`/v1/responses`: one output item, a message with one text part."""

    _sequence = 0

    def _number(self, kind: str, **fields: Any) -> bytes:
        event = {"type": f"response.{kind}", "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return _event(event)

    def _where(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    def _item(self, text: str, reason: str) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "status": _status(reason),
            "content": [self._part(text)] if reason else [],
        }

    def _response(self, reason: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": _status(reason),
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "error": None,
            "instructions": None,
            "metadata": {},
            "output": output,
            "parallel_tool_calls": True,
            "temperature": None,
            "top_p": None,
            "tool_choice": "none",
            "tools": [],
            "max_output_tokens": self.generation.limits[0],
            "usage": None
            if usage is None
            else {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.output,
            },
        }

    def opening(self) -> bytes:
        return b"".join(
            (
                self._number("created", response=self._response("", [], None)),
                self._number("in_progress", response=self._response("", [], None)),
                self._number("output_item.added", output_index=0, item=self._item("", "")),
                self._number("content_part.added", **self._where(), part=self._part("")),
            )
        )

    def token(self, index: int, text: str, ids: list[int]) -> bytes:
        return self._number("output_text.delta", **self._where(), delta=text, logprobs=[])

    def last(self, index: int, text: str, ids: list[int], reason: str) -> bytes:
        return self.token(index, text, ids)

    def closing(self, choices: list[Choice], usage: Usage) -> bytes:
        text, reason = "".join(choices[0].text), choices[0].reason
        item = self._item(text, reason)
        response = self._response(reason, [item], usage)
        return b"".join(
            (
                self._number("output_text.done", **self._where(), text=text, logprobs=[]),
                self._number("content_part.done", **self._where(), part=self._part(text)),
                self._number("output_item.done", output_index=0, item=item),
                self._number("completed" if reason == "stop" else "incomplete", response=response),
            )
        )

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        text, reason = "".join(choices[0].text), choices[0].reason
        return self._response(reason, [self._item(text, reason)], usage)


def _status(reason: str) -> str:
    return {"": "in_progress", "stop": "completed", "length": "incomplete"}[reason]


class Messages(Format):
    """`/v1/messages`: Anthropic's, one text block."""

    def _message(self, content: list[dict[str, Any]], reason: str, usage: Usage) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": _stop_reason(reason),
            "stop_sequence": None,
            "usage": _anthropic_usage(usage),
        }

    def opening(self) -> bytes:
        # The cache hit is known only to the engine's answer, `closing` tells it.
        start = self._message([], "", Usage(len(self.prompts[0]), 0, 0))
        block = {"type": "text", "text": ""}
        return _event({"type": "message_start", "message": start}) + _event(
            {"type": "content_block_start", "index": 0, "content_block": block}
        )

    def token(self, index: int, text: str, ids: list[int]) -> bytes:
        delta = {"type": "text_delta", "text": text}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta})

    def last(self, index: int, text: str, ids: list[int], reason: str) -> bytes:
        return self.token(index, text, ids)

    def closing(self, choices: list[Choice], usage: Usage) -> bytes:
        delta = {"stop_reason": _stop_reason(choices[0].reason), "stop_sequence": None}
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": delta, "usage": _anthropic_usage(usage)})
            + _event({"type": "message_stop"})
        )

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        content = [{"type": "text", "text": "".join(choices[0].text)}]
        return self._message(content, choices[0].reason, usage)


def _stop_reason(reason: str) -> str | None:
    return {"": None, "stop": "end_turn", "length": "max_tokens"}[reason]


def _anthropic_usage(usage: Usage) -> dict[str, Any]:
    # Anthropic counts what the cache held beside the input, not within it.
    return {
        "input_tokens": usage.prompt - usage.cached,
        "output_tokens": usage.output,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
    }


FORMATS: dict[str, type[Format]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completions,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
}
