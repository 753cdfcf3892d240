"""Requests that were recorded: JSON objects, one a line, as Mooncake and BurstGPT have them.

Mooncake: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (one a 512 tokens of the prompt; an
id is the same only where everything before it is). BurstGPT: `Timestamp` (s), `Request tokens`, `Response
tokens`; its lines of responses that failed have 0 of the latter, and are left out. It tells of no prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import orjson

from ops.errors import TraceError
from ops.simulate.calls import Call
from ops.simulate.fleet_file import TraceSection

MOONCAKE_BLOCK = 512
"""Tokens of one of its ids."""

MOST_IDS = 2**40
"""So many are told apart."""


def calls(section: TraceSection, source: int, block_size: int, context: int) -> Iterator[Call]:
    """The requests in order of time, the first at 0; those of more than `context` tokens are left out.

    Raises TraceError, which says which line is wrong, and how.
    """
    read: _Read = _Mooncake(block_size, source) if section.format == "mooncake" else _BurstGPT()
    try:
        with section.file.open("rb") as opened:
            for at, one in _read(opened, read, section):
                if one.output >= 1 and one.prompt + one.output <= context:
                    hashes, shareable = read.blocks(one)
                    yield Call(at, source, section.tenant, one.prompt, one.output, hashes, shareable)
    except OSError as exc:
        raise TraceError(f"{section.file} can't be read: {exc.strerror}") from exc


@dataclass(frozen=True, slots=True)
class _Line:
    """`at`: seconds, since whatever the trace counts from."""

    at: float
    prompt: int
    output: int
    ids: tuple[int, ...] = ()


class _Read(Protocol):
    """A format."""

    def line(self, line: dict[str, Any]) -> _Line:
        """Raises KeyError, ValueError."""

    def blocks(self, one: _Line) -> tuple[tuple[int, ...], int]:
        """Hashes of one that is asked, and what those before it make shareable of its prompt."""


def _read(lines: BinaryIO, read: _Read, section: TraceSection) -> Iterator[tuple[float, _Line]]:
    """Each with when it comes."""
    began, before = None, 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tree = orjson.loads(line)
            if not isinstance(tree, dict):
                raise ValueError("it is no JSON object")
            one = read.line(tree)
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as exc:
            raise TraceError(f"{section.file}:{number}: {_wrong(exc)}") from exc
        if began is None:
            began = before = one.at
        if one.at < before:
            raise TraceError(f"{section.file}:{number}: it comes before the line above: sort them by time")
        before = one.at
        yield (one.at - began) / section.speed, one


def _wrong(exc: Exception) -> str:
    if isinstance(exc, KeyError):
        return f"{exc.args[0]!r} is missing"
    return str(exc)


class _Mooncake:
    """Hashes are made of the ids, and of the number of the trace, which keeps them apart from all others'."""

    def __init__(self, block_size: int, source: int) -> None:
        self._parts = MOONCAKE_BLOCK // block_size
        self._size = block_size
        self._first = source << 52
        self._seen: set[int] = set()

    def line(self, line: dict[str, Any]) -> _Line:
        prompt, ids = _tokens(line, "input_length", 1), line["hash_ids"]
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < MOST_IDS for one in ids):
            raise ValueError(f"'hash_ids' is no list of whole numbers from 0 to below {MOST_IDS}")
        if len(ids) < (needed := -(-prompt // MOONCAKE_BLOCK)):
            raise ValueError(f"'hash_ids' has {len(ids)} of {needed}, one for each {MOONCAKE_BLOCK} tokens")
        return _Line(_time(line, "timestamp") / 1000, prompt, _tokens(line, "output_length"), tuple(ids))

    def blocks(self, one: _Line) -> tuple[tuple[int, ...], int]:
        known = 0
        while known < len(one.ids) and one.ids[known] in self._seen:
            known += 1
        self._seen.update(one.ids)
        starts = (self._first + each * self._parts for each in one.ids)
        hashes = tuple(start + part for start in starts for part in range(self._parts))
        shareable = min(known * MOONCAKE_BLOCK, one.prompt - 1) // self._size * self._size
        return hashes[: one.prompt // self._size], shareable


class _BurstGPT:
    def line(self, line: dict[str, Any]) -> _Line:
        prompt, output = _tokens(line, "Request tokens", 1), _tokens(line, "Response tokens")
        return _Line(_time(line, "Timestamp"), prompt, output)

    def blocks(self, one: _Line) -> tuple[tuple[int, ...], int]:
        return (), 0


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
