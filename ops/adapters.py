"""`headrace adapters`: LoRA adapters from a directory into the catalogue, where workers find them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from broker import artifacts, base, entries, errors
from broker.config import BrokerConfig
from ops import catalogue, listings, peft, versions
from ops.catalogue import Action, Catalogue


def run(args: argparse.Namespace, config: BrokerConfig) -> int:
    return catalogue.run(args, config, _ACTIONS)


async def _push(broker: base.Broker, args: argparse.Namespace) -> None:
    adapter = peft.read(args.directory)
    known = await catalogue.look(broker)
    on = base_for(known, args.name, adapter, args.base)
    pushed = await versions.push(broker, args.name, on, adapter, args.source, activate=not args.no_activate)
    print(pushed.told(args.name, on))


async def _list(broker: base.Broker, args: argparse.Namespace) -> None:
    known = await catalogue.look(broker)
    names = [entry.name for entry in known.entries.values() if entry.kind == "adapter"]
    if args.json:
        print("\n".join(listings.as_json(known, name) for name in sorted(names)))
    elif names:
        print(listings.adapters(known))
    else:
        catalogue.tell(args.command, "no adapters: push one")


async def _show(broker: base.Broker, args: argparse.Namespace) -> None:
    known = await catalogue.look(broker)
    versions.present(args.name, known.entries.get(args.name))
    print(listings.as_json(known, args.name) if args.json else listings.described(known, args.name))


async def _rollback(broker: base.Broker, args: argparse.Namespace) -> None:
    before, after = await versions.rollback(broker, args.name, args.version or 0)
    print(f"{args.name} means version {after}" + (f", and meant {before}" if before != after else " already"))


async def _remove(broker: base.Broker, args: argparse.Namespace) -> None:
    known = await catalogue.look(broker, listen=0)
    what = entries.versioned(args.name, args.version) if args.version else args.name
    if (others := known.leading_to(what)) and not args.force:
        raise errors.InvalidRequest(f"{', '.join(others)} lead to {what}: change them first, or say --force")
    gone = await versions.remove(broker, args.name, args.version or 0)
    print(f"removed: {', '.join(entries.versioned(args.name, version.number) for version in gone)}")


async def _sweep(broker: base.Broker, args: argparse.Namespace) -> None:
    declared, unreadable = await entries.read_all(broker)
    if unreadable:
        raise errors.MalformedMessage(
            f"the catalogue's entries {', '.join(unreadable)} can't be read, and may name any of the files: "
            "nothing was removed"
        )
    removed = await artifacts.sweep(broker, declared.values(), broker.now_ms() - args.age * 1000)
    for name in removed:
        print(name)
    catalogue.tell(args.command, f"{len(removed)} objects removed that no version names")


_ACTIONS: Mapping[str, Action] = {
    "push": _push,
    "list": _list,
    "show": _show,
    "rollback": _rollback,
    "remove": _remove,
    "sweep": _sweep,
}


def base_for(known: Catalogue, name: str, adapter: peft.Adapter, given: str | None) -> str:
    """The base that the adapter shall be one of: as `given`, as `name` has it, as the adapter itself says, or
    the only one there is.

    Raises errors.InvalidRequest where none follows from that or the name is another kind's, errors.NotFound
    for a base that there is not, errors.AdapterFailed where its workers can't take the adapter.
    """
    catalogue.check_name(name)
    entry = known.entries.get(name)
    catalogue.check_free(name, entry, "adapter")
    if name in (*known.bases, entries.AUTO):
        what = "leaves the choice to Headrace" if name == entries.AUTO else "is a base's name"
        raise errors.InvalidRequest(f"{name!r} {what}: push the adapter under another")
    made_for = [base for base in known.bases if _last(base) == _last(adapter.base)]
    if given is not None:
        if given not in known.bases:
            raise errors.NotFound(f"there is no base {given!r}; there are: {_listed(known.bases)}")
        on = given
    elif entry is not None:
        on = entry.base
    elif made_for or len(known.bases) == 1:
        on = (made_for or known.bases)[0]
    elif known.bases:
        raise errors.InvalidRequest(f"say --base, one of: {_listed(known.bases)}")
    else:
        raise errors.InvalidRequest(
            "there is no base to push it for: start a worker, or `headrace models set BASE --declare`"
        )
    if given is None and adapter.base and _last(adapter.base) != _last(on):
        raise errors.InvalidRequest(
            f"the adapter was made for {adapter.base!r} (base_model_name_or_path), not for {on!r}: if these "
            f"are the same weights, say --base {on}"
        )
    if entry is not None:
        versions.check_base(entry, on)
    _check_rank(known, on, adapter.rank)
    return on


def _check_rank(known: Catalogue, on: str, rank: int) -> None:
    limit = known.max_rank(on)
    if limit == 0:
        raise errors.AdapterFailed(f"no worker of {on!r} takes adapters: its engine serves the base alone")
    if limit is not None and rank > limit:
        raise errors.AdapterFailed(
            f"the adapter is of rank {rank}, and workers of {on!r} take {limit} at most"
        )


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].casefold()


def _listed(bases: list[str]) -> str:
    return ", ".join(bases) or "none"
