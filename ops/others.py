"""Who else serves a pool's bases: other workers and other hosts' pools, by what they tell."""

from __future__ import annotations

import logging
import time
from collections.abc import Container

from pydantic import ValidationError

from broker import base, fleet
from broker.messages import Heartbeat, PoolBeat

logger = logging.getLogger(__name__)

_BEATS_LOST = 3.0
"""Seconds without a beat after which another pool counts as gone: it tells each second."""


class Others:
    """See the module. Owned by the event loop.

    Args:
        name: our pool's.
        own: names of our workers.
        lost_after: seconds without a heartbeat after which a worker serves nothing.
    """

    def __init__(self, name: str, own: Container[str], lost_after: float) -> None:
        self._name = name
        self._own = own
        self._fleet = fleet.Fleet(lost_after)
        self._pools: dict[str, tuple[float, PoolBeat]] = {}

    def on_heartbeat(self, message: base.Message) -> Heartbeat | None:
        return self._fleet.observe(message, time.monotonic())

    def on_pool(self, message: base.Message) -> None:
        try:
            beat = PoolBeat.model_validate_json(message.data)
        except ValidationError as exc:
            logger.warning("a beat on %s is unreadable: %s", message.subject, exc.errors()[0]["msg"])
            return
        if beat.name != self._name:
            self._pools[beat.name] = (time.monotonic(), beat)

    def expire(self, now: float) -> None:
        """Let go of what fell silent."""
        self._fleet.expire(now)
        self._pools = {name: seen for name, seen in self._pools.items() if now - seen[0] <= _BEATS_LOST}

    def serve(self, name: str, queued: int, now: float) -> bool:
        """Whether they see to the `queued` requests for a base. A worker that drains sees to what it has."""
        for beat in self._fleet.live(now):
            if beat.base == name and beat.worker not in self._own:
                running = beat.credit.running + beat.credit.waiting
                if beat.state == "serving" or (beat.state == "draining" and running >= queued):
                    return True
        return any(
            now - at <= _BEATS_LOST
            and any(
                each.base == name and each.state in ("starting", "waking", "hot") and not each.failing
                for each in beat.instances
            )
            for at, beat in self._pools.values()
        )
