"""`headrace up --autoscale`: as many workers on this machine as the scheduler asks for, within bounds.

The scheduler's figure lies in the bucket `placement`. Workers that are too many drain: what they run ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from broker import errors
from broker.base import Broker
from broker.config import BrokerConfig
from broker.placement import Placement, Placements
from ops.child import Child

logger = logging.getLogger(__name__)

_RETRY = 1.0
"""Seconds from one try to reach the broker to the next."""


class Range(NamedTuple):
    """Workers, at least and at most."""

    least: int
    most: int

    def within(self, count: int) -> int:
        return min(max(count, self.least), self.most)


class Workers:
    """The workers of one `up`; each keeps its number, and a new one gets the first that is free.

    Attributes:
        children: those that run, draining ones included. Written by `resize` alone, once it was called.
    """

    def __init__(
        self,
        children: list[Child],
        make: Callable[[int], Child],
        group: asyncio.TaskGroup,
        grace: float,
        on_gone: Callable[[str], None],
    ) -> None:
        """
        Args:
            children: workers 0, 1, …
            make: a worker, by its number.
            grace: seconds that one has to drain.
            on_gone: gets the name of one that has ended.
        """
        self.children = children
        self._numbers = dict(enumerate(children))
        self._make = make
        self._group = group
        self._grace = grace
        self._on_gone = on_gone
        self._leaving: set[int] = set()

    @property
    def count(self) -> int:
        """Those that shall stay."""
        return len(self._numbers) - len(self._leaving)

    def resize(self, count: int) -> None:
        """Start or drain workers until `count` are left, the newest first."""
        while self.count < count:
            number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
            child = self._make(number)
            child.settled = True  # the fleet serves: one that can't start is tried again, and ends nothing
            self._numbers[number] = child
            self.children.append(child)
            self._group.create_task(child.keep_alive())
        while self.count > count:
            number = max(self._numbers.keys() - self._leaving)
            self._leaving.add(number)
            self._group.create_task(self._drain(number))

    async def _drain(self, number: int) -> None:
        child = self._numbers[number]
        await child.stop(self._grace)
        self._leaving.discard(number)
        del self._numbers[number]
        self.children.remove(child)
        self._on_gone(child.name)


async def follow(workers: Workers, bounds: Range, config: BrokerConfig, began: float) -> None:
    """Resize for ever. What was asked for before `began`, by `time.monotonic`, is another run's, and void."""
    from broker import client  # loads nats-py: not for an `up` that does not autoscale

    started = [child.ready for child in workers.children]
    done, _ = await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)  # it has made the buckets
    facts = done.pop().result()
    while True:
        try:
            async with await client.connect(config, "headrace up", make_streams=False) as broker:
                await _follow(workers, bounds, broker, str(facts["base"]), began)
        except errors.Unavailable as exc:
            logger.warning("autoscaling waits for the broker: %s", exc.message)
            await asyncio.sleep(_RETRY)


async def _follow(workers: Workers, bounds: Range, broker: Broker, base: str, began: float) -> None:
    changed, placements = asyncio.Event(), Placements(broker)
    placements.on_change = lambda name: changed.set()
    await placements.watch()
    while True:
        changed.clear()
        placed = placements.bases.get(base)
        began_ms = broker.now_ms() - (time.monotonic() - began) * 1000
        if placed is not None and placed.made_ms >= began_ms:
            _apply(workers, bounds, placed)
        await changed.wait()


def _apply(workers: Workers, bounds: Range, placed: Placement) -> None:
    count = bounds.within(placed.replicas)
    if count != workers.count:
        told = {"workers": workers.count, "wanted": count, "reason": placed.reason}
        logger.info("from %d workers to %d: %s", workers.count, count, placed.reason, extra=told)
        workers.resize(count)
