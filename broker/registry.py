"""The models that the fleet remembers: KV bucket `models`, kept by the scheduler, read by all."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pydantic import ValidationError

from broker import base, errors, subjects
from broker.messages import ModelCard

_log = logging.getLogger(__name__)


class _Stored(ModelCard):
    served_ms: int = 0


class Entry(NamedTuple):
    """A model, and the unix time in ms at which it was last noted that a worker serves it; 0 = never."""

    card: ModelCard
    served_ms: int


class Registry:
    """The bucket as of its last change. Owned by the process's event loop."""

    def __init__(self, broker: base.Broker) -> None:
        self._broker = broker
        self.entries: dict[str, Entry] = {}

    async def watch(self) -> base.Subscription:
        return await self._broker.watch(subjects.KV_MODELS, self._on_change)

    async def put(self, card: ModelCard, served_ms: int) -> None:
        """Raises errors.Unavailable, and then `entries` is as it was."""
        before, self.entries[card.id] = self.entries.get(card.id), Entry(card, served_ms)
        value = _Stored(**card.model_dump(), served_ms=served_ms).model_dump_json().encode()
        try:
            await self._broker.put(subjects.KV_MODELS, subjects.token(card.id), value)
        except errors.Unavailable:
            del self.entries[card.id]
            if before is not None:
                self.entries[card.id] = before
            raise

    async def remove(self, model: str) -> None:
        await self._broker.remove(subjects.KV_MODELS, subjects.token(model))

    def _on_change(self, key: str, value: bytes | None) -> None:
        try:
            name = subjects.name(key)
            self.entries.pop(name, None)
            if value is not None:
                stored = _Stored.model_validate_json(value)
                card = ModelCard(**stored.model_dump(exclude={"served_ms"}))
                self.entries[name] = Entry(card, stored.served_ms)
        except (ValidationError, UnicodeDecodeError):
            # A newer release's entry, or a hand-made one: the model's workers announce it as well.
            _log.warning("the registry's entry %s is unreadable", key)
