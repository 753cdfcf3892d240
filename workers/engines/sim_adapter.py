"""What the simulated engine wants of an adapter's files: that they could be an adapter, no weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from broker import artifacts, errors
from workers.engines import weights


async def check(path: Path, max_rank: int) -> None:
    """Raises errors.AdapterFailed for what PEFT would not load, or a rank above `max_rank`."""
    await asyncio.to_thread(_check, path, max_rank)


def _check(path: Path, max_rank: int) -> None:
    try:
        rank = int(orjson.loads((path / artifacts.CONFIG).read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise errors.AdapterFailed(f"{artifacts.CONFIG} can't be read: {exc!r}") from exc
    if not 0 < rank <= max_rank:
        raise errors.AdapterFailed(f"rank {rank} is not among 1 to {max_rank}, which the engine takes")
    weights.check(path, {})
