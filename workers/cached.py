"""Tells a scheduler that dispatches which prompts' blocks this worker's engine caches, and has evicted."""

from __future__ import annotations

import logging

from broker import base, errors, subjects
from broker.messages import Cached
from kvstate import prefix
from kvstate.blocks import Blocks

_log = logging.getLogger(__name__)


class Caching:
    """Owned by the worker's event loop. `blocks` is the engine's account; None where it does not tell."""

    def __init__(self, broker: base.Broker, worker: str, started_ms: int, blocks: Blocks | None) -> None:
        self._broker = broker
        self._worker = worker
        self._started_ms = started_ms
        self._blocks = blocks

    @property
    def number(self) -> int:
        """Of the last message; 0 = there was none, or will be no more."""
        return self._blocks.number if self._blocks is not None else 0

    async def tell(self, heard: bool) -> None:
        """What has changed since the last call. While nobody is `heard` who dispatches it is counted and not
        sent: who comes later has missed it, and asks for all."""
        if self._blocks is None:
            return
        taken, evicted = self._blocks.changes()
        if heard and (taken or evicted):
            await self._publish(taken=prefix.encode(taken), evicted=prefix.encode(evicted))

    async def tell_all(self) -> None:
        held = self._blocks.held() if self._blocks is not None else []
        await self._publish(whole=True, taken=prefix.encode(held))

    async def _publish(self, taken: str, evicted: str = "", whole: bool = False) -> None:
        message = Cached(
            worker=self._worker,
            started_ms=self._started_ms,
            number=self.number,
            whole=whole,
            taken=taken,
            evicted=evicted,
        )
        try:
            await self._broker.publish(subjects.cached(self._worker), message.model_dump_json().encode())
        except errors.HeadraceError as exc:  # whoever missed it asks
            _log.warning("what is cached was not told: %s", exc.message)
