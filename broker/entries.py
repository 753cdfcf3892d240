"""What operators declare of models: KV bucket `catalogue`, one entry a name.

A base needs no entry: its workers announce it. An entry adds what no worker knows (capabilities, price, who
may use it), or makes a name that no worker announces: an adapter, an alias, a router.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from broker import base, errors, subjects
from broker.messages import Name, ServiceClass

_log = logging.getLogger(__name__)

Capability = Literal["chat", "completions", "tools", "json_schema", "vision", "embeddings", "reasoning"]
_CAPABILITIES = get_args(Capability)
Kind = Literal["base", "adapter", "alias", "router"]

AUTO = "auto"
"""The model that leaves the choice to Headrace."""

_VERSIONED = re.compile(r"(.+)@([1-9][0-9]{0,8})", re.DOTALL)
_TRIES = 20

_LONGEST = 255
"""Characters of a file's name and of a digest: workers tell of them in their heartbeats."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Price(_Entry):
    """USD per million tokens."""

    input: float = Field(0.0, ge=0)
    cached: float = Field(0.0, ge=0)
    output: float = Field(0.0, ge=0)


class File(_Entry):
    """One file of an adapter. `digest` is `sha256:<hex>`; `object` its name in the store `artifacts`."""

    name: str = Field(max_length=_LONGEST)
    size: int = Field(ge=0)
    digest: str = Field(max_length=_LONGEST)
    object: str = Field(max_length=1000)


class Version(_Entry):
    """One pushed version of an adapter; it never changes. `digest` covers all files."""

    number: int = Field(ge=1)
    digest: str = Field(max_length=_LONGEST)
    rank: int = Field(ge=1)
    targets: tuple[str, ...] = Field((), description="modules that it changes")
    size: int = Field(0, ge=0, description="bytes of its files")
    files: tuple[File, ...] = ()
    pushed_ms: int = 0
    source: str = Field("", description="where it came from, as its pusher says")


class Target(_Entry):
    """Where an alias leads, with what share of the requests."""

    model: Name
    weight: int = Field(1, ge=0, le=10**6)


class ModelEntry(_Entry):
    """One name. What is empty or 0 is not declared."""

    name: str
    kind: Kind
    base: str = Field("", description="of an adapter: the base that it changes")
    versions: tuple[Version, ...] = Field((), description="of an adapter, oldest first")
    current: int = Field(0, description="the version that the bare name means; 0 = none")
    last: int = Field(0, description="the largest number that a version of this name ever had")
    context_tokens: int = Field(0, ge=0)
    capabilities: tuple[Capability, ...] | None = Field(
        None, description="None = its base's, and of a base what its engine's paths tell"
    )
    languages: tuple[str, ...] = Field((), description="primary subtags of BCP 47; empty = any")
    price: Price | None = None
    latency_class: ServiceClass | None = Field(None, description="class of requests that name none")
    tenants: tuple[str, ...] = Field((), description="who may use it; empty = everyone")
    targets: tuple[Target, ...] = Field((), description="of an alias, or the candidates of a router")
    fallbacks: tuple[str, ...] = Field((), description="models that serve when this one can't, in order")
    min_replicas: int = Field(0, ge=0, description="workers that keep an adapter loaded, at least")
    wakes: bool = Field(False, description="a base that is started for its requests though nobody tells so")
    source: str = ""
    updated_ms: int = 0

    @field_validator("capabilities", mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        """Those of a newer release say nothing here: the rest of the entry, its tenants above all, holds."""
        if not isinstance(given, list | tuple):
            return given
        return [each for each in given if each in _CAPABILITIES or not isinstance(each, str)]

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name in filter(None, (self.name, self.base)):
            if not subjects.fits(name):
                raise ValueError(f"a name has at most {subjects.MAX_NAME} bytes, not {name!r:.80}")
        return self

    def version(self, number: int) -> Version | None:
        return next((version for version in self.versions if version.number == number), None)

    @property
    def vacant(self) -> bool:
        """Whether it only keeps `last`: an adapter's number never comes again, since what workers and caches
        know of `<name>@<version>` must stay true."""
        return self.kind == "adapter" and not self.versions


def versioned(name: str, number: int) -> str:
    """The name under which one version of an adapter is queued, loaded and served."""
    return f"{name}@{number}"


def split(model: str) -> tuple[str, int]:
    """`<name>@<version>` as its two parts; (model, 0) for a name without a version."""
    found = _VERSIONED.fullmatch(model)
    return (found[1], int(found[2])) if found else (model, 0)


class Entries:
    """The bucket as of its last change. Owned by the process's event loop."""

    def __init__(self, broker: base.Broker) -> None:
        self._broker = broker
        self.entries: dict[str, ModelEntry] = {}
        self.unreadable: set[str] = set()  # by _changed: names with an entry of which nothing is known
        self.on_change: Callable[[str], None] = lambda name: None

    async def watch(self) -> base.Subscription:
        """Follow the bucket: `entries` is whole when this returns."""
        return await self._broker.watch(subjects.KV_CATALOGUE, self._changed)

    def adapter(self, model: str) -> tuple[ModelEntry, Version] | None:
        """The entry and version of `<name>@<version>`, or of a bare adapter's name; None for any other."""
        name, number = split(model)
        entry = self.entries.get(name)
        if entry is None or entry.kind != "adapter":
            return None
        version = entry.version(number or entry.current)
        return None if version is None else (entry, version)

    def of_base(self, base_model: str) -> list[ModelEntry]:
        """The adapters of one base."""
        return [e for e in self.entries.values() if e.kind == "adapter" and e.base == base_model]

    def _changed(self, key: str, value: bytes | None) -> None:
        try:
            name = subjects.name(key)
        except UnicodeDecodeError:
            _log.warning("the catalogue's key %.200s is no name", key)
            return
        self.unreadable.discard(name)
        try:
            entry = None if value is None else _parsed(name, value)
            if entry is None or entry.vacant:
                self.entries.pop(name, None)
            else:
                self.entries[name] = entry
        except errors.MalformedMessage as exc:
            # A newer release's, or made by hand: what was known of the name stays.
            if name not in self.entries:
                self.unreadable.add(name)
            _log.warning("the catalogue's entry %.200s is not taken over: %s", key, exc)
            return
        self.on_change(name)


async def read(broker: base.Broker, name: str) -> ModelEntry | None:
    """One entry, as the bucket's leader has it. Raises errors.Unavailable, errors.MalformedMessage."""
    value = await broker.get(subjects.KV_CATALOGUE, subjects.token(name))
    return None if value.data is None else _parsed(name, value.data)


async def read_all(broker: base.Broker) -> tuple[dict[str, ModelEntry], list[str]]:
    """Every entry by its name, vacant ones too, and the names of those that can't be read: whoever decides by
    what stands in no entry must not overlook them. Raises errors.Unavailable."""
    values: dict[str, bytes | None] = {}
    await (await broker.watch(subjects.KV_CATALOGUE, values.__setitem__)).close()
    found: dict[str, ModelEntry] = {}
    unreadable: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        name = subjects.name(key)
        try:
            found[name] = _parsed(name, value)
        except errors.MalformedMessage:
            unreadable.append(name)
    return found, unreadable


async def change(
    broker: base.Broker, name: str, new: Callable[[ModelEntry | None], ModelEntry | None]
) -> ModelEntry | None:
    """Set an entry to what `new` makes of the present one, with no other change in between; None removes it.

    `new` may be called several times, and may be given a vacant entry. What it raises ends this.
    Raises errors.Unavailable, errors.MalformedMessage.
    """
    key = subjects.token(name)
    for _ in range(_TRIES):
        value = await broker.get(subjects.KV_CATALOGUE, key)
        entry = new(None if value.data is None else _parsed(name, value.data))
        if entry is None:
            if value.data is not None:
                await broker.remove(subjects.KV_CATALOGUE, key)
            return None
        entry = entry.model_copy(update={"name": name})
        if await broker.swap(subjects.KV_CATALOGUE, key, entry.model_dump_json().encode(), value.revision):
            return entry
    raise errors.Unavailable(f"the catalogue's entry {name!r} is being changed by others all the time")


def _parsed(name: str, data: bytes) -> ModelEntry:
    """The key is the name, whatever the entry says: others would answer for it, and it for others."""
    try:
        entry = ModelEntry.model_validate_json(data)
        return (
            entry if entry.name == name else ModelEntry.model_validate({**entry.model_dump(), "name": name})
        )
    except ValidationError as exc:
        raise errors.MalformedMessage(
            f"the catalogue's entry {name!r:.200} is unreadable: {exc.errors()[0]['msg']}"
        ) from exc
