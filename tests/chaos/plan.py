"""Which fault strikes what, and when: a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is done to a process. All but the drains take it by surprise."""

    KILL_WORKER = "kill worker"
    STOP_WORKER = "stop worker"  # SIGSTOP, and SIGCONT in the end: it was hung
    STALL_WORKER = "stall worker"  # nothing gets through between it and the broker, and then all does
    CUT_WORKER = "cut worker"  # its connection breaks, and no new one is taken
    MUTE_WORKER = "mute worker"  # its heartbeats are lost, and nothing else is
    LIE_WORKER = "lie worker"  # in its name untrue figures are told, and garbage
    SKEW_WORKER = "skew worker"  # it is killed, and its successor's clock is wrong
    DRAIN_WORKER = "drain worker"  # SIGTERM, once its successor serves
    KILL_INGRESS = "kill ingress"
    STOP_INGRESS = "stop ingress"
    CUT_INGRESS = "cut ingress"
    SKEW_INGRESS = "skew ingress"
    DRAIN_INGRESS = "drain ingress"
    KILL_SCHEDULER = "kill scheduler"
    STOP_SCHEDULER = "stop scheduler"
    CUT_SCHEDULER = "cut scheduler"
    SKEW_SCHEDULER = "skew scheduler"
    KILL_NATS = "kill nats"

    @property
    def part(self) -> str:
        return self.split()[-1]


class _Way(NamedTuple):
    """How often a fault strikes, how long it lasts, and how long after that its target is left alone."""

    weight: int
    shortest: float
    longest: float
    recovery: float


_WAYS = {
    Kind.KILL_WORKER: _Way(30, 0.2, 1.5, 3.0),
    Kind.STOP_WORKER: _Way(15, 0.5, 3.0, 2.0),
    Kind.STALL_WORKER: _Way(10, 0.5, 3.0, 2.0),
    Kind.CUT_WORKER: _Way(10, 0.5, 3.0, 2.0),
    Kind.MUTE_WORKER: _Way(8, 0.5, 3.0, 2.0),
    Kind.LIE_WORKER: _Way(8, 1.0, 5.0, 1.0),
    Kind.SKEW_WORKER: _Way(8, 0.2, 1.5, 3.0),
    Kind.DRAIN_WORKER: _Way(10, 0.0, 0.0, 4.0),
    Kind.KILL_INGRESS: _Way(10, 0.2, 1.5, 4.0),
    Kind.STOP_INGRESS: _Way(5, 0.5, 3.0, 2.0),
    Kind.CUT_INGRESS: _Way(5, 0.5, 3.0, 2.0),
    Kind.SKEW_INGRESS: _Way(4, 0.2, 1.5, 4.0),
    Kind.DRAIN_INGRESS: _Way(5, 0.0, 0.0, 5.0),
    Kind.KILL_SCHEDULER: _Way(8, 0.2, 1.5, 4.0),
    Kind.STOP_SCHEDULER: _Way(5, 0.5, 5.0, 3.0),
    Kind.CUT_SCHEDULER: _Way(5, 0.5, 5.0, 3.0),
    Kind.SKEW_SCHEDULER: _Way(4, 0.2, 1.5, 4.0),
    # An election takes nats-server up to 9 s, and a second node lost before its end is one too many.
    Kind.KILL_NATS: _Way(7, 0.5, 3.0, 20.0),
}

ELECTION = 10.0
"""Seconds for which the journal may have no leader once a node has gone. A worker and an ingress that both
die in them are one too many: nobody is left who has the streams' last tokens (docs/faults.md)."""
_EITHER = {"worker": "ingress", "ingress": "worker"}

SPARED = {"worker": 2, "ingress": 1, "scheduler": 0, "nats": 2}
"""How many of a part are never under a fault, or recovering from one, at the same time."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`at` seconds after the start, for `lasts` seconds, to number `slot` of its kind's part."""

    at: float
    kind: Kind
    slot: int
    lasts: float


def plan(
    seed: int, seconds: float, sizes: Mapping[str, int], every: float = 2.5, only: str = ""
) -> tuple[Fault, ...]:
    """The faults of one run, in order, `every` so many seconds on average; the same for the same arguments.

    Args:
        seconds: length of the run; a fault's end may lie past it.
        sizes: how many there are of each part.
        only: the part that is struck; "" = all are.
    """
    dice = random.Random(seed)
    busy_until: dict[tuple[str, int], float] = {}
    faults: list[Fault] = []
    elects_until, spared = 0.0, ""
    at = 0.0
    while True:
        at += dice.uniform(0.1 * every, 1.9 * every)
        if at >= seconds:
            return tuple(faults)
        struck = {only: sizes[only]} if only else sizes
        free = {part: _free(part, size, busy_until, at) for part, size in struck.items()}
        if at >= elects_until:
            spared = ""
        kinds = [kind for kind in _WAYS if free.get(kind.part) and kind.part != spared]
        if not kinds:
            continue
        kind = dice.choices(kinds, [_WAYS[kind].weight for kind in kinds])[0]
        way, slot = _WAYS[kind], dice.choice(free[kind.part])
        lasts = dice.uniform(way.shortest, way.longest)
        busy_until[kind.part, slot] = at + lasts + way.recovery
        if kind is Kind.KILL_NATS:
            elects_until = at + ELECTION
        elif at < elects_until:
            spared = spared or _EITHER.get(kind.part, "")
        faults.append(Fault(round(at, 3), kind, slot, round(lasts, 3)))


def rolling(sizes: Mapping[str, int], every: float = 2.5) -> tuple[Fault, ...]:
    """An update of every worker and every ingress, one after the other."""
    parts = [
        (kind, slot) for kind in (Kind.DRAIN_WORKER, Kind.DRAIN_INGRESS) for slot in range(sizes[kind.part])
    ]
    return tuple(Fault(every * n, kind, slot, 0.0) for n, (kind, slot) in enumerate(parts, start=1))


def _free(part: str, size: int, busy_until: Mapping[tuple[str, int], float], at: float) -> list[int]:
    """The slots that may be struck at `at`: none where too few would be left."""
    free = [slot for slot in range(size) if busy_until.get((part, slot), 0.0) <= at]
    return free if len(free) > SPARED[part] else []
