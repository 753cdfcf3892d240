"""Objects in a JetStream object store: bytes of any size, in chunks, under a name that is used once.

The format is that of every NATS client (ADR-20 of nats-architecture-and-design), so that `nats object put`
and `get` work on the same bucket. nats-py's own store waits for each chunk's acknowledgement, and for ever
for a chunk that is gone; here they go out and come in several at once, over what `base.Broker` has anyway.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Collection

from pydantic import BaseModel

from broker import base, errors, subjects

_log = logging.getLogger(__name__)

_CHUNK = 128 * 1024
_META_ROOM = 1024
"""Bytes of a chunk's message that are not the chunk's."""
_AT_ONCE = 16
"""Chunks under way: 2 MiB of an object are in flight, not all of it."""


class Missing(Exception):
    """There is no such object, or its bytes are not those that were stored."""


class _Meta(BaseModel):
    """An object's description; clients write more than is read here."""

    name: str
    bucket: str = ""
    nuid: str = ""
    size: int = 0
    chunks: int = 0
    digest: str = ""
    deleted: bool = False


async def put(broker: base.Broker, bucket: str, name: str, data: bytes) -> None:
    """Store `data` to disk. Raises errors.Overloaded when the bucket is full, errors.Unavailable; then
    nothing is left of it, or goes by its age."""
    nuid = uuid.uuid4().hex
    subject = subjects.object_chunks(bucket, nuid)
    step = max(1, min(_CHUNK, broker.max_payload - _META_ROOM))
    starts = range(0, len(data), step)
    meta = _Meta(name=name, bucket=bucket, nuid=nuid, size=len(data), chunks=len(starts))
    try:
        for first in range(0, len(starts), _AT_ONCE):
            await _store(broker, subject, [data[at : at + step] for at in starts[first : first + _AT_ONCE]])
        meta.digest = await asyncio.to_thread(_digest, data)
        written = meta.model_dump_json(exclude={"deleted"}).encode()
        await _store(broker, subjects.object_meta(bucket, name), [written], {subjects.ROLLUP: "sub"})
    except errors.HeadraceError as exc:
        with contextlib.suppress(errors.HeadraceError):
            await broker.purge(subjects.objects(bucket), subject)
        if isinstance(exc, errors.Unconfirmed):
            raise errors.Unavailable(f"an object could not be stored: {exc.message}") from exc
        raise


async def _store(
    broker: base.Broker, subject: str, parts: list[bytes], headers: dict[str, str] | None = None
) -> None:
    """Publish `parts` together and wait until all of them are stored."""
    acks: list[asyncio.Future[base.Stored]] = []
    outcomes: list[base.Stored | BaseException] = []
    try:
        for part in parts:
            acks.append(await broker.enqueue(subject, part, headers))
    finally:
        outcomes = await asyncio.gather(*acks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, asyncio.CancelledError):
            raise errors.Unavailable("the broker connection was closed")
        if isinstance(outcome, BaseException):
            raise outcome


async def get(broker: base.Broker, bucket: str, name: str, limit: int) -> bytes:
    """The object's bytes, checked. Raises Missing, errors.TooLarge past `limit` bytes, errors.Unavailable."""
    found = [part async for part in parts(broker, bucket, name, limit)]
    # In a thread: a token stream would stand still for the time that it takes.
    return found[0] if len(found) == 1 else await asyncio.to_thread(b"".join, found)


async def parts(broker: base.Broker, bucket: str, name: str, limit: int) -> AsyncIterator[bytes]:
    """The object's bytes, of which no more than a part is in memory. They are checked when the last has come:
    until this ends without an error, what came may be anything. Raises as `get`."""
    meta = await _meta(broker, bucket, name)
    if meta is None:
        raise Missing(f"there is no object {name!r}")
    if meta.size > limit:
        raise errors.TooLarge(f"object {name!r} has {meta.size:,} bytes, more than the {limit:,} taken")
    subject = subjects.object_chunks(bucket, meta.nuid)
    sha = hashlib.sha256()
    size, chunks, start = 0, 0, 1
    while size < meta.size and chunks < meta.chunks:
        page = await broker.read(subjects.objects(bucket), subject, start, _AT_ONCE)
        if not page:
            break
        part = b"".join(record.data for record in page)
        size, chunks, start = size + len(part), chunks + len(page), page[-1].seq + 1
        await asyncio.to_thread(sha.update, part)
        yield part
    if size != meta.size or _told(sha.digest()) != meta.digest:
        raise Missing(f"object {name!r} is not whole")


async def remove(broker: base.Broker, bucket: str, name: str) -> None:
    """Leave nothing of it. Raises errors.Unavailable."""
    meta = await _meta(broker, bucket, name)
    if meta is not None:
        stream = subjects.objects(bucket)
        await broker.purge(stream, subjects.object_chunks(bucket, meta.nuid))
        await broker.purge(stream, subjects.object_meta(bucket, name))


async def sweep(broker: base.Broker, bucket: str, keep: Collection[str], before_ms: float) -> list[str]:
    """Remove the objects whose names are not in `keep`, and chunks without a description, which a crash left,
    if they were stored before unix time `before_ms`. Their names, `chunks of <nuid>` for such chunks.

    Raises errors.Unavailable.
    """
    stream = subjects.objects(bucket)
    removed: list[str] = []
    kept: set[str] = set()
    # Descriptions first: whose is stored meanwhile has chunks younger than `before_ms`.
    for subject in await broker.counts(stream, subjects.all_object_metas(bucket)):
        record = await broker.last(stream, subject)
        if record is None:
            continue
        meta, name = _parsed(record, bucket), subjects.object_name(subject)
        if meta is not None and (name in keep or record.stored_ms >= before_ms):
            kept.add(subjects.object_chunks(bucket, meta.nuid))
        elif name not in keep and record.stored_ms < before_ms:
            if meta is not None:
                await broker.purge(stream, subjects.object_chunks(bucket, meta.nuid))
            await broker.purge(stream, subject)
            removed.append(name)
    for subject in await broker.counts(stream, subjects.all_object_chunks(bucket)):
        record = None if subject in kept else await broker.last(stream, subject)
        if record is not None and record.stored_ms < before_ms:
            await broker.purge(stream, subject)
            removed.append(f"chunks of {subject.rpartition('.')[2]}")
    return removed


async def _meta(broker: base.Broker, bucket: str, name: str) -> _Meta | None:
    """None where the name was never used, or what describes it is no description."""
    record = await broker.last(subjects.objects(bucket), subjects.object_meta(bucket, name))
    return None if record is None else _parsed(record, bucket)


def _parsed(record: base.Record, bucket: str) -> _Meta | None:
    try:
        meta = _Meta.model_validate_json(record.data)
        subjects.object_chunks(bucket, meta.nuid)
    except ValueError as exc:
        _log.warning("an object of %s has no readable description: %s", bucket, exc)
        return None
    return None if meta.deleted else meta


def _digest(data: bytes) -> str:
    return _told(hashlib.sha256(data).digest())


def _told(digest: bytes) -> str:
    return "SHA-256=" + base64.urlsafe_b64encode(digest).decode()
