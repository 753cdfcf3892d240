"""Which of several schedulers leads: a lease in the bucket `leases`, moved by compare-and-set.

The holder renews its lease four times in its `ttl`, and each renewal is a new revision. No two clocks are
ever compared: a standby, which looks more often, takes the lease once it has seen one revision stand for a
whole `ttl` by its own clock, and the holder stops leading before that can be, since it counts from before it
asked for the renewal.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid

import orjson

from broker import base, errors, subjects
from scheduler import metrics

_log = logging.getLogger(__name__)

_RENEWALS = 4
"""In one `ttl`. Two may fail in a row, and the lease is still held."""

_LOOKS = 16
"""Of a standby, in one `ttl`."""

_KEPT = 0.8
"""Part of the `ttl` for which a renewal makes its holder lead: the rest is for clocks of different speed,
and for what it had begun to do."""


class Lease:
    """What one candidate knows of the lease. Pure: the clock is handed in, `time.monotonic()` seconds.

    Attributes:
        revision: the newest that was seen; -1 = none yet.
        held: whether the newest revision is our own.
    """

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self.revision = -1
        self.held = False
        self._taken = False
        self._since = 0.0
        self._until = -math.inf

    def saw(self, revision: int, taken: bool, now: float) -> None:
        """What the bucket holds; `taken`: another's, whether that one lives or not."""
        if revision != self.revision:
            self.revision, self._since = revision, now
        self._taken, self.held = taken, False

    def free(self, now: float) -> bool:
        """Whether it may be taken by a swap of `revision`."""
        return not self._taken or now - self._since >= self.ttl

    def won(self, revision: int, asked: float) -> None:
        """It is ours by a swap that was sent at `asked`."""
        self.revision, self.held, self._until = revision, True, asked + _KEPT * self.ttl

    def lost(self) -> None:
        """Another one's swap came first, or it was given up."""
        self.held, self._until = False, -math.inf

    def leads(self, now: float) -> bool:
        return now < self._until


class Leader:
    """A candidate. `keep`, `confirm` and `resign` are one task's to call."""

    def __init__(self, broker: base.Broker, name: str, ttl: float) -> None:
        self._broker = broker
        # No other process has these bytes, so that a swap whose answer was lost is known again.
        self._holder = orjson.dumps({"holder": name, "life": uuid.uuid4().hex})
        self._lease = Lease(ttl)
        self._asked = -math.inf
        self._led = False

    @property
    def interval(self) -> float:
        """Seconds between two calls of `keep`, at most."""
        return self._lease.ttl / _LOOKS

    @property
    def leads(self) -> bool:
        """True of one scheduler at most, but for a quarter of the `ttl` after a broker without replicas was
        restarted, which forgets the lease; of none while the broker can't be reached."""
        return self._broker.connected and self._lease.leads(time.monotonic())

    @property
    def holds(self) -> bool:
        """Whether, as far as we know, nobody else has led since we did: one who leads no more may, again."""
        return self._lease.held

    @property
    def revision(self) -> int:
        """Of the lease, as of its last renewal: more than any that a leader before had."""
        return self._lease.revision

    async def keep(self) -> None:
        """Renew the lease, or look whether it is free, if it is time to."""
        if time.monotonic() - self._asked >= self._lease.ttl / (_RENEWALS if self._lease.held else _LOOKS):
            await self.confirm()

    async def confirm(self) -> bool:
        """Renew now, or take it if it is free; whether we lead.

        The answer comes after all that the broker had for us before: what is known then is known of the
        world, not of a stalled connection.
        """
        self._asked = time.monotonic()
        if self._broker.connected:
            try:
                # An answer that is later is worth nothing, and a lost one must not hold up the next look.
                async with asyncio.timeout(self._lease.ttl):
                    await self._confirm()
            except (errors.Unavailable, TimeoutError) as exc:
                _log.warning("the lease is out of reach: %s", str(exc) or "no answer in time")
        self._tell()
        return self.leads

    async def _confirm(self) -> None:
        if not self._lease.held:
            data, revision = await self._broker.get(subjects.KV_LEASES, subjects.LEADER)
            taken = data not in (None, b"", self._holder)
            self._lease.saw(revision, taken, time.monotonic())
            if not self._lease.free(time.monotonic()):
                return
        asked = time.monotonic()
        renewed = await self._swap(self._holder)
        if renewed is None:
            self._lease.lost()
        else:
            self._lease.won(renewed, asked)

    async def _swap(self, value: bytes) -> int | None:
        return await self._broker.swap(subjects.KV_LEASES, subjects.LEADER, value, self._lease.revision)

    async def resign(self) -> None:
        """Give the lease up, so that a standby need not wait for its end."""
        held = self._lease.held
        self._lease.lost()
        self._tell()
        if held and self._broker.connected:
            try:
                await self._swap(b"")
            except errors.Unavailable as exc:
                _log.warning("the lease was not given up: %s", exc.message)

    def _tell(self) -> None:
        leads = self.leads
        metrics.LEADER.set(leads)
        if leads != self._led:
            self._led = leads
            _log.info("this scheduler leads" if leads else "this scheduler leads no longer")
