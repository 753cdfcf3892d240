"""Adapters' files in the object store `artifacts`: put at a push, fetched by workers, swept of what no
version names.

Every push stores under names of its own, so that two pushes at once never meet, and a version's bytes never
change. An object counts from the moment at which a version of a catalogue entry names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from broker import base, errors, objects, subjects
from broker.entries import File, ModelEntry, Version

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = frozenset({CONFIG, WEIGHTS})
"""What an adapter consists of; nothing else is stored, nor written into a worker's directory."""

MAX_BYTES = 2 * 2**30
"""Bytes of an adapter. Each file is held in memory whole while it is stored."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_of(files: Mapping[str, bytes]) -> str:
    """One digest over all files of a version, by name."""
    lines = sorted(f"{name} {digest(data)}\n" for name, data in files.items())
    return digest("".join(lines).encode())


async def put(broker: base.Broker, name: str, files: Mapping[str, bytes]) -> tuple[File, ...]:
    """Store the files of a version of adapter `name`; no version names them yet.

    Raises errors.AdapterFailed for other files than an adapter's, errors.Overloaded when the store is full,
    errors.Unavailable; then nothing is left of them, or goes with `sweep`.
    """
    if set(files) != FILES:
        raise errors.AdapterFailed(f"an adapter has the files {_listed(FILES)}, not {_listed(files)}")
    if sum(map(len, files.values())) > MAX_BYTES:
        raise errors.AdapterFailed(f"the adapter has more than {MAX_BYTES:,} bytes")
    unique = uuid.uuid4().hex
    stored: list[File] = []
    try:
        for file, data in sorted(files.items()):
            key = f"{subjects.token(name)}.{unique}.{file}"
            sha = await asyncio.to_thread(digest, data)
            stored.append(File(name=file, size=len(data), digest=sha, object=key))
            await objects.put(broker, subjects.ARTIFACTS, key, data)
    except errors.HeadraceError as exc:
        with contextlib.suppress(errors.HeadraceError):
            await remove(broker, stored)
        if isinstance(exc, errors.Overloaded):
            raise errors.Overloaded(
                "the store for adapters is full: remove versions (`headrace adapters remove`), or raise "
                "broker.artifact_bytes"
            ) from exc
        raise
    return tuple(stored)


def size(version: Version) -> int:
    """Bytes of its files, as the catalogue has them. Raises errors.AdapterFailed where it can't be."""
    sizes = [file.size for file in version.files]
    if any(size < 0 for size in sizes):
        raise errors.AdapterFailed("the catalogue names a file of fewer than 0 bytes")
    if sum(sizes) > MAX_BYTES:
        raise errors.AdapterFailed(f"the adapter has more than {MAX_BYTES:,} bytes")
    return sum(sizes)


async def fetch(broker: base.Broker, version: Version, into: Path) -> None:
    """Write a version's files into the directory `into`, which exists and is empty, each checked.

    Raises errors.AdapterFailed that names the file and what is wrong with it, errors.Unavailable, OSError;
    the whole files that were written until then stay.
    """
    names = [file.name for file in version.files]
    if set(names) != FILES or len(names) != len(FILES):
        raise errors.AdapterFailed(
            f"an adapter has the files {_listed(FILES)}, the catalogue names {names!r:.200}"
        )
    size(version)
    for file in version.files:
        try:
            await _write(broker, file, into / file.name)
        except BaseException:
            with contextlib.suppress(OSError):
                (into / file.name).unlink(missing_ok=True)
            raise


async def _write(broker: base.Broker, file: File, path: Path) -> None:
    if not _DIGEST.fullmatch(file.digest):
        raise errors.AdapterFailed(
            f"{file.name}: the catalogue has no sha256 digest, but {file.digest!r:.80}"
        )
    sha = hashlib.sha256()
    with await asyncio.to_thread(path.open, "wb") as out:

        def keep(part: bytes) -> None:
            out.write(part)
            sha.update(part)

        try:
            async for part in objects.parts(broker, subjects.ARTIFACTS, file.object, file.size):
                await asyncio.to_thread(keep, part)
        except objects.Missing as exc:
            raise errors.AdapterFailed(
                f"{file.name} is missing or damaged in the store: {exc!s:.200}"
            ) from exc
        except errors.TooLarge as exc:
            raise errors.AdapterFailed(f"{file.name} is another than was pushed: {exc.message:.200}") from exc
        length = out.tell()
    if length != file.size:
        raise errors.AdapterFailed(
            f"{file.name} is truncated: {length:,} bytes in the store, {file.size:,} were pushed"
        )
    if (found := f"sha256:{sha.hexdigest()}") != file.digest:
        raise errors.AdapterFailed(f"{file.name} is corrupt: its digest is {found}, not {file.digest}")


async def remove(broker: base.Broker, files: Iterable[File]) -> None:
    """Take a version's files out of the store, those that are gone already too. Raises errors.Unavailable."""
    for file in files:
        await objects.remove(broker, subjects.ARTIFACTS, file.object)


async def sweep(broker: base.Broker, entries: Iterable[ModelEntry], before_ms: float) -> list[str]:
    """Remove what no version of `entries`, all that there are, names, if it was stored before unix time
    `before_ms`: a push stores its files before its version names them, and may break off in between.

    Raises errors.Unavailable.
    """
    named = {file.object for entry in entries for version in entry.versions for file in version.files}
    return await objects.sweep(broker, subjects.ARTIFACTS, named, before_ms)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names)) or "none"
