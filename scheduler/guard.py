"""Hand on what lost workers held: a worker without a heartbeat for `lost_after` is lost, and its requests
go back to the queue at once, if we lead.

A silence may be our own: our loop stood still, or our connection. What a look finds late is therefore
counted from anew, and nobody is given up before the broker has answered once more: its answer comes after all
heartbeats that it had for us. A worker that was only slow and is given up costs its requests a second
run; who runs them later has the higher attempt, and that one is heard.

The broker knows no more of a worker that hangs than we do: it goes on delivering to its pulls. Until it is
heard again, or they have lapsed, that is handed on as well.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from pydantic import ValidationError

from broker import base, errors, subjects
from broker.messages import Heartbeat, Held, ServiceClass
from scheduler import held, metrics
from scheduler.leader import Leader

_log = logging.getLogger(__name__)

_LOOKS = 6
"""Looks for silent workers within `lost_after`."""

PULLS_STAND = 60.0
"""Seconds after which no pull stands any more; `broker.client` asks for 10."""

_HICCUP = 1 / 3
"""Of `lost_after`, about a heartbeat: a look that is late by more has found a silence of our own."""


class Guard:
    """Owned by the scheduler's event loop; `run` is the leader's one task."""

    def __init__(
        self,
        lost_after: float,
        broker: base.Broker,
        leader: Leader,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._spawn = spawn
        self._lost_after = lost_after
        self._hiccup = _HICCUP * lost_after
        self._broker = broker
        self._leader = leader
        self._held = held.Table()
        self._began = asyncio.get_running_loop().time()
        self._bounced: dict[str, tuple[float, base.Subscription]] = {}  # by inbox, and until when
        self._heard: set[str] = set()  # inboxes of workers that came back
        self.on_lost: Callable[[held.Lost], None] = lambda lost: None  # before its requests are handed on
        self.in_other_hands: Callable[[int], bool] = lambda seq: False  # than a worker's

    @property
    def knows_all(self) -> bool:
        """Whether each worker that lives has had the time to tell us of what it holds."""
        heard_since = max(self._began, self._broker.disturbed)
        return asyncio.get_running_loop().time() - heard_since > 2 * self._lost_after

    def holds(self, seq: int) -> bool:
        """Whether a worker that lives, as far as we heard, has the request."""
        return seq in self._held

    def on_heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """Whether the worker must be asked for its roster."""
        self.is_awake(beat.inbox)
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
        interval = min(self._lost_after / _LOOKS, self._leader.interval)
        looked = time.monotonic()
        try:
            while True:
                await self._leader.keep()
                if self._broker.connected:
                    now = time.monotonic()
                    if now - looked > interval + self._hiccup:
                        self._held.grace(now)
                    looked = now
                    await self._listen_no_longer(now)
                    await self._look(now)
                await asyncio.sleep(interval)
        finally:
            await self._listen_no_longer(math.inf)

    async def _look(self, now: float) -> None:
        if not self._leader.leads:
            # Kept for when we do; past the ack wait the broker has handed it on by itself.
            self._held.lose(now, max(self._lost_after, self._broker.ack_wait))
        elif self._held.silent(now, self._lost_after) and await self._leader.confirm():
            answered = time.monotonic()
            if answered - now <= self._hiccup:
                lost = self._held.lose(answered, self._lost_after)
                for each in lost:
                    self.on_lost(each)
                await asyncio.gather(*map(self._hand_on, lost))

    async def _hand_on(self, lost: held.Lost) -> None:
        told = {"worker": lost.worker, "requests": len(lost.receipts)}
        _log.warning("worker %s fell silent; requests held: %d", lost.worker, len(lost.receipts), extra=told)
        metrics.LOST.inc()
        try:
            await self.bounce(lost.worker, lost.beat.inbox)
            for receipt in lost.receipts:
                await self._broker.hand_on(receipt)
                metrics.HANDED_ON.inc()
        except errors.HeadraceError as exc:
            _log.warning("the rest is left to the ack wait: %s", exc.message, extra=told)
        self._spawn(self.hand_on_unclaimed(lost.beat.base))

    async def bounce(self, name: str, inbox: str) -> None:
        """Hand on what is still delivered to the pulls of a process that hangs, while they stand. Of one that
        has gone they end with its connection, unless we listen in its place."""
        if not inbox or not await self._broker.listens(subjects.roster(name)):
            return
        until = time.monotonic() + PULLS_STAND
        if inbox in self._bounced:
            self._bounced[inbox] = until, self._bounced[inbox][1]
            return
        subscription = await self._broker.bounce(inbox)
        _, first = self._bounced.setdefault(inbox, (until, subscription))
        if first is not subscription:
            await subscription.close()  # another call was sooner

    def is_awake(self, inbox: str) -> None:
        """Whose pulls had to be bounced has ended them."""
        if inbox in self._bounced:
            self._heard.add(inbox)

    async def hand_on_unclaimed(self, base_model: str, patience: float | None = None) -> None:
        """What a worker was delivered and had no time to tell of, or a dispatcher to hand out, before it was
        lost. Told of by nobody for `patience` seconds (None = for as long as a worker may be silent), it is
        held by nobody that lives."""
        unclaimed: dict[int, str] = {}
        for service_class in ServiceClass:
            unclaimed |= await self._broker.delivered(base_model, service_class)
        unclaimed = {seq: receipt for seq, receipt in unclaimed.items() if seq not in self._held}
        await asyncio.sleep(self._lost_after if patience is None else patience)
        if self._leader.leads:
            for seq, receipt in unclaimed.items():
                if seq not in self._held and not self.in_other_hands(
                    seq
                ):  # acked in the meantime, its receipt does nothing
                    await self._broker.hand_on(receipt)

    async def _listen_no_longer(self, now: float) -> None:
        """To what comes to workers that were lost, once they are heard; and if another leads: two that hand
        one delivery on would take it from its next holder."""
        for inbox, (until, subscription) in list(self._bounced.items()):
            if inbox in self._heard or now > until or not self._leader.leads:
                del self._bounced[inbox]
                await subscription.close()
        self._heard.clear()
