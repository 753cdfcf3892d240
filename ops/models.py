"""`headrace models`: what is declared of models, looked at and changed while the fleet runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, get_args

from broker import base, entries, errors, subjects
from broker.config import BrokerConfig
from broker.entries import Capability, ModelEntry, Price
from broker.messages import ServiceClass
from ops import catalogue, listings
from ops.catalogue import Action, Catalogue

_CAPABILITIES = get_args(Capability)
_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]{1,8})*")


def run(args: argparse.Namespace, config: BrokerConfig) -> int:
    return catalogue.run(args, config, _ACTIONS)


async def _list(broker: base.Broker, args: argparse.Namespace) -> None:
    known = await catalogue.look(broker, catalogue.LISTEN_POOLS)
    names = listings.names(known)
    if known.unreadable:
        catalogue.tell(args.command, f"entries that can't be read: {', '.join(known.unreadable)}")
    if args.json:
        print("\n".join(listings.as_json(known, name) for name in names))
    elif names:
        print(listings.models(known))
    elif not known.unreadable:
        catalogue.tell(args.command, "no models: no worker has announced itself, and nothing is declared")


async def _show(broker: base.Broker, args: argparse.Namespace) -> None:
    known = await catalogue.look(broker, catalogue.LISTEN_POOLS)
    if args.name not in known.entries and args.name not in known.bases:
        raise errors.NotFound(f"there is no model {args.name!r}; there are: {known.told()}")
    print(listings.as_json(known, args.name) if args.json else listings.described(known, args.name))


async def _set(broker: base.Broker, args: argparse.Namespace) -> None:
    known = await catalogue.look(broker)
    name = args.name
    if name not in known.entries and name not in known.bases:
        if not args.declare:
            raise errors.NotFound(
                f"there is no model {name!r}; there are: {known.told()}. A base that no worker serves yet is "
                "declared with --declare"
            )
        catalogue.check_name(name)
        _check_not_auto(name)
    changes, prices = changes_of(args), prices_of(args)
    if not (changes or prices or args.declare):
        raise errors.InvalidRequest("nothing to set: `headrace models set --help` lists what there is")
    fallbacks = changes.get("fallbacks", ())
    if name in fallbacks:
        raise errors.InvalidRequest(f"{name!r} can't be its own fallback")
    if unknown := [model for model in fallbacks if not known.knows(model)]:
        raise errors.NotFound(f"there is no model {unknown[0]!r}; there are: {known.told()}")
    _tell(await declare(broker, name, changes, prices))


async def _alias(broker: base.Broker, args: argparse.Namespace) -> None:
    _check_not_auto(args.name)
    found = catalogue.targets(args.targets)
    await _lead(broker, args.name, {"kind": "alias", "targets": found})


async def _router(broker: base.Broker, args: argparse.Namespace) -> None:
    found = catalogue.targets((name, 1) for name in args.targets)
    await _lead(broker, args.name, {"kind": "router", "targets": found})


async def _remove(broker: base.Broker, args: argparse.Namespace) -> None:
    name, known = args.name, await catalogue.look(broker)
    if not args.force:
        _check_removable(name, known)
    if name in known.unreadable:
        await broker.remove(subjects.KV_CATALOGUE, subjects.token(name))
    else:
        await remove(broker, name)
    print(f"{name}: removed" + (", its workers serve it as before" if name in known.cards else ""))


def _check_removable(name: str, known: Catalogue) -> None:
    """Raises errors.InvalidRequest for what others need, and for an entry that can't be read."""
    if name in known.unreadable:
        raise errors.InvalidRequest(f"the entry {name!r} can't be read: --force removes it")
    if name in known.entries and name not in known.cards:
        others = known.leading_to(name) + [e.name for e in known.entries.values() if e.base == name]
        if others:
            raise errors.InvalidRequest(f"{', '.join(others)} need {name}: change them first, or say --force")


_ACTIONS: Mapping[str, Action] = {
    "list": _list,
    "show": _show,
    "set": _set,
    "alias": _alias,
    "router": _router,
    "remove": _remove,
}


async def _lead(broker: base.Broker, name: str, changes: dict[str, Any]) -> None:
    known = await catalogue.look(broker)
    catalogue.check_name(name)
    if name in known.bases:
        raise errors.InvalidRequest(f"{name!r} is a base's name: take another")
    known.check_ways(name, [target.model for target in changes["targets"]])
    _tell(await lead(broker, name, changes))


def _tell(entry: ModelEntry) -> None:
    print(listings.described(Catalogue(entries={entry.name: entry}), entry.name))


# What the flags say


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of an entry that the flags set, but for the price's parts. Raises errors.InvalidRequest."""
    changes: dict[str, Any] = {}
    if args.context is not None:
        changes["context_tokens"] = args.context
    if args.capabilities is not None:
        if unknown := [each for each in args.capabilities if each not in _CAPABILITIES]:
            raise errors.InvalidRequest(
                f"there is no capability {unknown[0]!r}; there are: {', '.join(_CAPABILITIES)}"
            )
        changes["capabilities"] = tuple(args.capabilities) or None
    if args.languages is not None:
        changes["languages"] = tuple(dict.fromkeys(map(language, args.languages)))
    if args.latency_class is not None:
        changes["latency_class"] = _latency_class(args.latency_class)
    for key in ("tenants", "fallbacks"):
        if getattr(args, key) is not None:
            changes[key] = tuple(getattr(args, key))
    for key in ("min_replicas", "source", "wakes"):
        if getattr(args, key) is not None:
            changes[key] = getattr(args, key)
    if args.no_price:
        changes["price"] = None
    return changes


def prices_of(args: argparse.Namespace) -> dict[str, float]:
    """Parts of the price that the flags set."""
    parts = {part: getattr(args, f"price_{part}") for part in ("input", "cached", "output")}
    return {part: amount for part, amount in parts.items() if amount is not None}


def language(tag: str) -> str:
    """The primary subtag, in lower case: `de` of `de-AT`. Raises errors.InvalidRequest."""
    found = _TAG.fullmatch(tag)
    if found is None:
        raise errors.InvalidRequest(f"{tag!r} is no language of BCP 47, such as en or de")
    return found[1].lower()


def _latency_class(given: str) -> ServiceClass | None:
    if given == "-":
        return None
    try:
        return ServiceClass(given)
    except ValueError:
        raise errors.InvalidRequest(
            f"--latency-class is one of {', '.join(ServiceClass)}, or -, not {given!r}"
        ) from None


def _check_not_auto(name: str) -> None:
    if name == entries.AUTO:
        raise errors.InvalidRequest(
            f"{name!r} leaves the choice to Headrace: `headrace models router` guides it"
        )


# Changes


async def declare(
    broker: base.Broker, name: str, changes: Mapping[str, Any], prices: Mapping[str, float]
) -> ModelEntry:
    """Change fields of an entry; of a base that has none, make it. A price that had no cached part has its
    input's there. Raises errors.InvalidRequest, errors.Unavailable."""

    def changed(entry: ModelEntry | None) -> ModelEntry:
        if entry is None or entry.vacant:
            entry = ModelEntry(name=name, kind="base", last=entry.last if entry is not None else 0)
        if changes.get("wakes") and entry.kind != "base":
            raise errors.InvalidRequest(f"--wakes is a base's, and {name!r} is {catalogue.a(entry.kind)}")
        if "min_replicas" in changes and entry.kind != "adapter":
            raise errors.InvalidRequest(
                f"--min-replicas is an adapter's, and {name!r} is {catalogue.a(entry.kind)}"
            )
        update = {**changes, "updated_ms": int(broker.now_ms())}
        if prices:
            present = entry.price.model_dump() if entry.price is not None else {}
            update["price"] = Price(**{"cached": prices.get("input", 0.0), **present, **prices})
        return entry.model_copy(update=update)

    return _there(await entries.change(broker, name, changed))


async def lead(broker: base.Broker, name: str, changes: Mapping[str, Any]) -> ModelEntry:
    """Make an alias or a router, or change where it leads; what else is declared of it stays.

    `changes` has its kind and targets. Raises errors.InvalidRequest where the name is another kind's,
    errors.Unavailable.
    """

    def changed(entry: ModelEntry | None) -> ModelEntry:
        catalogue.check_free(name, entry, changes["kind"])
        if entry is None or entry.vacant:
            entry = ModelEntry(name=name, kind=changes["kind"], last=entry.last if entry is not None else 0)
        return entry.model_copy(update={**changes, "updated_ms": int(broker.now_ms())})

    return _there(await entries.change(broker, name, changed))


async def remove(broker: base.Broker, name: str) -> None:
    """Raises errors.InvalidRequest for an adapter, errors.NotFound, errors.Unavailable."""

    def gone(entry: ModelEntry | None) -> ModelEntry | None:
        if entry is None or entry.vacant:
            raise errors.NotFound(f"nothing is declared of {name!r}")
        if entry.kind == "adapter":
            raise errors.InvalidRequest(f"{name!r} is an adapter: `headrace adapters remove {name}`")
        return ModelEntry(name=name, kind="adapter", last=entry.last) if entry.last else None

    await entries.change(broker, name, gone)


def _there(entry: ModelEntry | None) -> ModelEntry:
    assert entry is not None, "what was changed was not removed"
    return entry
