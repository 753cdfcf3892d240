"""`headrace placement`: which worker shall hold which adapter, what the workers say of it, and why."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson

from broker import base, entries, errors, subjects
from broker.config import BrokerConfig
from broker.placement import Assignment, Placement, Placements
from ops import catalogue
from ops.catalogue import Catalogue
from ops.letters import plain, table, when


@dataclass(frozen=True)
class Seen:
    """The plans, the catalogue and the fleet, and the requests in the queue by base and model."""

    plans: dict[str, Placement]
    known: Catalogue
    queued: Counter[tuple[str, str]]

    def bases(self) -> list[str]:
        return sorted({*self.plans, *self.known.bases})

    def holders(self, model: str) -> dict[str, str]:
        """What each worker that tells of `model` says, a failure with its reason."""
        return {
            worker: f"{state.state}: {state.reason}" if state.reason else state.state
            for worker, state in self.known.states(model)
        }


def run(args: argparse.Namespace, config: BrokerConfig) -> int:
    return catalogue.run(args, config, {"show": _show, "explain": _explain})


async def look(broker: base.Broker) -> Seen:
    """Raises errors.Unavailable."""
    placements = Placements(broker)
    await (await placements.watch()).close()
    queued: Counter[tuple[str, str]] = Counter()
    for subject, count in (await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).items():
        try:
            parsed = subjects.parse_request(subject)
        except ValueError:
            continue
        queued[parsed.base, parsed.model] += count
    return Seen(placements.bases, await catalogue.look(broker), queued)


async def _show(broker: base.Broker, args: argparse.Namespace) -> None:
    seen = await look(broker)
    if args.json:
        for name in seen.bases():
            print(as_json(seen, name))
    elif seen.bases():
        print(shown(seen))
    else:
        catalogue.tell(args.command, "no plan yet: no worker has announced itself")


async def _explain(broker: base.Broker, args: argparse.Namespace) -> None:
    seen = await look(broker)
    for name in [args.name] if args.name else seen.bases():
        facts = explained(seen, name)
        if args.json:
            for fact in facts:
                print(orjson.dumps(fact).decode())
        else:
            print("\n".join(told(fact) for fact in facts))


# In words; pure


def as_json(seen: Seen, base_model: str) -> str:
    plan = seen.plans.get(base_model) or Placement(base=base_model)
    models = {each.model: seen.holders(each.model) for each in plan.assignments}
    return orjson.dumps(plan.model_dump() | {"workers": models}).decode()


def shown(seen: Seen) -> str:
    """A table of bases, and one of the adapters that are planned."""
    bases, adapters = [], []
    for name in seen.bases():
        plan = seen.plans.get(name)
        serving = [beat for beat in seen.known.serving(name) if beat.state == "serving"]
        slots = sum(beat.slots for beat in serving)
        wanted = plan.replicas if plan else ""
        used = sum(len(each.workers) for each in plan.assignments) if plan else 0
        queued = sum(count for (of, _), count in seen.queued.items() if of == name)
        bases.append((plain(name), len(serving), wanted, f"{used} of {slots}", queued))
        for each in plan.assignments if plan else ():
            row = (_workers(each, seen), seen.queued[name, each.model], plain(each.reason))
            adapters.append((plain(each.model), plain(name), *row))
    parts = [table(("BASE", "WORKERS", "WANTED", "SLOTS", "QUEUED"), bases)]
    if adapters:
        parts.append(table(("ADAPTER", "BASE", "WORKERS", "QUEUED", "REASON"), adapters))
    return "\n\n".join(parts)


def _workers(each: Assignment, seen: Seen) -> str:
    """With what is not as planned: where it is not ready yet."""
    states = seen.holders(each.model)
    return ",".join(
        plain(name) if states.get(name) == "ready" else f"{plain(name)}({_short(states.get(name))})"
        for name in each.workers
    )


def _short(state: str | None) -> str:
    return state.partition(":")[0] if state else "absent"


Fact = dict[str, object]


def explained(seen: Seen, name: str) -> list[Fact]:
    """What there is to say of a base and all its adapters, or of one adapter's versions.

    Raises errors.NotFound where nobody knows the name.
    """
    if name in seen.bases():
        return [_of_base(seen, name), *(fact for model in _models(seen, name) for fact in _of(seen, model))]
    found = list(_of(seen, name))
    if not found:
        raise errors.NotFound(f"there is no base or adapter {name!r}; there are: {seen.known.told()}")
    return found


def _models(seen: Seen, base_model: str) -> list[str]:
    entered = (e.name for e in seen.known.entries.values() if e.kind == "adapter" and e.base == base_model)
    return sorted(entered)


def _of_base(seen: Seen, name: str) -> Fact:
    plan = seen.plans.get(name)
    serving = [beat for beat in seen.known.serving(name) if beat.state == "serving"]
    return {
        "base": name,
        "workers": {beat.worker: f"{beat.slots} slots up to rank {beat.max_rank}" for beat in serving},
        "wanted": plan.replicas if plan else None,
        "reason": plan.reason if plan else "no scheduler has planned it yet",
        "made": when(plan.made_ms) if plan and plan.made_ms else "",
        "by": plan.by if plan else "",
    }


def _of(seen: Seen, name: str) -> Iterator[Fact]:
    bare, number = entries.split(name)
    entry = seen.known.entries.get(bare)
    if entry is None or entry.kind != "adapter":
        return
    plan = seen.plans.get(entry.base)
    for version in entry.versions:
        if number in (0, version.number):
            model = entries.versioned(bare, version.number)
            planned = plan.assignments if plan else ()
            each = next((a for a in planned if a.model == model), None)
            current = version.number == entry.current
            yield {
                "model": model,
                "base": entry.base,
                "current": current,
                "planned": list(each.workers) if each else [],
                "states": seen.holders(model),
                "reason": each.reason if each else _unplanned(current, entry.min_replicas),
                "since": when(each.since_ms) if each and each.since_ms else "",
                "queued": seen.queued[entry.base, model],
                "rank": version.rank,
                "min_replicas": entry.min_replicas if current else 0,
            }


def _unplanned(current: bool, kept: int) -> str:
    if current and kept:
        return "no scheduler has planned it yet"
    return "nobody has asked for it yet" if current else "an earlier version, and nobody asks for it"


def told(fact: Fact) -> str:
    """One fact as lines, the first of which names it."""
    head = "base" if "wanted" in fact else "model"
    lines = [f"{head} {plain(str(fact[head]))}"]
    lines += [
        f"  {key:12}  {_text(value)}"
        for key, value in fact.items()
        if key != head and value not in ("", None)
    ]
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return plain(", ".join(f"{name} {said}" for name, said in value.items())) or "none"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return plain(", ".join(map(str, value))) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(str(value))
