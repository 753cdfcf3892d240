"""Bodies of the simulated engine's endpoints, checked and read into one shape.

A refused body raises `Refused` with what vLLM would say: 400 for values, 404 for names.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import orjson

from workers.config import SimConfig
from workers.engines import sim_tokens

CHAT_TOKENS = 64
"""Length at which a chat answer ends by itself (`finish_reason: stop`) when no limit is given."""
COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` of a completion."""
MAX_SEQUENCES = 1024
"""Prompts times choices in one request."""

# Asked for and not simulated: better refused than answered by something else.
_NOT_SIMULATED = (
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "best_of",
    "use_beam_search",
    "suffix",
)
_SEVERAL_CHOICES = ("/v1/chat/completions", "/v1/completions")


class Refused(Exception):
    """The request can't be run. `kind` is the error's type as vLLM names it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    @property
    def kind(self) -> str:
        return "NotFoundError" if self.status == 404 else "BadRequestError"

    def body(self) -> bytes:
        return error_body(self.message, self.kind, self.status, self.param)


def error_body(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    """vLLM's error object: OpenAI's shape, with the HTTP status as `code`."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


@dataclass(frozen=True, slots=True)
class Generation:
    """What to generate.

    Attributes:
        prompts: token ids of each prompt; several only for completions.
        limits: output tokens of each prompt's choices.
        ends: whether the model ends by itself at output token `CHAT_TOKENS`.
        n: choices for each prompt; choice c of prompt p has index `p * n + c`.
        min_tokens: output tokens before which no stop string counts.
        salt: keeps the prefix cache of one `cache_salt`, and of one adapter, from any other.
        adapter: the name of the adapter that answers; "" = the base does.
    """

    prompts: list[list[int]]
    limits: list[int]
    ends: bool
    n: int
    stops: tuple[str, ...]
    min_tokens: int
    stream: bool
    usage: bool
    return_ids: bool
    salt: int
    adapter: str = ""


def load(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Refused(f"The request body is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise Refused("The request body must be a JSON object.")
    return value


def read(path: str, body: dict[str, Any], config: SimConfig, adapter: str = "") -> Generation:
    """The body of one of the generating endpoints, for the base or an adapter of it."""
    for name in _NOT_SIMULATED:
        if body.get(name):
            raise Refused(f"`{name}` is not simulated by this engine.", name)
    prompts = _prompts(path, body)
    n = _integer(body, "n", 1, low=1, high=128) if path in _SEVERAL_CHOICES else 1
    if len(prompts) * n > MAX_SEQUENCES:
        raise Refused(f"At most {MAX_SEQUENCES} prompts times choices in one request.", "n")
    options = _typed(body, "stream_options", dict, {})
    salt = _typed(body, "cache_salt", str, "")
    asked = _limit(path, body)
    limits = [_bounded(path, prompt, asked, config.context_tokens) for prompt in prompts]
    return Generation(
        prompts=prompts,
        limits=limits,
        ends=asked is None and path != "/v1/completions",
        n=n,
        stops=_stops(body),
        min_tokens=_integer(body, "min_tokens", 0, low=0),
        stream=_typed(body, "stream", bool, False),
        usage=_typed(options, "include_usage", bool, False),
        return_ids=_typed(body, "return_token_ids", bool, False),
        salt=(zlib.crc32(salt.encode("utf-8")) if salt else 0) ^ sim_tokens.salt_of(adapter),
        adapter=adapter,
    )


def tokenized(body: dict[str, Any]) -> list[int]:
    """The tokens that `/tokenize` answers with, for a `prompt` or for `messages`."""
    if "messages" in body:
        return sim_tokens.tokenize(_chat(body, "messages"))
    return sim_tokens.tokenize(_typed(body, "prompt", str))


def _prompts(path: str, body: dict[str, Any]) -> list[list[int]]:
    transfer = _typed(body, "kv_transfer_params", dict, {})
    if (ids := transfer.get("prompt_token_ids")) is not None:
        return [_ids(ids, "kv_transfer_params")]
    if path == "/v1/completions":
        return _completion_prompts(body.get("prompt"))
    text = _responses(body) if path == "/v1/responses" else _chat(body, "messages")
    return [sim_tokens.tokenize(text)]


def _completion_prompts(prompt: Any) -> list[list[int]]:
    """A text, a list of token ids, or a list of either."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = []
    for one in prompt if several else [prompt]:
        if isinstance(one, str):
            prompts.append(sim_tokens.tokenize(one))
            if not one:
                raise Refused("The prompt must not be empty.", "prompt")
        else:
            prompts.append(_ids(one, "prompt"))
    return prompts


def _ids(value: Any, param: str) -> list[int]:
    ok = isinstance(value, list) and value and all(type(i) is int and 0 <= i < 1 << 31 for i in value)
    if not ok:
        raise Refused(f"`{param}` must hold a non-empty list of token ids, or a text.", param)
    ids: list[int] = value
    return ids


def _chat(body: dict[str, Any], key: str) -> str:
    pairs = [_message(item, key) for item in _typed(body, key, list)]
    if not pairs:
        raise Refused(f"`{key}` must not be empty.", key)
    if system := body.get("system"):
        pairs.insert(0, ("system", _text(system, "system")))
    return sim_tokens.chat_prompt(pairs)


def _responses(body: dict[str, Any]) -> str:
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    pairs = [_message(item, "input") for item in _typed({"input": messages}, "input", list)]
    if not pairs:
        raise Refused("`input` must not be empty.", "input")
    if instructions := _typed(body, "instructions", str, ""):
        pairs.insert(0, ("system", instructions))
    return sim_tokens.chat_prompt(pairs)


def _message(item: Any, param: str) -> tuple[str, str]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise Refused(f"Each of `{param}` must be an object with a `role`.", param)
    return item["role"], _text(item.get("content"), param)


def _text(content: Any, param: str) -> str:
    """A message's content: a text, null, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(f"A content in `{param}` must be a text or a list of parts.", param)
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise Refused(f"Only text parts are simulated in `{param}`.", param)
    return "".join(map(str, texts))


def _limit(path: str, body: dict[str, Any]) -> int | None:
    names = {
        "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
        "/v1/completions": ("max_tokens",),
        "/v1/responses": ("max_output_tokens",),
        "/v1/messages": ("max_tokens",),
    }[path]
    for name in names:
        if body.get(name) is not None:
            return _integer(body, name, 0, low=1)
    if path == "/v1/messages":
        raise Refused("`max_tokens` is required.", "max_tokens")
    return None


def _bounded(path: str, prompt: list[int], asked: int | None, context: int) -> int:
    room = context - len(prompt)
    if room < 1:
        raise Refused(
            f"This model's maximum context length is {context} tokens. However, your prompt contains"
            f" {len(prompt)} input tokens, which exceeds this limit even without any output tokens."
            " Please reduce the length of the input prompt.",
            "input_tokens",
        )
    if asked is not None:
        if asked > room:
            raise Refused(
                "'max_tokens' or 'max_completion_tokens' is too large:"
                f" {asked}. This model's maximum context length is {context} tokens and your request has"
                f" {len(prompt)} input tokens ({asked} > {context} - {len(prompt)}).",
                "max_tokens",
            )
        return asked
    if path == "/v1/completions":
        return min(COMPLETION_TOKENS, room)
    # Counted from the answer's first token, so that a continuation ends where the whole would have.
    done = sim_tokens.Continuation(prompt).number
    return min(max(CHAT_TOKENS - done, 1), room)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    given = body.get("stop") or body.get("stop_sequences") or []
    stops = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else None
    if stops is None or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused("`stop` must be a text or a list of texts.", "stop")
    return stops


_MISSING: Any = object()


def _typed(body: dict[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    value = body.get(name)
    if value is None and default is not _MISSING:
        return default
    if not isinstance(value, kind):
        what = "is required and" if value is None else "must be of the right type: it"
        raise Refused(f"`{name}` {what} must be a JSON {_JSON_NAMES[kind]}.", name)
    return value


_JSON_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean"}


def _integer(body: dict[str, Any], name: str, default: int, *, low: int, high: int = 1 << 62) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        bound = f"at least {low}" if high == 1 << 62 else f"from {low} to {high}"
        raise Refused(f"`{name}` must be an integer, {bound}, not {value!r:.80}.", name)
    return value
