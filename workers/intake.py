"""From credit to pulls: how many requests to ask of which class's queue. Pure.

One credit stands behind all queues. While the queues are empty a pull for the whole credit stands on
each, so a newcomer of any class starts at once; what comes beyond the credit is handed back. Where
work is known to wait, credit goes to the most urgent class, but every few requests to the next, so
that no class starves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TURN = 8
"""One request in so many goes past a busy class to the next lower one."""


@dataclass(slots=True)
class Queue:
    """What one worker knows of one class's queue. Written by its intake only.

    Attributes:
        backlog: messages known to wait there, as the last delivery told.
        outstanding: asked for and still owed by the broker.
        passed: requests taken from this class since a lower one last had its turn.
    """

    backlog: int = 0
    outstanding: int = 0
    passed: int = 0


def asks(credit: int, queues: Sequence[Queue]) -> list[int]:
    """Requests to ask of each queue, most urgent first, beyond what is outstanding."""
    wanted: list[int] = []
    left = credit
    for number, queue in enumerate(queues):
        due = queue.passed >= TURN and any(lower.backlog for lower in queues[number + 1 :])
        share = max(0, left - 1) if due else left
        wanted.append(max(0, share - queue.outstanding))
        left -= min(share, queue.backlog)
    return wanted


def taken(queues: Sequence[Queue], number: int, backlog: int) -> None:
    """Note that a request of queue `number` was taken, with `backlog` more behind it."""
    queues[number].backlog = backlog
    queues[number].passed += 1
    for higher in queues[:number]:
        higher.passed = 0
