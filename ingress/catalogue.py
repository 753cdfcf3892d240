"""Which models there are: those that live workers announce, those the registry remembers, and what operators
declare of them.

The registry (KV `models`, kept by the scheduler) lets a model whose workers are all gone keep its
queue: its requests wait instead of failing as unknown.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Self

from pydantic import ValidationError

from broker import base, entries, errors, fleet, registry, routes, subjects
from broker.entries import ModelEntry
from broker.messages import Heartbeat, ModelCard, PoolBeat
from ingress.intent import Router
from ingress.load import Load

_log = logging.getLogger(__name__)

_LOST_AFTER = 5.0
"""Seconds: lenient, since an unknown model costs a caller more than a wait in the queue."""

_HEARD_AFTER = 1.5
"""Seconds after which every live worker and pool has been heard: pools beat once a second."""


class Catalogue:
    """Fed by broker callbacks on the event loop; an async context manager."""

    def __init__(self, broker: base.Broker) -> None:
        self._broker = broker
        self._fleet = fleet.Fleet(_LOST_AFTER)
        self._registry = registry.Registry(broker)
        self._pools: dict[str, tuple[float, frozenset[str]]] = {}  # when heard, and what it can start
        self._load = Load()
        self.entries = entries.Entries(broker)
        self.learned: dict[str, Router] = {}  # by _on_router
        self._subscriptions: list[base.Subscription] = []
        self._since = -math.inf  # when it began to listen

    async def __aenter__(self) -> Self:
        self._subscriptions = [
            await self._broker.subscribe(subjects.ALL_HEARTBEATS, self._on_heartbeat),
            await self._broker.subscribe(subjects.ALL_POOLS, self._on_pool),
            await self._registry.watch(),
            await self.entries.watch(),
            await routes.Watch(self._broker, self._on_router).start(),
        ]
        self._since = time.monotonic()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for subscription in self._subscriptions:
            await subscription.close()

    def _on_heartbeat(self, message: base.Message) -> None:
        now = time.monotonic()
        beat = self._fleet.observe(message, now)
        if beat is None:
            return
        self._load.observe(beat.worker, beat.state == "serving" and beat.credit.requests == 0, now)
        if beat.state == "gone":
            self._load.forget(beat.worker)
        if beat.seq % 100 == 0:
            # Now and then, so that names of workers long gone are let go.
            for lost in self._fleet.expire(now):
                self._load.forget(lost.worker)

    def _on_router(self, name: str, learned: routes.Learned | None, tables: bytes) -> None:
        if learned is None:
            self.learned.pop(name, None)
            return
        try:
            self.learned[name] = Router(learned, tables)
        except ValueError as exc:
            _log.warning("router %s can't be used: %s", name, exc)

    def _on_pool(self, message: base.Message) -> None:
        try:
            beat = PoolBeat.model_validate_json(message.data)
        except ValidationError as exc:
            _log.warning("a pool's beat on %s is unreadable: %s", message.subject, exc.errors()[0]["msg"])
            return
        now = time.monotonic()
        startable = frozenset(
            each.base for each in beat.instances if each.state != "failed" and not each.failing
        )
        self._pools = {name: heard for name, heard in self._pools.items() if now - heard[0] <= _LOST_AFTER}
        self._pools[beat.name] = now, startable

    def _startable(self) -> Iterator[str]:
        """Bases that a live pool serves, or starts for their requests."""
        now = time.monotonic()
        for at, bases in self._pools.values():
            if now - at <= _LOST_AFTER:
                yield from bases

    @property
    def serving(self) -> bool:
        """Whether a live worker takes requests, or a live pool starts one for them."""
        return any(self._startable()) or any(beat.state == "serving" for beat in self.beats())

    def served(self, model: str) -> bool:
        """Whether a live worker takes requests for `model`; else they wait for one."""
        return any(
            beat.state == "serving" and any(card.id == model for card in beat.models)
            for beat in self._fleet.live(time.monotonic())
        )

    def up(self, base_model: str) -> bool:
        """Whether a live worker serves a base, or one is started when requests wait for it: by a live pool,
        or by whom its entry means with `wakes`. Of what isn't heard of yet it is taken for granted."""
        entry = self.declared.get(base_model)
        return (
            time.monotonic() - self._since < _HEARD_AFTER
            or (entry is not None and entry.wakes)
            or self.served(base_model)
            or base_model in self._startable()
        )

    def full(self, base_model: str) -> bool:
        """Whether all workers of a base have had no room for a while."""
        now = time.monotonic()
        serving = [
            beat.worker
            for beat in self._fleet.live(now)
            if beat.state == "serving" and beat.base == base_model
        ]
        return bool(serving) and all(self._load.full(worker, now) for worker in serving)

    def card(self, model: str) -> ModelCard | None:
        """Of a model that a worker serves, or that the fleet remembers."""
        live = self._fleet.card(model, time.monotonic())
        if live is not None:
            return live
        entry = self._registry.entries.get(model)
        return None if entry is None else entry.card

    @property
    def unreadable(self) -> Collection[str]:
        """Names of which something is declared that can't be read."""
        return self.entries.unreadable

    @property
    def declared(self) -> Mapping[str, ModelEntry]:
        return self.entries.entries

    def beats(self) -> list[Heartbeat]:
        """The newest of each live worker."""
        return list(self._fleet.live(time.monotonic()))

    def cards(self) -> dict[str, ModelCard]:
        registered = {name: entry.card for name, entry in self._registry.entries.items()}
        return {**registered, **self._fleet.models(time.monotonic())}

    def find(self, model: str) -> ModelCard:
        """Raises errors.UnknownModel, which lists the models there are."""
        card = self.card(model)
        if card is None:
            known = ", ".join(sorted(self.cards())) or "none yet: no worker has announced itself"
            raise errors.UnknownModel(
                f"model {model[:200]!r} is not served; known models: {known}", param="model"
            )
        return card
