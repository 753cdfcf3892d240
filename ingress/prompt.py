"""What the dispatcher is told of a prompt: hashes of its beginning, and the bound of its answer. Pure.

An engine's prefix cache knows tokens; here it is the JSON of what the tokens are made from, in the order in
which chat templates have it, so that requests with one beginning have the same hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from kvstate import prefix

_MOST = prefix.BLOCK * prefix.LIMIT
_FIELDS = ("tools", "functions", "instructions", "system", "messages", "prompt", "input")
_LARGE = 2**20
"""Bytes of a body of which no part is written anew, but its texts."""
_BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_MOST_TOKENS = 10**9 - 1


def hashes(body: Mapping[str, Any], size: int, model: str) -> str:
    """The header `Prefix` for a body of `size` bytes that `model` answers; "" for a short prompt."""
    beginning = b""
    for part in _parts(body, size <= _LARGE):
        beginning += part
        if len(beginning) >= _MOST:
            break
    salt = body.get("cache_salt")  # what vLLM keeps caches apart by
    found = prefix.chain(beginning[:_MOST], prefix.seed(salt if isinstance(salt, str) else "", model))
    return prefix.encode(found) if found else ""


def budget(body: Mapping[str, Any]) -> int:
    """Most output tokens that the caller wants; 0 = any number."""
    given = (body.get(name) for name in _BOUNDS)
    return next((min(n, _MOST_TOKENS) for n in given if type(n) is int and n > 0), 0)


def _parts(body: Mapping[str, Any], whole: bool) -> Iterator[bytes]:
    for field in _FIELDS:
        value = body.get(field)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield item[:_MOST].encode("utf-8", "replace")
            elif isinstance(item, dict) and isinstance(text := item.get("content"), str):
                yield f"\0{item.get('role')}\0{text[:_MOST]}".encode("utf-8", "replace")
            elif item is not None and whole:
                yield b"\0" + orjson.dumps(item)
