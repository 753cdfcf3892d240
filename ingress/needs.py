"""What a request needs of the model that serves it. Read from the caller's JSON, and only when asked for:
most requests name a model of which nothing is declared, and pay nothing.

Whatever has another form than expected counts as absent: the engine judges it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from broker.entries import Capability
from ingress import language

_PATHS: dict[str, Capability] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
_SCHEMAS = ("guided_json", "guided_grammar", "guided_regex", "guided_choice", "structured_outputs")
_OUTPUTS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_IMAGES = ("image_url", "input_image", "image", "video_url", "input_video")

_MOST_TEXT = 4000
"""Characters of a text that are looked at for its language or intent, half from each end: what is asked
stands before or after what it is asked of."""
_MOST_WORDS_OF = 400_000
"""Characters of a text whose words are counted, some 2 ms."""
_LONGEST_TOKEN = 128
"""Characters: tokenizers know such runs of spaces."""
_MOST_PARTS = 10_000
"""Parts of a prompt that are looked at."""


class Needs:
    """Of one request. `path` of the API, `body` as parsed, `size` its bytes, `declared` the language that
    its caller says it is in."""

    def __init__(self, path: str, body: Mapping[str, Any], size: int = 0, declared: str = "") -> None:
        self.size = size
        self._path = path
        self._body = body
        self._declared = declared

    @functools.cached_property
    def capabilities(self) -> frozenset[Capability]:
        found: set[Capability] = set()
        if self._path in _PATHS:
            found.add(_PATHS[self._path])
        body = self._body
        if body.get("tools") and body.get("tool_choice") != "none":
            found.add("tools")
        if any(body.get(name) for name in _SCHEMAS) or self._asks_json():
            found.add("json_schema")
        if any(_is_image(part) for part in self._parts):
            found.add("vision")
        return frozenset(found)

    def _asks_json(self) -> bool:
        text = self._body.get("text")
        wanted = self._body.get("response_format") or (text.get("format") if isinstance(text, dict) else None)
        return isinstance(wanted, dict) and wanted.get("type") in ("json_schema", "json_object")

    @functools.cached_property
    def least_tokens(self) -> int:
        """Tokens that the prompt surely has: no tokenizer joins words, or very many characters."""
        if self._body.get("truncate_prompt_tokens") or self._body.get("truncation") == "auto":
            return 0
        if (ids := self._prompt_ids()) is not None:
            return ids
        return sum(_least(text) for text in self._texts)

    @functools.cached_property
    def likely_tokens(self) -> int:
        """Tokens of the prompt as English has them, and of the answer where the caller bounds it."""
        ids = self._prompt_ids()
        prompt = ids if ids is not None else sum(len(text) // 4 + 4 for text in self._texts)
        return prompt + next(
            (n for name in _OUTPUTS if isinstance(n := self._body.get(name), int) and n > 0), 0
        )

    @functools.cached_property
    def languages(self) -> frozenset[str]:
        """Languages that the request may be in, by primary subtag; empty = it does not show."""
        if self._declared:
            return frozenset({self._declared})
        return language.of(self.question)

    @functools.cached_property
    def question(self) -> str:
        """What the conversation began with: the same at each of its turns."""
        turns = list(self._turns())
        return cut(next((text for role, text in turns if role == "user"), turns[0][1] if turns else ""))

    @functools.cached_property
    def opening(self) -> str:
        """What tells one conversation from another: its system prompt and first question."""
        system = self._body.get("instructions") or self._body.get("system") or ""
        parts = [system if isinstance(system, str) else " ".join(_texts(system))]
        for role, text in self._turns():
            parts.append(text)
            if role == "user":
                break
        return "\0".join(parts)

    @functools.cached_property
    def _parts(self) -> list[Mapping[str, Any]]:
        """Of all messages, those that have parts."""
        contents = (turn.get("content") for turn in self._messages())
        lists = (content for content in contents if isinstance(content, list))
        parts = (part for part in itertools.chain.from_iterable(lists) if isinstance(part, dict))
        return list(itertools.islice(parts, _MOST_PARTS))

    @functools.cached_property
    def _texts(self) -> list[str]:
        body = self._body
        found = [text for _, text in self._turns()]
        for name in ("instructions", "system"):
            found += _texts(body.get(name))
        return found

    def _messages(self) -> Iterator[Mapping[str, Any]]:
        for name in ("messages", "input"):
            turns = self._body.get(name)
            if isinstance(turns, list):
                yield from (turn for turn in turns if isinstance(turn, dict))

    def _turns(self) -> Iterator[tuple[str, str]]:
        """(role, text) of each message; of a bare prompt the one text, as the user's."""
        for turn in self._messages():
            role, text = str(turn.get("role", "user")), " ".join(_texts(turn.get("content")))
            # Chat templates drop what a model thought at earlier turns.
            yield role, text.rpartition("</think>")[2] if role == "assistant" else text
        for name in ("prompt", "input"):
            prompt = self._body.get(name)
            if isinstance(prompt, str):
                yield "user", prompt
            elif isinstance(prompt, list):
                yield from (("user", one) for one in prompt if isinstance(one, str))

    def _prompt_ids(self) -> int | None:
        """Length of a prompt of token ids, or of the longest of several."""
        prompt = self._body.get("prompt", self._body.get("input"))
        if not isinstance(prompt, list) or not prompt:
            return None
        if all(isinstance(one, int) for one in prompt):
            return len(prompt)
        if all(isinstance(one, list) for one in prompt):
            return max(len(one) for one in prompt)
        return None


def _least(text: str) -> int:
    rest = max(0, len(text) - _MOST_WORDS_OF)
    return max(len(text[:_MOST_WORDS_OF].split()), 1 if text else 0) + rest // _LONGEST_TOKEN


def cut(text: str) -> str:
    half = _MOST_TEXT // 2
    return text if len(text) <= _MOST_TEXT else f"{text[:half]} {text[-half:]}"


def _texts(content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    parts = itertools.islice((part for part in content if isinstance(part, dict)), _MOST_PARTS)
    return [text for part in parts if isinstance(text := part.get("text"), str)]


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in _IMAGES
