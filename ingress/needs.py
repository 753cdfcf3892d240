"""What a request needs of the model that serves it. Read from the caller's JSON, and only when asked for:
most requests name a model of which nothing is declared, and pay nothing.

Whatever has another form than expected counts as absent, and so does what lies beyond the bounds of what is
read: the engine judges it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from broker.entries import Capability
from ingress import language
from ingress.body import Reading, cut, mark

_PATHS: dict[str, Capability] = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
_COUNTING = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""No context bounds what is only counted."""
_SCHEMAS = ("guided_json", "guided_grammar", "guided_regex", "guided_choice", "structured_outputs")
_OUTPUTS = ("max_completion_tokens", "max_output_tokens", "max_tokens")

_MOST_OUTPUT = 2**31
"""Tokens of an answer; what is larger means no bound, and is no number for JSON's readers."""
_MOST_WORDS_OF = 400_000
"""Characters of a request whose words are counted, some 10 ms at most."""
_MOST_IDS = 10_000
"""Items of a prompt that are looked at for whether they are token ids."""
_LONGEST_TOKEN = 128
"""Characters: tokenizers know such runs of spaces."""


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
        if body.get("tools") and body.get("tool_choice") not in ("none", {"type": "none"}):
            found.add("tools")
        if body.get("functions") and body.get("function_call") != "none":
            found.add("tools")
        if any(body.get(name) for name in _SCHEMAS) or self._asks_json():
            found.add("json_schema")
        if self._read.image:
            found.add("vision")
        return frozenset(found)

    def _asks_json(self) -> bool:
        """In OpenAI's form of either API, or Anthropic's."""
        nested = (self._body.get(name) for name in ("text", "output_config"))
        formats = [each.get("format") for each in nested if isinstance(each, dict)]
        formats += [self._body.get("response_format"), self._body.get("output_format")]
        return any(
            isinstance(each, dict) and each.get("type") in ("json_schema", "json_object") for each in formats
        )

    @functools.cached_property
    def least_tokens(self) -> int:
        """Tokens that the prompt surely has, or the longest of several: no tokenizer joins words, or very
        many characters. Fewer than half of the body's bytes."""
        if self._path in _COUNTING:
            return 0
        if self._body.get("truncate_prompt_tokens") or self._body.get("truncation") == "auto":
            return 0
        if (ids := self._prompt_ids()) is not None:
            return ids
        texts = self._conversation
        counts = _least([*texts, *self._read.prompts])
        return max([sum(counts[: len(texts)]), *counts[len(texts) :]])

    @functools.cached_property
    def likely_tokens(self) -> int:
        """Tokens of the prompt as English has them, and of the answer where the caller bounds it."""
        if self._path in _COUNTING:
            return 0
        prompt = self._prompt_ids()
        if prompt is None:
            whole = sum(map(_likely, self._conversation))
            prompt = max([whole, *map(_likely, self._read.prompts)])
        given = (self._body.get(name) for name in _OUTPUTS)
        return prompt + next((min(n, _MOST_OUTPUT) for n in given if isinstance(n, int) and n > 0), 0)

    @functools.cached_property
    def languages(self) -> frozenset[str]:
        """Languages that the request may be in, by primary subtag; empty = it does not show."""
        if self._declared:
            return frozenset({self._declared})
        return language.of(self.question)

    @functools.cached_property
    def sure_languages(self) -> frozenset[str]:
        """Those that it must be in one of, so that a model without them can't serve it."""
        if self._declared:
            return frozenset({self._declared})
        return language.surely(self.question)

    @functools.cached_property
    def question(self) -> str:
        """What the conversation began with: the same at each of its turns."""
        first = next(self._said(), ("", ""))[1]
        return cut(next((text for role, text in self._said() if role == "user"), first))

    @functools.cached_property
    def opening(self) -> str:
        """What tells one conversation from another: its system prompt and first question; where they have no
        text, whatever else stands in their place."""
        system = self._body.get("instructions") or self._body.get("system") or ""
        parts = [system if isinstance(system, str) else " ".join(self._read.system)]
        for role, text in self._said():
            parts.append(text)
            if role == "user":
                break
        return "\0".join(parts) if any(parts) else self._mark()

    def _mark(self) -> str:
        """Of a beginning without text: images alone, or token ids."""
        if self._read.turns:
            roles = [turn.role for turn in self._read.turns]
            end = roles.index("user") + 1 if "user" in roles else 1
            return mark([turn.content for turn in self._read.turns[:end]])
        return mark(self._body.get("prompt") or self._body.get("input") or self._body)

    @functools.cached_property
    def _read(self) -> Reading:
        return Reading(self._body)

    @functools.cached_property
    def _conversation(self) -> list[str]:
        return [*(turn.text for turn in self._read.turns), *self._read.system]

    def _said(self) -> Iterator[tuple[str, str]]:
        """(role, text) of each message; of bare prompts each text, as the user's."""
        yield from ((turn.role, turn.text) for turn in self._read.turns)
        yield from (("user", text) for text in self._read.prompts)

    def _prompt_ids(self) -> int | None:
        """Length of a prompt of token ids, or of the longest of several."""
        prompt = self._body.get("prompt", self._body.get("input"))
        if not isinstance(prompt, list) or not prompt:
            return None
        looked_at = list(itertools.islice(prompt, _MOST_IDS))
        if all(isinstance(one, int) for one in looked_at):
            return len(prompt)
        if all(isinstance(one, list) for one in looked_at):
            return max(len(one) for one in looked_at)
        return None


def _least(texts: Sequence[str]) -> list[int]:
    """Of each text, the words of all counted up to a bound."""
    left = _MOST_WORDS_OF
    found = []
    for text in texts:
        counted = text[:left]
        left -= len(counted)
        words = max(len(counted.split()), 1 if text else 0)
        found.append(words + (len(text) - len(counted)) // _LONGEST_TOKEN)
    return found


def _likely(text: str) -> int:
    return len(text) // 4 + 4
