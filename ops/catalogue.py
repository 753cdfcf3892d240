"""The catalogue as an operator's command finds it, and what may be changed in it. The checks are pure."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from broker import base, client, entries, errors, fleet, registry, subjects
from broker.config import BrokerConfig
from broker.entries import Kind, ModelEntry, Target
from broker.messages import AdapterState, Heartbeat, Instance, ModelCard, PoolBeat
from ops import logs

Action = Callable[[base.Broker, argparse.Namespace], Awaitable[None]]

_LISTEN = 0.5
"""Seconds in which every worker is heard: they tell of themselves each 100 ms."""
LISTEN_POOLS = 1.3
"""Seconds in which every instance pool is heard as well: they tell each second."""
_MAX_NAME = 200
"""Bytes of a name, which an `@<version>` may follow in a subject."""


@dataclass(frozen=True)
class Catalogue:
    """What is declared, what was ever served, and what is served now."""

    entries: Mapping[str, ModelEntry] = field(default_factory=dict)
    remembered: Mapping[str, ModelCard] = field(default_factory=dict)
    beats: tuple[Heartbeat, ...] = ()
    unreadable: tuple[str, ...] = ()
    """Names whose entries can't be read: a newer release's, or made by hand."""
    pools: tuple[PoolBeat, ...] = ()

    @property
    def cards(self) -> dict[str, ModelCard]:
        """Of bases alone."""
        live = {card.id: card for beat in self.beats for card in beat.models}
        return {name: card for name, card in {**self.remembered, **live}.items() if card.id == card.base}

    @property
    def bases(self) -> list[str]:
        declared = {entry.name for entry in self.entries.values() if entry.kind == "base"}
        return sorted(declared | set(self.cards))

    def serving(self, base_model: str) -> list[Heartbeat]:
        return [beat for beat in self.beats if beat.base == base_model]

    def pooled(self, base_model: str) -> list[tuple[PoolBeat, Instance]]:
        """What instance pools say of a base."""
        return [(pool, each) for pool in self.pools for each in pool.instances if each.base == base_model]

    def states(self, model: str) -> Iterator[tuple[str, AdapterState]]:
        """Worker and state, wherever a worker tells of the adapter version `model`."""
        for beat in self.beats:
            yield from ((beat.worker, state) for state in beat.adapters if state.model == model)

    def max_rank(self, base_model: str) -> int | None:
        """The largest rank that any worker of it takes, 0 = none takes adapters; None where none is heard."""
        return max((beat.max_rank for beat in self.serving(base_model)), default=None)

    def knows(self, model: str) -> bool:
        """Whether a request may ask for it: a name, or one version of an adapter."""
        if model in self.entries or model in self.cards:
            return True
        name, number = entries.split(model)
        entry = self.entries.get(name)
        return entry is not None and entry.kind == "adapter" and entry.version(number) is not None

    def leading_to(self, model: str) -> list[str]:
        """Names whose targets or fallbacks are `model`, or any version of it."""
        return sorted(
            entry.name
            for entry in self.entries.values()
            if entry.name != model and any(model in (way, self._owner(way)) for way in _ways(entry))
        )

    def _owner(self, model: str) -> str:
        """The name whose entry is meant by `model`."""
        return model if model in self.entries else entries.split(model)[0]

    def check_ways(self, name: str, models: Iterable[str]) -> None:
        """Whether `name` may lead to `models`. Raises errors.InvalidRequest for itself and for a circle,
        errors.NotFound for what there is not."""
        for model in models:
            if not self.knows(model):
                raise errors.NotFound(f"there is no model {model!r}; there are: {self.told()}")
            trail = self._trail(self._owner(model), name)
            if trail is not None:
                way = " -> ".join((name, *trail))
                raise errors.InvalidRequest(f"{name!r} would lead to itself: {way}")

    def _trail(self, start: str, end: str) -> tuple[str, ...] | None:
        """A way by targets from one name to another."""
        ways: list[tuple[str, ...]] = [(start,)]
        seen = {start}
        for way in ways:
            if way[-1] == end:
                return way
            entry = self.entries.get(way[-1])
            for target in entry.targets if entry is not None else ():
                other = self._owner(target.model)
                if other not in seen:
                    seen.add(other)
                    ways.append((*way, other))
        return None

    def told(self) -> str:
        return ", ".join(sorted({*self.entries, *self.bases})[:50]) or "none"


def _ways(entry: ModelEntry) -> set[str]:
    return {*(target.model for target in entry.targets), *entry.fallbacks}


def check_name(name: str) -> None:
    """Whether a new entry may have it. Raises errors.InvalidRequest."""
    if not 0 < len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME or not name.isprintable():
        raise errors.InvalidRequest(f"a name has 1 to {_MAX_NAME} bytes, all printable, not {name!r:.80}")
    if entries.split(name)[1]:
        raise errors.InvalidRequest(f"{name!r} would be read as a version of {entries.split(name)[0]!r}")


def check_free(name: str, entry: ModelEntry | None, kind: Kind) -> None:
    """Whether `entry`, which has the name now, may be changed as one of that kind.
    Raises errors.InvalidRequest."""
    if entry is not None and not entry.vacant and entry.kind != kind:
        raise errors.InvalidRequest(f"{name!r} is {a(entry.kind)}'s name: take another, or remove that one")


def a(kind: str) -> str:
    return f"an {kind}" if kind[0] == "a" else f"a {kind}"


def targets(given: Iterable[tuple[str, int]]) -> tuple[Target, ...]:
    """Raises errors.InvalidRequest where one stands twice, or no request would reach any."""
    found = tuple(Target(model=model, weight=weight) for model, weight in given)
    if len({target.model for target in found}) < len(found):
        raise errors.InvalidRequest("each target may stand once: add up its weights")
    if not any(target.weight for target in found):
        raise errors.InvalidRequest("no target has a weight: no request could be served")
    return found


# I/O


async def look(broker: base.Broker, listen: float = _LISTEN) -> Catalogue:
    """All of it after `LISTEN_POOLS`; workers alone after less. Raises errors.Unavailable."""
    heard = fleet.Fleet(listen + 1)
    pools: dict[str, PoolBeat] = {}
    now = time.monotonic()
    hearing = [
        await broker.subscribe(subjects.ALL_HEARTBEATS, lambda message: _hear(heard, message, now)),
        await broker.subscribe(subjects.ALL_POOLS, lambda message: _hear_pool(pools, message)),
    ]
    try:
        known = registry.Registry(broker)
        await (await known.watch()).close()
        declared, unreadable = await entries.read_all(broker)
        await asyncio.sleep(listen)
    finally:
        for each in hearing:
            await each.close()
    return Catalogue(
        {name: entry for name, entry in declared.items() if not entry.vacant},
        {name: entry.card for name, entry in known.entries.items()},
        tuple(sorted(heard.live(now), key=lambda beat: beat.worker)),
        tuple(unreadable),
        tuple(pools[name] for name in sorted(pools)),
    )


def _hear(heard: fleet.Fleet, message: base.Message, now: float) -> None:
    heard.observe(message, now)


def _hear_pool(pools: dict[str, PoolBeat], message: base.Message) -> None:
    with contextlib.suppress(ValidationError):  # a newer release's: its workers are heard
        beat = PoolBeat.model_validate_json(message.data)
        pools[beat.name] = beat


def run(args: argparse.Namespace, config: BrokerConfig, actions: Mapping[str, Action]) -> int:
    """Do one action with a connection to the broker; what it raises ends it. The exit status is 0."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logs.hold_back_broker()

    async def connected() -> None:
        async with await client.connect(config, f"headrace {args.command}", make_streams=False) as broker:
            await actions[args.action](broker, args)

    asyncio.run(connected())
    return 0


def tell(command: str, text: str) -> None:
    """To the operator, not into a pipe."""
    print(f"headrace {command}: {text}", file=sys.stderr, flush=True)
