"""Who serves what, as the heartbeats tell it. Pure: the clock is handed in."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pydantic import ValidationError

from broker import base
from broker.messages import Heartbeat, ModelCard

_log = logging.getLogger(__name__)


class Fleet:
    """The newest heartbeat of each worker. Owned by the process's event loop.

    Args:
        lost_after: seconds without a heartbeat after which a worker no longer counts.
    """

    def __init__(self, lost_after: float) -> None:
        self._lost_after = lost_after
        self._seen: dict[str, tuple[float, Heartbeat]] = {}
        self._cards: dict[str, tuple[float, ModelCard]] = {}

    def observe(self, message: base.Message, now: float) -> Heartbeat | None:
        """Take one heartbeat in; garbage is logged and left out."""
        try:
            beat = Heartbeat.model_validate_json(message.data)
        except ValidationError as exc:
            _log.warning("a heartbeat on %s is unreadable: %s", message.subject, exc.errors()[0]["msg"])
            return None
        if beat.state == "gone":
            self._seen.pop(beat.worker, None)
        else:
            self._seen[beat.worker] = (now, beat)
            for card in beat.models:
                self._cards[card.id] = (now, card)
        return beat

    def expire(self, now: float) -> list[Heartbeat]:
        """Drop the workers that fell silent, and return their last heartbeats."""
        lost = [beat for at, beat in self._seen.values() if now - at > self._lost_after]
        for beat in lost:
            del self._seen[beat.worker]
        self._cards = {name: seen for name, seen in self._cards.items() if now - seen[0] <= self._lost_after}
        return lost

    def live(self, now: float) -> Iterator[Heartbeat]:
        for at, beat in self._seen.values():
            if now - at <= self._lost_after:
                yield beat

    def card(self, model: str, now: float) -> ModelCard | None:
        """The card of one model, if a worker announced it lately; O(1), since every request asks."""
        seen = self._cards.get(model)
        return seen[1] if seen is not None and now - seen[0] <= self._lost_after else None

    def models(self, now: float) -> dict[str, ModelCard]:
        """Every model that a worker announced lately, by name."""
        return {name: card for name, (at, card) in self._cards.items() if now - at <= self._lost_after}
