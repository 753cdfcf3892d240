"""Whether another worker of the base could serve an adapter that this one can't.

Heartbeats tell, but are heard only while that is in question: a large fleet sends thousands a second.
"""

from __future__ import annotations

import asyncio

from pydantic import ValidationError

from broker import base, subjects
from broker.messages import Heartbeat

_BEATS = 3
"""Heartbeats for which is listened; a worker that sends none of them is lost."""

_LISTEN = 0.3
"""Seconds for which is listened at least: other workers' heartbeats may be slower than ours."""

_KNOWN = 2.0
"""Seconds for which what was heard holds."""


class Peers:
    """Owned by the worker's event loop. `base_model`: of the workers that count, other than `name`."""

    def __init__(self, broker: base.Broker, name: str, base_model: str, heartbeat: float) -> None:
        self._broker = broker
        self._name = name
        self._base = base_model
        self._listen = max(_LISTEN, _BEATS * heartbeat)
        self._heard: dict[str, int] = {}
        self._until = 0.0
        self._listening: asyncio.Task[None] | None = None

    async def max_rank(self) -> int:
        """The largest rank of an adapter that another live worker takes; 0 = there is none with slots.

        Raises errors.Unavailable.
        """
        if asyncio.get_running_loop().time() >= self._until:
            if self._listening is None:
                self._listening = asyncio.create_task(self._hear())
                self._listening.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._listening)
        return max(self._heard.values(), default=0)

    async def close(self) -> None:
        """Idempotent."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])

    async def _hear(self) -> None:
        heard: dict[str, int] = {}

        def on_beat(message: base.Message) -> None:
            try:
                beat = Heartbeat.model_validate_json(message.data)
            except ValidationError:
                return  # who leads warns of it
            if beat.base == self._base and beat.worker != self._name:
                takes = beat.slots and beat.state in ("serving", "asleep")
                heard[beat.worker] = beat.max_rank if takes else 0

        try:
            subscription = await self._broker.subscribe(subjects.ALL_HEARTBEATS, on_beat)
            try:
                await asyncio.sleep(self._listen)
            finally:
                await subscription.close()
            self._heard, self._until = heard, asyncio.get_running_loop().time() + _KNOWN
        finally:
            self._listening = None
