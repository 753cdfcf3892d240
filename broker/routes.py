"""What routers have learned: KV bucket `routes`, written by `headrace routes learn`, watched by ingresses.

Under a router's name lies its description, `Learned`. The tables that it scores texts with lie in chunks
under keys of their own, written before it, so that who reads it has all.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker import base, errors, subjects

_log = logging.getLogger(__name__)

_CHUNK = 256 * 1024
_ROOM = 1024
"""Bytes of a message that are not its chunk's."""
_MOST_CHUNKS = 64
"""Of one router, and chunks without a description that are kept."""
_MARK = "/"
"""What a chunk's key begins with: no name's token does."""


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Route(_Kept):
    """One intent, and what serves it."""

    name: str
    model: str


class Table(_Kept):
    """Scores of features, as they lie in the tables' bytes: `rows` hashes (CRC-32 of the feature, ascending,
    little-endian uint32), then `rows` x routes int8, each a score over `scale`."""

    rows: int = Field(ge=0)
    scale: float


class Learned(_Kept):
    """A router. A text's scores by route are `bias`, plus the mean of its pieces' scores, plus the sum of its
    words' over the root of their number."""

    name: str
    version: int = Field(1, ge=1, description="counts each time it is learned")
    default: str = Field(description="model that serves where no route leads by `margin`")
    margin: float = Field(0.1, ge=0, description="lead over the next route, in scores that are -1 to 1")
    routes: tuple[Route, ...] = Field(min_length=1)
    bias: tuple[float, ...]
    pieces: Table
    words: Table
    chunks: int = Field(ge=0, le=_MOST_CHUNKS)
    store: str = Field(description="what the chunks' keys begin with")
    digest: str = Field(description="sha256 of the tables")
    examples: int = 0
    embeddings: str = Field("", description="what the pieces' scores were distilled from")
    learned_ms: int = 0


async def read(broker: base.Broker, name: str) -> Learned | None:
    """Raises errors.Unavailable, errors.MalformedMessage."""
    value = await broker.get(subjects.KV_ROUTES, subjects.token(name))
    if value.data is None:
        return None
    try:
        return Learned.model_validate_json(value.data)
    except ValidationError as exc:
        raise errors.MalformedMessage(f"the router {name!r} is unreadable: {exc}") from exc


async def put(broker: base.Broker, learned: Learned, tables: bytes) -> Learned:
    """Store a router in the place of the one of its name; what was stored. Raises errors.TooLarge,
    errors.Unavailable: the one before then stands."""
    before = await read(broker, learned.name)
    step = min(_CHUNK, broker.max_payload - _ROOM)
    parts = [tables[at : at + step] for at in range(0, len(tables), step)]
    if len(parts) > _MOST_CHUNKS:
        raise errors.TooLarge(f"a router of {len(tables):,} bytes is too large: give it fewer routes")
    learned = learned.model_copy(
        update={
            "version": 1 if before is None else before.version + 1,
            "chunks": len(parts),
            "store": uuid.uuid4().hex,
            "digest": hashlib.sha256(tables).hexdigest(),
        }
    )
    for number, part in enumerate(parts):
        await broker.put(subjects.KV_ROUTES, _key(learned, number), part)
    await broker.put(subjects.KV_ROUTES, subjects.token(learned.name), learned.model_dump_json().encode())
    if before is not None:
        await _drop(broker, before)
    return learned


async def remove(broker: base.Broker, name: str) -> bool:
    """False where there was none. Raises errors.Unavailable."""
    before = await read(broker, name)
    if before is None:
        return False
    await broker.remove(subjects.KV_ROUTES, subjects.token(name))
    await _drop(broker, before)
    return True


async def _drop(broker: base.Broker, learned: Learned) -> None:
    for number in range(learned.chunks):
        await broker.remove(subjects.KV_ROUTES, _key(learned, number))


def _key(learned: Learned, number: int) -> str:
    return f"{_MARK}{learned.store}{_MARK}{number}"


class Watch:
    """The bucket as of its last change. `handler` gets each router with its tables; None = removed."""

    def __init__(self, broker: base.Broker, handler: Callable[[str, Learned | None, bytes], None]) -> None:
        self._broker = broker
        self._handler = handler
        self._chunks: dict[str, bytes] = {}
        self._waiting: dict[str, Learned] = {}

    async def start(self) -> base.Subscription:
        """All that is there has been handled when this returns."""
        return await self._broker.watch(subjects.KV_ROUTES, self._changed)

    def _changed(self, key: str, value: bytes | None) -> None:
        if key.startswith(_MARK):
            self._chunk(key, value)
            return
        try:
            name = subjects.name(key)
            if value is None:
                self._waiting.pop(name, None)
                self._handler(name, None, b"")
                return
            self._waiting[name] = Learned.model_validate_json(value)
        except (ValidationError, UnicodeDecodeError):
            _log.warning("the router %s is unreadable", key)  # what was known of it stays
            return
        self._complete(name)

    def _chunk(self, key: str, value: bytes | None) -> None:
        if value is None:
            self._chunks.pop(key, None)
            return
        self._chunks[key] = value
        while len(self._chunks) > 2 * _MOST_CHUNKS:  # of a `learn` that broke off
            del self._chunks[next(iter(self._chunks))]
        for name in list(self._waiting):
            self._complete(name)

    def _complete(self, name: str) -> None:
        learned = self._waiting[name]
        keys = [_key(learned, number) for number in range(learned.chunks)]
        if any(key not in self._chunks for key in keys):
            return
        del self._waiting[name]
        tables = b"".join(self._chunks.pop(key) for key in keys)
        if hashlib.sha256(tables).hexdigest() != learned.digest:
            _log.warning("the tables of router %s are damaged: learn it again", name)
            return
        self._handler(name, learned, tables)
