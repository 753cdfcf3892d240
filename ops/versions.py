"""Versions of an adapter: stored and numbered, made current, taken away. Each change is one compare-and-set
of the adapter's entry, so that two operators at once get two numbers."""

from __future__ import annotations

from typing import NamedTuple

from broker import artifacts, base, entries, errors
from broker.entries import File, ModelEntry, Version
from ops import peft
from ops.catalogue import check_free


class Pushed(NamedTuple):
    """What became of a push. `known`: the same content had a version already; `current` is what the bare name
    means now, 0 = nothing."""

    version: Version
    current: int
    known: bool

    def told(self, name: str, on: str) -> str:
        version = self.version
        has = f"is version {version.number} already" if self.known else f"has version {version.number}"
        means = f"{name} means version {self.current}" if self.current else f"{name} means no version yet"
        facts = f"rank {version.rank} on {on}, {version.size:,} bytes, {version.digest[:19]}"
        return f"{name} {has}: {facts}\n{means}"


async def push(
    broker: base.Broker, name: str, on: str, adapter: peft.Adapter, source: str = "", *, activate: bool = True
) -> Pushed:
    """Store the adapter as a new version of `name`; content that has a version already keeps it. With
    `activate` the bare name means it from now on.

    Broken off before the entry is changed, it leaves files which no version names: see `artifacts.sweep`.
    Raises errors.InvalidRequest, errors.Overloaded, errors.Unavailable.
    """
    digest = adapter.digest
    before = await entries.read(broker, name)
    known = before is not None and any(version.digest == digest for version in before.versions)
    files = () if known else await artifacts.put(broker, name, adapter.files)
    made: Version | None = None  # what the last call of `with_version` added

    def with_version(entry: ModelEntry | None) -> ModelEntry:
        nonlocal made
        entry = _room(name, on, entry)
        found = next((version for version in entry.versions if version.digest == digest), None)
        if found is None and not files:
            raise errors.Unavailable(
                f"the version of {name!r} with this content was just removed: push again"
            )
        made = None
        if found is None:
            number = max([entry.last, *(version.number for version in entry.versions)]) + 1
            made = found = _version(number, adapter, files, source, broker.now_ms())
        return entry.model_copy(
            update={
                "versions": (*entry.versions, made) if made else entry.versions,
                "current": found.number if activate else entry.current,
                "last": max(entry.last, found.number),
                "updated_ms": int(broker.now_ms()),
            }
        )

    try:
        entry = await entries.change(broker, name, with_version)
    except errors.InvalidRequest:
        await artifacts.remove(broker, files)
        raise
    assert entry is not None
    if made is None:
        await artifacts.remove(broker, files)  # somebody else pushed the same meanwhile
    version = next(version for version in entry.versions if version.digest == digest)
    return Pushed(version, entry.current, made is None)


def _room(name: str, on: str, entry: ModelEntry | None) -> ModelEntry:
    """The entry that a version of base `on` may be added to. Raises errors.InvalidRequest."""
    check_free(name, entry, "adapter")
    if entry is None or entry.vacant:
        return ModelEntry(name=name, kind="adapter", base=on, last=entry.last if entry is not None else 0)
    check_base(entry, on)
    return entry


def check_base(entry: ModelEntry, on: str) -> None:
    """Raises errors.InvalidRequest."""
    if entry.base != on:
        raise errors.InvalidRequest(
            f"{entry.name!r} is an adapter of {entry.base!r}, not of {on!r}: push it under another name, or "
            "remove that one first"
        )


def _version(
    number: int, adapter: peft.Adapter, files: tuple[File, ...], source: str, now_ms: float
) -> Version:
    return Version(
        number=number,
        digest=adapter.digest,
        rank=adapter.rank,
        targets=adapter.targets,
        size=adapter.size,
        files=files,
        pushed_ms=int(now_ms),
        source=source,
    )


async def rollback(broker: base.Broker, name: str, number: int = 0) -> tuple[int, int]:
    """Have the bare name mean version `number`, 0 = the newest before the current one; what it meant, and
    means. Raises errors.NotFound, errors.Unavailable."""
    moved = (0, 0)

    def to(entry: ModelEntry | None) -> ModelEntry:
        nonlocal moved
        entry = present(name, entry)
        wanted = number or max((v.number for v in entry.versions if v.number < entry.current), default=0)
        if entry.version(wanted) is None:
            what = f"no version {number}" if number else f"no version before its current one, {entry.current}"
            raise errors.NotFound(f"adapter {name!r} has {what}; there are: {_numbers(entry)}")
        moved = (entry.current, wanted)
        return entry.model_copy(update={"current": wanted, "updated_ms": int(broker.now_ms())})

    await entries.change(broker, name, to)
    return moved


async def remove(broker: base.Broker, name: str, number: int = 0) -> tuple[Version, ...]:
    """Take a version that is not the current one, or with 0 all of them, out of the catalogue, then its files
    out of the store. What went is returned.

    Raises errors.NotFound, errors.InvalidRequest, errors.Unavailable.
    """
    gone: tuple[Version, ...] = ()

    def without(entry: ModelEntry | None) -> ModelEntry:
        nonlocal gone
        entry = present(name, entry)
        last = max([entry.last, *(version.number for version in entry.versions)])
        if not number:
            gone = entry.versions
            return ModelEntry(name=name, kind="adapter", last=last)
        version = entry.version(number)
        if version is None:
            raise errors.NotFound(f"adapter {name!r} has no version {number}; there are: {_numbers(entry)}")
        if number == entry.current:
            raise errors.InvalidRequest(
                f"{name!r} means version {number}: roll back or push first, or remove the adapter as a whole"
            )
        gone = (version,)
        left = tuple(each for each in entry.versions if each.number != number)
        return entry.model_copy(update={"versions": left, "last": last, "updated_ms": int(broker.now_ms())})

    await entries.change(broker, name, without)
    await artifacts.remove(broker, (file for version in gone for file in version.files))
    return gone


def present(name: str, entry: ModelEntry | None) -> ModelEntry:
    """The entry, if it is an adapter's. Raises errors.NotFound."""
    if entry is None or entry.vacant or entry.kind != "adapter":
        raise errors.NotFound(f"there is no adapter {name!r}; `headrace adapters list` shows those there are")
    return entry


def _numbers(entry: ModelEntry) -> str:
    return ", ".join(str(version.number) for version in entry.versions)
