"""The catalogue in words: tables, descriptions, JSON. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import orjson

from broker import entries
from broker.entries import ModelEntry, Price, Version
from ops.catalogue import Catalogue
from ops.letters import plain, table, when

_MODELS = ("MODEL", "KIND", "VERSION", "CONTEXT", "CAN", "LANGUAGES", "PRICE", "CLASS", "TENANTS", "SERVED")
_ADAPTERS = ("ADAPTER", "BASE", "MEANS", "VERSIONS", "RANK", "BYTES", "PUSHED", "LOADED")


def names(known: Catalogue) -> list[str]:
    """Every name that a request may ask for: bases, their adapters, then what leads to them."""
    order = {"base": 0, "adapter": 1, "alias": 2, "router": 3}
    kinds = {**dict.fromkeys(known.bases, "base"), **{e.name: e.kind for e in known.entries.values()}}
    return sorted(kinds, key=lambda name: (order[kinds[name]], name))


def entry_of(known: Catalogue, name: str) -> ModelEntry:
    """Its entry; of a base that has none, one in which nothing is declared."""
    return known.entries.get(name) or ModelEntry(name=name, kind="base")


def models(known: Catalogue) -> str:
    rows = []
    for name in names(known):
        entry = entry_of(known, name)
        context = _context(known, entry)
        rows.append(
            (
                *(name, entry.kind, str(entry.current or ""), f"{context}" if context else ""),
                *(_many(entry.capabilities or ()), _many(entry.languages), _price(entry.price)),
                *(entry.latency_class or "", _many(entry.tenants), _served(known, entry)),
            )
        )
    ways = [(e.name, _ways(e)) for e in known.entries.values() if e.targets or e.fallbacks]
    parts = [table(_MODELS, _clean(rows))]
    if ways:
        parts.append(table(("NAME", "LEADS TO"), _clean(sorted(ways))))
    return "\n\n".join(parts)


def adapters(known: Catalogue) -> str:
    rows = []
    for entry in sorted(known.entries.values(), key=lambda entry: entry.name):
        if entry.kind != "adapter":
            continue
        newest = entry.versions[-1]
        shown = entry.version(entry.current) or newest
        numbers = ",".join(str(version.number) for version in entry.versions)
        means = str(entry.current or "")
        facts = (str(shown.rank), str(shown.size), when(newest.pushed_ms), _served(known, entry))
        rows.append((entry.name, entry.base, means, numbers, *facts))
    return table(_ADAPTERS, _clean(rows))


def described(known: Catalogue, name: str) -> str:
    """Everything that is known of one name, in tables."""
    entry = entry_of(known, name)
    facts = [
        ("model", name),
        ("kind", entry.kind),
        ("base", entry.base),
        ("means", entries.versioned(name, entry.current) if entry.current else ""),
        ("context", str(_context(known, entry) or "")),
        ("capabilities", _many(entry.capabilities or ())),
        ("languages", _many(entry.languages)),
        ("price", _price(entry.price)),
        ("class", entry.latency_class or ""),
        ("tenants", _many(entry.tenants)),
        ("leads to", _ways(entry)),
        ("led to by", _many(known.leading_to(name))),
        ("min replicas", str(entry.min_replicas or "")),
        ("wakes", "when requests wait" if entry.wakes else ""),
        ("source", entry.source),
        ("changed", when(entry.updated_ms) if entry.updated_ms else ""),
    ]
    parts = [table((), _clean(fact for fact in facts if fact[1]))]
    if entry.versions:
        head = ("VERSION", "RANK", "BYTES", "PUSHED", "DIGEST", "CHANGES", "SOURCE")
        parts.append(table(head, _clean(_version(version) for version in entry.versions)))
    if loaded := _loaded(known, entry):
        parts.append(table(("WORKER", "VERSION", "STATE", "RUNNING", "WAITING", "REASON"), _clean(loaded)))
    if entry.kind == "base" and (beats := known.serving(name)):
        workers = [
            (b.worker, b.host, b.engine, b.state, str(b.credit.running), str(b.slots), str(b.max_rank))
            for b in beats
        ]
        head = ("WORKER", "HOST", "ENGINE", "STATE", "RUNNING", "ADAPTERS AT ONCE", "MAX RANK")
        parts.append(table(head, _clean(workers)))
    if entry.kind == "base" and (pooled := known.pooled(name)):
        instances = [(p.name, p.host, i.state, str(i.memory), i.worker, i.reason) for p, i in pooled]
        parts.append(table(("POOL", "HOST", "STATE", "BYTES", "WORKER", "REASON"), _clean(instances)))
    return "\n\n".join(parts)


def as_json(known: Catalogue, name: str) -> str:
    """One line: the entry as it is stored, and what workers tell of it."""
    entry = entry_of(known, name)
    card = known.cards.get(name)
    value: dict[str, object] = entry.model_dump(mode="json") | {
        "declared": name in known.entries,
        "card": card.model_dump() if card is not None else None,
        "led_to_by": known.leading_to(name),
        "workers": [beat.worker for beat in known.serving(entry.base or name)],
        "pools": {pool.name: each.model_dump() for pool, each in known.pooled(entry.base or name)},
    }
    if entry.kind == "adapter":
        value["loaded"] = {
            str(version.number): {
                worker: state.model_dump()
                for worker, state in known.states(entries.versioned(name, version.number))
            }
            for version in entry.versions
        }
    return orjson.dumps(value).decode()


def _clean(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    return [tuple(map(plain, row)) for row in rows]


def _context(known: Catalogue, entry: ModelEntry) -> int:
    """Its own where it is declared; else its base's."""
    if entry.context_tokens or entry.kind not in ("base", "adapter"):
        return entry.context_tokens
    base = entry.base or entry.name
    if base != entry.name and (declared := entry_of(known, base).context_tokens):
        return declared
    card = known.cards.get(base)
    return card.context_tokens if card is not None else 0


def _many(values: Iterable[str]) -> str:
    return ",".join(values)


def _price(price: Price | None) -> str:
    return "" if price is None else f"{price.input:g}/{price.cached:g}/{price.output:g}"


def _ways(entry: ModelEntry) -> str:
    shares = [f"{t.model}={t.weight}" if entry.kind == "alias" else t.model for t in entry.targets]
    return " ".join([*shares, *(f"else {model}" for model in entry.fallbacks)])


def _served(known: Catalogue, entry: ModelEntry) -> str:
    if entry.kind == "base":
        serving = sum(beat.state == "serving" for beat in known.serving(entry.name))
        workers = f"{serving} workers" if serving != 1 else "1 worker"
        pooled = Counter(each.state for _, each in known.pooled(entry.name))
        return ", ".join([workers, *(_pooled(state, count) for state, count in pooled.items())])
    current = entries.versioned(entry.name, entry.current)
    states = Counter(state.state for _, state in known.states(current))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _pooled(state: str, count: int) -> str:
    return f"{state} in a pool" if count == 1 else f"{state} in {count} pools"


def _version(version: Version) -> tuple[str, ...]:
    pushed, digest = when(version.pushed_ms), version.digest[:19]
    changes = _many(version.targets)
    return str(version.number), str(version.rank), str(version.size), pushed, digest, changes, version.source


def _loaded(known: Catalogue, entry: ModelEntry) -> list[tuple[str, ...]]:
    return [
        (worker, str(version.number), s.state, str(s.running), str(s.waiting), s.reason)
        for version in entry.versions
        for worker, s in known.states(entries.versioned(entry.name, version.number))
    ]
