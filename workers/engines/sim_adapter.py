"""What the simulated engine wants of an adapter's files: that they could be an adapter, no weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from broker import artifacts, errors

_LENGTH = 8
"""Bytes of the header's length, at the head of a safetensors file."""


async def check(path: Path, max_rank: int) -> None:
    """Raises errors.AdapterFailed for what PEFT would not load, or a rank above `max_rank`."""
    await asyncio.to_thread(_check, path, max_rank)


def _check(path: Path, max_rank: int) -> None:
    try:
        config = orjson.loads((path / artifacts.CONFIG).read_bytes())
        rank = int(config["r"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise errors.AdapterFailed(f"{artifacts.CONFIG} can't be read: {exc!r}") from exc
    if not 0 < rank <= max_rank:
        raise errors.AdapterFailed(f"rank {rank} is not among 1 to {max_rank}, which the engine takes")
    try:
        with (path / artifacts.WEIGHTS).open("rb") as weights:
            length = int.from_bytes(weights.read(_LENGTH), "little")
            size = (path / artifacts.WEIGHTS).stat().st_size
            header = orjson.loads(weights.read(length)) if length <= size - _LENGTH else None
    except (OSError, ValueError) as exc:
        raise errors.AdapterFailed(f"{artifacts.WEIGHTS} can't be read: {exc!r}") from exc
    if not isinstance(header, dict):
        raise errors.AdapterFailed(f"{artifacts.WEIGHTS} has no header, or is cut off within it")
