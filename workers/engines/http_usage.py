"""What a response passing by tells of its tokens, at the cost of a byte search a chunk."""

from __future__ import annotations

import time
from typing import Any

import orjson

from workers.engines.base import Tap

MAX_KEPT = 4 * 2**20
"""Bytes of a body, or of one line of a stream, that are kept to be read; a longer one goes uncounted."""


class Meter:
    """Counts a response's tokens into `tap`.

    In a stream each SSE event counts as one token, the final `[DONE]` apart, until the last event
    with a `usage` in it says better: so the count is off by the few events that bear no token where
    the client asked for no usage.
    """

    def __init__(self, tap: Tap, *, streamed: bool) -> None:
        self._tap = tap
        self._streamed = streamed
        self._kept = b""
        self._usage = b""
        self._too_long = False

    def feed(self, chunk: bytes) -> None:
        if self._too_long:
            return
        self._kept += chunk
        if len(self._kept) > MAX_KEPT:
            self._too_long, self._kept = True, b""
        elif self._streamed:
            self._count_events()

    def _count_events(self) -> None:
        # Whole lines only; what follows the last newline waits for the rest of its line.
        cut = self._kept.rfind(b"\n") + 1
        lines, self._kept = self._kept[:cut], self._kept[cut:]
        events = lines.count(b"\ndata:") + lines.startswith(b"data:")
        events -= lines.count(b"data: [DONE]")
        if b'"usage"' in lines:
            self._usage = lines
        if events > 0:
            self._tap.count(time.monotonic(), events)

    def end(self) -> None:
        """The response is complete: put the counts right."""
        usage = _last_usage(self._usage) if self._streamed else _usage_of(self._kept)
        prompt, cached, output = _counts(usage)
        tap = self._tap
        tap.prompt_tokens = prompt or tap.prompt_tokens
        tap.cached_tokens = tap.cached_tokens if cached is None else cached
        if output is None:
            return
        if not self._streamed:
            tap.count(time.monotonic(), output)
        tap.output_tokens = output


def _last_usage(lines: bytes) -> dict[str, Any]:
    found = [line[5:] for line in lines.split(b"\n") if line.startswith(b"data:") and b'"usage"' in line]
    return _usage_of(found[-1]) if found else {}


def _usage_of(document: bytes) -> dict[str, Any]:
    """The `usage` object of a body or event; Responses events carry it in their `response`."""
    try:
        value = orjson.loads(document)
    except orjson.JSONDecodeError:
        return {}
    for holder in (value, value.get("response")) if isinstance(value, dict) else ():
        if isinstance(holder, dict) and isinstance(usage := holder.get("usage"), dict):
            return usage
    return {}


def _counts(usage: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """(prompt, cached, output) tokens, in the words of OpenAI's two APIs or of Anthropic's."""
    if "prompt_tokens" in usage:
        details = usage.get("prompt_tokens_details")
        return _int(usage["prompt_tokens"]), _inner(details), _int(usage.get("completion_tokens"))
    prompt, output = _int(usage.get("input_tokens")), _int(usage.get("output_tokens"))
    if "cache_read_input_tokens" in usage:
        # Anthropic counts what the cache held beside the input, not within it.
        cached = _int(usage["cache_read_input_tokens"]) or 0
        return (prompt or 0) + cached, cached, output
    return prompt, _inner(usage.get("input_tokens_details")), output


def _inner(details: Any) -> int | None:
    return _int(details.get("cached_tokens")) if isinstance(details, dict) else None


def _int(value: Any) -> int | None:
    return value if type(value) is int else None
