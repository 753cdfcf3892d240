"""Requests that were recorded: JSON objects, one a line, as Mooncake and BurstGPT have them.

Mooncake: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (one a 512 tokens of the prompt; an
id is the same only where everything before it is). BurstGPT: `Timestamp` (s), `Request tokens`, `Response
tokens`; its lines of responses that failed have 0 of the latter, and are left out. It tells of no prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import orjson

from ops.errors import TraceError
from ops.simulate.calls import Call
from ops.simulate.fleet_file import TraceSection

MOONCAKE_BLOCK = 512
"""Tokens of one of its ids."""


def calls(section: TraceSection, source: int, block_size: int, context: int) -> Iterator[Call]:
    """The requests in order of time, the first at 0; those of more than `context` tokens are left out.

    Raises TraceError, which says which line is wrong, and how.
    """
    read: _Read = _Mooncake(block_size) if section.format == "mooncake" else _burstgpt
    try:
        with section.file.open("rb") as opened:
            yield from _calls(opened, read, section, source, context)
    except OSError as exc:
        raise TraceError(f"{section.file} can't be read: {exc.strerror}") from exc


_Read = Callable[[dict[str, Any]], tuple[float, int, int, tuple[int, ...], int]]


def _calls(lines: BinaryIO, read: _Read, section: TraceSection, source: int, context: int) -> Iterator[Call]:
    began, before = None, 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = orjson.loads(line)
            if not isinstance(one, dict):
                raise ValueError("it is no JSON object")
            at, prompt, output, hashes, shareable = read(one)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as exc:
            raise TraceError(f"{section.file}:{number}: {_wrong(exc)}") from exc
        if began is None:
            began = before = at
        if at < before:
            raise TraceError(f"{section.file}:{number}: it comes before the line above: sort them by time")
        before = at
        if output < 1 or prompt + output > context:
            continue
        yield Call((at - began) / section.speed, source, section.tenant, prompt, output, hashes, shareable)


def _wrong(exc: Exception) -> str:
    if isinstance(exc, KeyError):
        return f"{exc.args[0]!r} is missing"
    return str(exc)


class _Mooncake:
    def __init__(self, block_size: int) -> None:
        self._parts = MOONCAKE_BLOCK // block_size
        self._size = block_size
        self._seen: set[int] = set()

    def __call__(self, line: dict[str, Any]) -> tuple[float, int, int, tuple[int, ...], int]:
        prompt, ids = _tokens(line, "input_length", 1), line["hash_ids"]
        if not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise ValueError("'hash_ids' is no list of whole numbers")
        if len(ids) < (needed := -(-prompt // MOONCAKE_BLOCK)):
            raise ValueError(f"'hash_ids' has {len(ids)} of {needed}, one for each {MOONCAKE_BLOCK} tokens")
        known = 0
        while known < len(ids) and ids[known] in self._seen:
            known += 1
        self._seen.update(ids)
        parts = self._parts
        hashes = tuple(one * parts + part for one in ids for part in range(parts))[: prompt // self._size]
        shareable = min(known * MOONCAKE_BLOCK, prompt - 1) // self._size * self._size
        return _time(line, "timestamp") / 1000, prompt, _tokens(line, "output_length"), hashes, shareable


def _burstgpt(line: dict[str, Any]) -> tuple[float, int, int, tuple[int, ...], int]:
    prompt, output = _tokens(line, "Request tokens", 1), _tokens(line, "Response tokens")
    return _time(line, "Timestamp"), prompt, output, (), 0


def _tokens(line: dict[str, Any], key: str, least: int = 0) -> int:
    value = line[key]
    if type(value) is not int or value < least:
        raise ValueError(f"{key!r} is {value!r}, and not a number of tokens")
    return value


def _time(line: dict[str, Any], key: str) -> float:
    value = line[key]
    if type(value) not in (int, float):
        raise ValueError(f"{key!r} is {value!r}, and not a time")
    return float(value)
