"""Which models there are: those that live workers announce, and those the registry remembers.

The registry (KV `models`, kept by the scheduler) lets a model whose workers are all gone keep its
queue: its requests wait instead of failing as unknown.
"""

from __future__ import annotations

import time
from typing import Self

from pydantic import ValidationError

from broker import base, errors, fleet, subjects
from broker.messages import ModelCard

_LOST_AFTER = 5.0
"""Seconds: lenient, since an unknown model costs a caller more than a wait in the queue."""


class Catalogue:
    """Fed by broker callbacks on the event loop; an async context manager."""

    def __init__(self, broker: base.Broker) -> None:
        self._broker = broker
        self._fleet = fleet.Fleet(_LOST_AFTER)
        self._registered: dict[str, ModelCard] = {}
        self._subscriptions: list[base.Subscription] = []

    async def __aenter__(self) -> Self:
        self._subscriptions = [
            await self._broker.subscribe(subjects.ALL_HEARTBEATS, self._on_heartbeat),
            await self._broker.watch(subjects.KV_MODELS, self._on_registered),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for subscription in self._subscriptions:
            await subscription.close()

    def _on_heartbeat(self, message: base.Message) -> None:
        now = time.monotonic()
        beat = self._fleet.observe(message, now)
        if beat is not None and beat.seq % 100 == 0:
            self._fleet.expire(now)  # now and then, so that names of workers long gone are let go

    def _on_registered(self, key: str, value: bytes | None) -> None:
        name = subjects.name(key)
        self._registered.pop(name, None)
        if value is not None:
            try:
                self._registered[name] = ModelCard.model_validate_json(value)
            except ValidationError:
                return  # a newer release's card, or a hand-made one: its workers announce it as well

    @property
    def serving(self) -> bool:
        """Whether at least one live worker takes requests."""
        return any(beat.state == "serving" for beat in self._fleet.live(time.monotonic()))

    def cards(self) -> dict[str, ModelCard]:
        return {**self._registered, **self._fleet.models(time.monotonic())}

    def find(self, model: str) -> ModelCard:
        """Raises errors.UnknownModel, which lists the models there are."""
        found = self._fleet.card(model, time.monotonic()) or self._registered.get(model)
        if found is None:
            known = ", ".join(sorted(self.cards())) or "none yet: no worker has announced itself"
            raise errors.UnknownModel(
                f"model {model[:200]!r} is not served; known models: {known}", param="model"
            )
        return found
