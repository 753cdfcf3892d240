"""What `GET /v1/models` says of each model to one tenant: OpenAI's model object, and what the catalogue has
beyond it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from broker import entries
from broker.entries import Kind, ModelEntry, Version
from broker.messages import Heartbeat, ModelCard
from ingress.capability import SHOWN


class Known(Protocol):
    """The catalogue as of now."""

    @property
    def declared(self) -> Mapping[str, ModelEntry]: ...
    @property
    def unreadable(self) -> Collection[str]: ...
    def cards(self) -> Mapping[str, ModelCard]: ...
    def beats(self) -> list[Heartbeat]: ...


Shown = dict[str, Any]


@dataclass(frozen=True)
class Listing:
    """What one tenant sees: models without an allow-list, and those whose list has it."""

    declared: Mapping[str, ModelEntry]
    cards: Mapping[str, ModelCard]
    beats: list[Heartbeat]
    tenant: str
    unreadable: Collection[str] = ()

    @classmethod
    def of(cls, known: Known, tenant: str) -> Listing:
        return cls(known.declared, known.cards(), known.beats(), tenant, frozenset(known.unreadable))

    def names(self) -> list[str]:
        """The names that a request may ask for, sorted; versions of adapters are not among them."""
        served = (name for name, card in self.cards.items() if not _of_version(card))
        declared = (
            entry.name for entry in self.declared.values() if entry.current or entry.kind != "adapter"
        )
        return sorted(name for name in {*served, *declared} if self._allowed(name))

    def all(self) -> list[Shown]:
        return [found for name in self.names() if (found := self.one(name)) is not None]

    def one(self, model: str) -> Shown | None:
        """A name, or `<name>@<version>`; None where there is none that this tenant may use."""
        if not self._allowed(model):
            return None
        entry = self._entry(model)
        if entry is None:
            card = self.cards.get(model)
            return None if card is None or _of_version(card) else self._served(card)
        if entry.kind == "base":
            return self._base(entry)
        if entry.kind != "adapter":
            return self._leading(entry)
        version = entry.version(entries.split(model)[1] if model != entry.name else entry.current)
        return None if version is None else self._adapter(model, entry, version)

    def _entry(self, model: str) -> ModelEntry | None:
        entry = self.declared.get(model)
        if entry is None:
            other = self.declared.get(entries.split(model)[0])
            entry = other if other is not None and other.kind == "adapter" else None
        return entry

    def _allowed(self, model: str) -> bool:
        if model in self.unreadable or entries.split(model)[0] in self.unreadable:
            return False
        entry = self._entry(model)
        return entry is None or not entry.tenants or self.tenant in entry.tenants

    # The kinds

    def _served(self, card: ModelCard) -> Shown:
        """Of which nothing is declared."""
        kind: Kind = "base" if card.id == card.base else "adapter"
        serving = self._serves(lambda beat: any(one.id == card.id for one in beat.models))
        return _object(card.id, kind, card, serving=serving, parent=None if kind == "base" else card.base)

    def _base(self, entry: ModelEntry) -> Shown:
        card = self.cards.get(entry.name) or ModelCard(id=entry.name, base=entry.name)
        serving = self._serves(lambda beat: beat.base == entry.name)
        return _object(entry.name, "base", card, entry, serving=serving)

    def _adapter(self, model: str, entry: ModelEntry, version: Version) -> Shown:
        card = self.cards.get(entry.base) or ModelCard(id=entry.base, base=entry.base)
        root = entries.versioned(entry.name, version.number)
        # Any worker of the base that takes its rank: what it has not loaded, it fetches.
        serving = self._serves(lambda beat: beat.base == entry.base and beat.max_rank >= version.rank)
        base = self.declared.get(entry.base)
        shown = _object(model, "adapter", card, entry, base, serving=serving, parent=entry.base, root=root)
        more = {"version": version.number, "rank": version.rank, "digest": version.digest}
        source = version.source or entry.source
        return {**shown, **more, "source": source, "created": version.pushed_ms // 1000}

    def _leading(self, entry: ModelEntry) -> Shown:
        """An alias or a router: of its targets those that this tenant may use."""
        leaves = [found for name in self._leaves(entry) if (found := self.one(name)) is not None]
        serving = any(found["serving"] for found in leaves)
        paths = tuple(dict.fromkeys(path for found in leaves for path in found["paths"]))
        card = ModelCard(id=entry.name, base="", paths=paths)
        targets = [target for target in entry.targets if self._known(target.model)]
        shares = [
            {"model": t.model, "weight": t.weight} if entry.kind == "alias" else {"model": t.model}
            for t in targets
        ]
        return {**_object(entry.name, entry.kind, card, entry, serving=serving, root=None), "targets": shares}

    def _leaves(self, entry: ModelEntry) -> list[str]:
        """The bases and adapters that its targets come to, each name looked at once."""
        seen, leaves, waiting = {entry.name}, [], [entry]
        for each in waiting:
            for target in each.targets:
                if target.model in seen or not self._allowed(target.model):
                    continue
                seen.add(target.model)
                other = self._entry(target.model)
                if other is not None and other.kind in ("alias", "router"):
                    waiting.append(other)
                else:
                    leaves.append(target.model)
        return leaves

    def _known(self, model: str) -> bool:
        return self._allowed(model) and (self._entry(model) is not None or model in self.cards)

    def _serves(self, fits: Callable[[Heartbeat], bool]) -> bool:
        return any(beat.state == "serving" and fits(beat) for beat in self.beats)


def _of_version(card: ModelCard) -> bool:
    """Whether a worker tells of one version of an adapter, which the catalogue's entry shows, or did."""
    return card.id != card.base and entries.split(card.id)[1] > 0


def _object(
    model: str,
    kind: Kind,
    card: ModelCard,
    entry: ModelEntry | None = None,
    base: ModelEntry | None = None,
    *,
    serving: bool,
    parent: str | None = None,
    root: str | None = "",
) -> Shown:
    """`card` tells what no entry declares; `base` is the entry of an adapter's base, which hands down what
    the adapter's lacks. `serving` is false while no worker takes requests for it: they wait in the queue."""
    entry = entry or ModelEntry(name=model, kind=kind)
    base = base or ModelEntry(name="", kind="base")
    capabilities = entry.capabilities if entry.capabilities is not None else base.capabilities
    told = [SHOWN[path] for path in card.paths if path in SHOWN]
    price = entry.price or base.price
    return {
        "id": model,
        "object": "model",
        "created": entry.updated_ms // 1000,
        "owned_by": "headrace",
        "kind": kind,
        "root": model if root == "" else root,
        "parent": parent,
        "max_model_len": entry.context_tokens or base.context_tokens or card.context_tokens,
        "paths": list(card.paths),
        "capabilities": list(capabilities) if capabilities is not None else told,
        "languages": list(entry.languages or base.languages),
        "price": price.model_dump() if price is not None else None,
        "latency_class": str(entry.latency_class) if entry.latency_class is not None else None,
        "fallbacks": list(entry.fallbacks),
        "source": entry.source,
        "serving": serving,
    }
