"""Push an adapter straight into the catalogue, as `headrace adapters push` does after its checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from broker import artifacts, base, entries
from broker.entries import ModelEntry, Version
from tests.adapters import write_adapter


def files(
    rank: int = 8, seed: int = 0, shapes: Mapping[str, Any] | Path | None = None, **more: Any
) -> dict[str, bytes]:
    """An adapter's files, as `write_adapter` writes them."""
    with TemporaryDirectory() as made:
        write_adapter(Path(made), shapes, rank=rank, seed=seed, **more)
        return {name: (Path(made) / name).read_bytes() for name in artifacts.FILES}


async def push(
    broker: base.Broker,
    name: str,
    content: Mapping[str, bytes] | None = None,
    *,
    base_model: str = "sim",
    rank: int = 8,
) -> Version:
    """The next version of adapter `name`, which its bare name means from now on."""
    content = content or files(rank)
    stored = await artifacts.put(broker, name, content)
    digest, size = artifacts.digest_of(content), sum(map(len, content.values()))

    def with_one_more(entry: ModelEntry | None) -> ModelEntry:
        before = entry or ModelEntry(name=name, kind="adapter", base=base_model)
        number = max((version.number for version in before.versions), default=0) + 1
        made = Version(number=number, digest=digest, rank=rank, size=size, files=stored)
        return before.model_copy(update={"versions": (*before.versions, made), "current": number})

    entry = await entries.change(broker, name, with_one_more)
    assert entry is not None
    return entry.versions[-1]


async def drop(broker: base.Broker, name: str, number: int) -> None:
    """Take one version out of the catalogue."""

    def without(entry: ModelEntry | None) -> ModelEntry:
        assert entry is not None
        return entry.model_copy(update={"versions": tuple(v for v in entry.versions if v.number != number)})

    await entries.change(broker, name, without)
