"""Adapters' files in the object store, over the real broker and the fake."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker import artifacts, client, entries, errors, objects, subjects
from broker.base import Broker
from broker.config import BrokerConfig
from broker.entries import File, ModelEntry, Version
from broker.memory import MemoryBroker
from broker.server import NatsServer

STREAM = subjects.objects(subjects.ARTIFACTS)
FILES = {artifacts.CONFIG: b"{}", artifacts.WEIGHTS: bytes(range(256)) * 2000}
LIMIT = 2**20
"""Bytes of the store: room for two of these adapters."""


@pytest.fixture(params=["memory", "nats"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    if request.param == "memory":
        async with MemoryBroker(BrokerConfig(artifact_bytes=LIMIT)) as broker:
            yield broker
        return
    async with NatsServer(tmp_path / "nats") as server:
        config = BrokerConfig(url=server.url, artifact_bytes=LIMIT)
        async with await client.connect(config, "test") as connection:
            yield connection


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """An empty directory."""
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def version(files: tuple[File, ...], number: int = 1) -> Version:
    return Version(number=number, digest=artifacts.digest_of(FILES), rank=8, files=files)


def changed(files: tuple[File, ...], **changes: Any) -> Version:
    """A version whose weights the catalogue describes otherwise."""
    return version(tuple(f.model_copy(update=changes) if f.name == artifacts.WEIGHTS else f for f in files))


def bigger(files: tuple[File, ...], by: int) -> Version:
    """A version whose weights have `by` bytes more, as its catalogue says, and its configuration fewer."""
    config, weights = files
    return version(
        (
            config.model_copy(update={"size": config.size - by}),
            weights.model_copy(update={"size": weights.size + by}),
        )
    )


async def test_what_is_put_is_fetched(broker: Broker, into: Path) -> None:
    files = await artifacts.put(broker, "my org/support*", FILES)
    assert {file.name: file.size for file in files} == {name: len(data) for name, data in FILES.items()}
    await artifacts.fetch(broker, version(files), into)
    assert read(into) == FILES
    await artifacts.remove(broker, files)
    await artifacts.remove(broker, files)
    assert await broker.counts(STREAM, subjects.all_objects(subjects.ARTIFACTS)) == {}
    with pytest.raises(errors.AdapterFailed, match=r"adapter_config\.json is missing or damaged"):
        await artifacts.fetch(broker, version(files), into)


async def test_what_is_not_what_was_pushed_is_never_handed_out(broker: Broker, into: Path) -> None:
    files = await artifacts.put(broker, "support", FILES)
    weights = files[1]
    for told, says in (
        (changed(files, digest="sha256:" + "0" * 64), "safetensors is corrupt"),
        (changed(files, digest="sha256:" + "0" * 63), "no sha256 digest"),
        (changed(files, size=weights.size + 1), "safetensors is truncated"),
        (changed(files, size=weights.size - 1), "safetensors is another"),
        (changed(files, size=artifacts.MAX_BYTES), "more than"),
        (bigger(files, 10**15), "fewer than 0"),
        (changed(files, object="nothing"), "safetensors is missing"),
        (changed(files, name="../adapter_model.safetensors"), "has the files"),
        (changed(files, name="adapter_model.bin"), "has the files"),
        (version((*files, weights)), "has the files"),
        (version(()), "has the files"),
    ):
        with pytest.raises(errors.AdapterFailed, match=says):
            await artifacts.fetch(broker, told, into)
        assert read(into).keys() <= {artifacts.CONFIG}
    (chunks,) = [
        subject
        for subject, count in (
            await broker.counts(STREAM, subjects.all_object_chunks(subjects.ARTIFACTS))
        ).items()
        if count > 1
    ]
    first = (await broker.read(STREAM, chunks))[0]
    await broker.delete(STREAM, first.seq)
    with pytest.raises(
        errors.AdapterFailed, match=r"adapter_model\.safetensors is missing or damaged.* not whole"
    ):
        await artifacts.fetch(broker, version(files), into)


async def test_a_file_is_never_in_memory_whole(into: Path) -> None:
    size = 16 * 2**20
    async with MemoryBroker(BrokerConfig()) as broker:
        files = await artifacts.put(broker, "support", {**FILES, artifacts.WEIGHTS: bytes(size)})
        tracemalloc.start()
        try:
            await artifacts.fetch(broker, version(files), into)
            assert tracemalloc.get_traced_memory()[1] < size / 2
        finally:
            tracemalloc.stop()
    assert (into / artifacts.WEIGHTS).stat().st_size == size


async def test_a_full_disk_is_no_fault_of_the_adapter(broker: Broker, into: Path) -> None:
    files = await artifacts.put(broker, "support", FILES)
    (into / artifacts.CONFIG).mkdir()  # the likes of it: it can't be written
    with pytest.raises(IsADirectoryError):
        await artifacts.fetch(broker, version(files), into)


async def test_many_long_names_make_a_short_reason(broker: Broker, into: Path) -> None:
    files = [File(name="\ue000" * 250 + str(n), size=1, digest="", object="o") for n in range(100)]
    with pytest.raises(errors.AdapterFailed) as caught:
        await artifacts.fetch(broker, version(tuple(files)), into)
    assert len(caught.value.message) < 500


async def test_other_files_are_not_taken(broker: Broker) -> None:
    for files in ({}, {**FILES, "adapter_model.bin": b""}, {artifacts.CONFIG: b"{}"}):
        with pytest.raises(errors.AdapterFailed, match="an adapter has the files"):
            await artifacts.put(broker, "support", files)


async def test_a_full_store_says_so_and_keeps_nothing_of_the_newcomer(broker: Broker) -> None:
    await artifacts.put(broker, "one", FILES)
    before = await broker.counts(STREAM, subjects.all_objects(subjects.ARTIFACTS))
    with pytest.raises(errors.Overloaded, match="the store for adapters is full"):
        await artifacts.put(broker, "two", {**FILES, artifacts.WEIGHTS: bytes(900_000)})
    assert await broker.counts(STREAM, subjects.all_objects(subjects.ARTIFACTS)) == before


async def test_a_sweep_takes_what_no_version_names(broker: Broker, into: Path) -> None:
    kept = await artifacts.put(broker, "support", FILES)
    lost = await artifacts.put(broker, "support", {**FILES, artifacts.WEIGHTS: b"left by a crash"})
    half = subjects.object_chunks(subjects.ARTIFACTS, "halfway")
    await (await broker.enqueue(half, b"chunk of an object that was never described"))
    entry = ModelEntry(name="support", kind="adapter", versions=(version(kept),), current=1)
    now = time.time() * 1000
    assert await artifacts.sweep(broker, [entry], now - 60_000) == []  # a push may be about to name it
    removed = await artifacts.sweep(broker, [entry], now + 60_000)
    assert set(removed) == {*(file.object for file in lost), "chunks of halfway"}
    await artifacts.fetch(broker, version(kept), into)
    assert await artifacts.sweep(broker, [entry], now + 60_000) == []
    await artifacts.sweep(broker, [], now + 60_000)
    assert await broker.counts(STREAM, subjects.all_objects(subjects.ARTIFACTS)) == {}


async def test_entries_that_can_not_be_read_are_told_apart(broker: Broker) -> None:
    await entries.change(broker, "my org/a", lambda _: ModelEntry(name="", kind="alias"))
    await broker.put(subjects.KV_CATALOGUE, "newer", b'{"kind":"of a later release"}')
    found, unreadable = await entries.read_all(broker)
    assert (list(found), unreadable) == (["my org/a"], ["newer"])
    with pytest.raises(errors.MalformedMessage, match="'newer' is unreadable: Field required"):
        await entries.read(broker, "newer")


async def test_an_entry_that_only_keeps_a_number_is_none_to_who_follows(broker: Broker) -> None:
    followed = entries.Entries(broker)
    await followed.watch()
    await entries.change(broker, "a", lambda _: ModelEntry(name="", kind="alias", last=3))
    assert list((await entries.read_all(broker))[0].values()) == [ModelEntry(name="a", kind="alias", last=3)]
    vacant = await entries.change(broker, "a", lambda _: ModelEntry(name="", kind="adapter", last=3))
    assert vacant is not None
    assert vacant.vacant
    await broker.sync()
    assert followed.entries == {}
    assert (await entries.read(broker, "a")) == vacant


async def test_an_object_of_another_clients_is_left_alone_where_a_version_names_it(
    broker: Broker, into: Path
) -> None:
    """As `nats object put` stores it."""
    data = {name: f"{name}@home" for name in FILES}
    for name, key in data.items():
        await objects.put(broker, subjects.ARTIFACTS, key, FILES[name])
    files = tuple(
        File(name=name, size=len(FILES[name]), digest=artifacts.digest(FILES[name]), object=key)
        for name, key in data.items()
    )
    entry = ModelEntry(name="support", kind="adapter", versions=(version(files),), current=1)
    assert await artifacts.sweep(broker, [entry], time.time() * 1000 + 60_000) == []
    await artifacts.fetch(broker, version(files), into)
