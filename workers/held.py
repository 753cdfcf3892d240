"""Tell the schedulers what this worker holds, so that whoever leads can hand it on when this worker is lost.

What is taken within one turn of the event loop is told in one message, by the first of the requests' tasks
that runs. What is let go of can wait, for the next message or heartbeat: a receipt of what was acked
changes nothing, and what was handed back is known by its next holder's message.
"""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from broker import base, errors, subjects


class Held:
    """What one worker holds. All state belongs to the event loop.

    Attributes:
        number: messages told so far; the heartbeat says it, so that a message which was lost shows.
    """

    def __init__(self, broker: base.Broker, worker: str, started_ms: int) -> None:
        self._broker = broker
        self._subject = subjects.held(worker)
        self._started_ms = started_ms
        self._held: dict[int, base.Delivery] = {}
        self._taken: list[base.Delivery] = []
        self._dropped: list[base.Delivery] = []
        self.number = 0

    def take(self, delivery: base.Delivery) -> None:
        self._held[delivery.seq] = delivery
        self._taken.append(delivery)

    def drop(self, delivery: base.Delivery) -> None:
        if self._held.get(delivery.seq) is delivery:
            del self._held[delivery.seq]
        self._dropped.append(delivery)

    async def tell(self) -> None:
        """What was not told yet, if there is any."""
        if (self._taken or self._dropped) and self._broker.connected:
            taken, self._taken = self._taken, []
            dropped, self._dropped = self._dropped, []
            await self._say({"take": _named(taken), "drop": [(d.seq, d.attempt) for d in dropped]})

    async def tell_all(self) -> None:
        """The answer to `roster`."""
        self._taken, self._dropped = [], []
        await self._say({"full": True, "take": _named(self._held.values())})

    async def _say(self, told: dict[str, object]) -> None:
        self.number += 1
        told |= {"started_ms": self._started_ms, "number": self.number}
        try:
            await self._broker.publish(self._subject, orjson.dumps(told))
        except errors.HeadraceError:
            return  # its number is missed, and the roster asked for


def _named(deliveries: Iterable[base.Delivery]) -> list[tuple[int, int, str]]:
    return [(delivery.seq, delivery.attempt, delivery.receipt) for delivery in deliveries]
