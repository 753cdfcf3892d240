"""What the planner sees: one base's workers, adapters and demand, frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from broker.messages import Heartbeat


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that serves.

    Attributes:
        slots: adapters that may run on it at once; 0 = it takes none.
        max_rank: largest rank of an adapter that it takes.
        sequences: requests that one step of it may hold.
    """

    name: str
    slots: int
    max_rank: int
    sequences: int = 1

    @classmethod
    def of(cls, beat: Heartbeat) -> Self:
        """As its heartbeat tells."""
        return cls(beat.worker, beat.slots, beat.max_rank, max(1, beat.credit.slots_total))


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter, as the catalogue has it.

    Attributes:
        model: `<name>@<version>`.
        current: whether the bare name means this version.
        min_replicas: workers that keep it loaded at least; of the current version only.
    """

    model: str
    rank: int
    current: bool = True
    min_replicas: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for of one model.

    Attributes:
        concurrency: requests in the system at once, waiting ones included; a running mean.
        present: those of the last look.
    """

    concurrency: float = 0.0
    present: int = 0

    @property
    def asked(self) -> bool:
        return self.present > 0 or self.concurrency >= IDLE


IDLE = 0.01
"""Concurrency below which nobody asks: a mean of nothing but zeros never gets there."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One base at one moment.

    Attributes:
        barred: by model, the workers on which it failed lately, with the reason.
    """

    base: str
    workers: tuple[Worker, ...] = ()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    barred: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
