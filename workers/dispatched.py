"""Who hands this worker its requests: a scheduler that dispatches, or while none is heard the worker itself.

A scheduler says on `dispatch` that it hands out the requests of this base; the worker then pulls none, and
tells on `credit.<worker>` whenever it could take more. What a scheduler sends that has lost the lead is not
taken: the one that leads has handed it on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pydantic import ValidationError

from broker import base
from broker.messages import Dispatch, Sent

_log = logging.getLogger(__name__)

BEAT = 0.1
"""Seconds between two heartbeats, at most, while a scheduler hands requests out."""

SILENCE = 0.35
"""Seconds without a word of the dispatcher after which the worker pulls by itself: three are missed."""


class Dispatched:
    """Owned by the worker's event loop.

    Args:
        on_change: called when a dispatcher appears or falls silent.

    Attributes:
        active: whether a scheduler hands our requests out.
        last: epoch and number of the last one that was sent here, which has been taken with all before it.
    """

    def __init__(self, base_model: str, on_change: Callable[[], None]) -> None:
        self._base = base_model
        self._on_change = on_change
        self._silence: asyncio.TimerHandle | None = None
        self._coming: set[int] = set()  # numbers of those that were sent and not taken yet
        self._newest = 0
        self.active = False
        self.last = (0, 0)

    def hear(self, message: base.Message) -> None:
        """A message on `dispatch`."""
        try:
            told = Dispatch.model_validate_json(message.data)
        except ValidationError:
            _log.warning("a message on %s is unreadable", message.subject)
            return
        if self._is_over(told.epoch):
            return
        self._count_for(told.epoch)
        if self._silence is not None:
            self._silence.cancel()
        self._silence = asyncio.get_running_loop().call_later(SILENCE, self._fell_silent)
        self._become(self._base in told.bases)

    def take(self, sent: Sent) -> bool:
        """Note what was sent; whether it may run. `taken` follows, once our figures have it or never will."""
        if self._is_over(sent.epoch):
            return False
        if sent.epoch > self.last[0]:
            self._count_for(sent.epoch)  # its first request is here before its first word
        if self._counts(sent):
            self._coming.add(sent.number)
        return True

    def taken(self, sent: Sent) -> None:
        if not self._counts(sent):
            return
        self._coming.discard(sent.number)
        self._newest = max(self._newest, sent.number)
        number = min(self._coming) - 1 if self._coming else self._newest
        self.last = max(self.last, (sent.epoch, number))

    def close(self) -> None:
        if self._silence is not None:
            self._silence.cancel()

    def _is_over(self, epoch: int) -> bool:
        """Whether who led in that epoch has lost the lead, and does not know."""
        return self._silence is not None and epoch < self.last[0]

    def _counts(self, sent: Sent) -> bool:
        return sent.epoch == self.last[0] and sent.number != 0

    def _count_for(self, epoch: int) -> None:
        """Each dispatcher has numbers of its own, which say nothing to the next."""
        if self.last[0] != epoch:
            self.last, self._newest = (epoch, 0), 0
            self._coming.clear()

    def _fell_silent(self) -> None:
        self._silence = None
        self._become(False)

    def _become(self, active: bool) -> None:
        if active != self.active:
            self.active = active
            self._on_change()
