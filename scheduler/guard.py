"""Hand on what lost workers held: a worker without a heartbeat for `lost_after` is lost, and its requests
go back to the queue at once, if we lead.

A silence may be our own: our loop stood still, or our connection. What a look finds late is therefore
counted from anew, and nobody is given up before the broker has answered once more: its answer comes after all
heartbeats that it had for us. A worker that was only slow and is given up costs its requests a second
run; who runs them later has the higher attempt, and that one is heard.
"""

from __future__ import annotations

import asyncio
import logging
import time

from pydantic import ValidationError

from broker import base, errors, subjects
from broker.messages import Heartbeat, Held
from scheduler import held, metrics
from scheduler.leader import Leader

_log = logging.getLogger(__name__)

_LOOKS = 6
"""Looks for silent workers within `lost_after`."""

_HICCUP = 1 / 3
"""Of `lost_after`, about a heartbeat: a look that is late by more has found a silence of our own."""


class Guard:
    """Owned by the scheduler's event loop; `run` is the leader's one task."""

    def __init__(self, lost_after: float, broker: base.Broker, leader: Leader) -> None:
        self._lost_after = lost_after
        self._hiccup = _HICCUP * lost_after
        self._broker = broker
        self._leader = leader
        self._held = held.Table()

    def on_heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """Whether the worker must be asked for its roster."""
        return self._held.beat(beat, now)

    def on_held(self, message: base.Message) -> None:
        try:
            told = Held.model_validate_json(message.data)
            worker = subjects.name(message.subject.partition(".")[2])
        except (ValidationError, UnicodeDecodeError):
            _log.warning("a message on %s is unreadable", message.subject)
        else:
            self._held.hear(worker, told)

    async def run(self) -> None:
        """Keep the lease and look for silent workers, for ever. Nothing slow may stand in here."""
        interval = self._lost_after / _LOOKS
        looked = time.monotonic()
        while True:
            await self._leader.keep()
            if self._broker.connected:
                now = time.monotonic()
                if now - looked > interval + self._hiccup:
                    self._held.grace(now)
                looked = now
                await self._look(now)
            await asyncio.sleep(interval)

    async def _look(self, now: float) -> None:
        if not self._leader.leads:
            # Kept for when we do; past the ack wait the broker has handed it on by itself.
            self._held.lose(now, max(self._lost_after, self._broker.ack_wait))
        elif self._held.silent(now, self._lost_after) and await self._leader.confirm():
            answered = time.monotonic()
            if answered - now <= self._hiccup:
                for lost in self._held.lose(answered, self._lost_after):
                    await self._hand_on(lost)

    async def _hand_on(self, lost: held.Lost) -> None:
        count = 0
        for receipt in lost.receipts:
            try:
                await self._broker.hand_on(receipt)
                count += 1
            except errors.HeadraceError as exc:
                _log.warning("a request is left to the ack wait: %s", exc.message)
        metrics.LOST.inc()
        metrics.HANDED_ON.inc(count)
        told = {"worker": lost.worker, "requests": count}
        _log.warning("worker %s fell silent; requests handed on: %d", lost.worker, count, extra=told)
