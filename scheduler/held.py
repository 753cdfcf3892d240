"""Which worker holds which requests, as the workers tell it on `held.<worker>`. Pure: the clock is handed in.

The table is there for the leader to hand on what a lost worker held. A receipt names its message whoever
has it now, so it may only be used while nobody else runs the message: the newest attempt that anyone
announced is what counts, and what has moved to another worker is not the lost one's any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.messages import Heartbeat
from broker.messages import Held as Told
from scheduler.patience import Life, Patience


class _Entry(NamedTuple):
    life: _Life
    attempt: int
    receipt: str


@dataclass(slots=True, eq=False)
class _Life:
    """One life of a worker: one that was started anew under its name has let go of nothing for the other.

    Attributes:
        beat: its last heartbeat.
        seen: when that came.
        number: of the last of its messages with nothing missed before it.
        seqs: the requests that are its own.
    """

    beat: Heartbeat
    seen: float = 0.0
    number: int = 0
    seqs: set[int] = field(default_factory=set)


class Lost(NamedTuple):
    """A worker that fell silent, its last heartbeat, and the receipts of what it held."""

    worker: str
    beat: Heartbeat
    receipts: list[str]


class Table:
    """Owned by the scheduler's event loop. Bounded by the fleet's slots: what is let go of leaves it, and
    what a lost worker held leaves with `lose`."""

    def __init__(self) -> None:
        self._lives: dict[Life, _Life] = {}
        self._entries: dict[int, _Entry] = {}
        self._patience = Patience()

    def __len__(self) -> int:
        """Requests that some worker holds."""
        return len(self._entries)

    def __contains__(self, seq: int) -> bool:
        return seq in self._entries

    def beat(self, beat: Heartbeat, now: float) -> bool:
        """Note that a worker lives; whether it must be asked for its roster, since a message was missed."""
        key = beat.worker, beat.started_ms
        if beat.state == "gone":
            self._forget(key)  # it has let go of everything
            return False
        self._patience.heard(key, now)
        life = self._lives.setdefault(key, _Life(beat))
        life.beat, life.seen = beat, now
        return life.number != beat.told

    def hear(self, worker: str, told: Told) -> None:
        """Take a worker's message in. One whose heartbeat was not heard yet is told of again."""
        life = self._lives.get((worker, told.started_ms))
        if life is None:
            return
        if told.full:
            taken = {seq for seq, _, _ in told.take}
            for seq in life.seqs - taken:
                del self._entries[seq]
            life.seqs &= taken
        for seq, attempt, receipt in told.take:
            self._take(life, seq, attempt, receipt)
        for seq, attempt in told.drop:
            entry = self._entries.get(seq)
            if entry is not None and entry.life is life and entry.attempt <= attempt:
                self._drop(seq)
        if told.full or told.number == life.number + 1:
            life.number = told.number

    def _take(self, life: _Life, seq: int, attempt: int, receipt: str) -> None:
        entry = self._entries.get(seq)
        if entry is not None:
            if entry.attempt > attempt:
                return  # it has moved on since
            entry.life.seqs.discard(seq)
        self._entries[seq] = _Entry(life, attempt, receipt)
        life.seqs.add(seq)

    def _drop(self, seq: int) -> None:
        self._entries.pop(seq).life.seqs.discard(seq)

    def grace(self, now: float) -> None:
        """Count every silence from now: it was we who could not hear."""
        for life in self._lives.values():
            life.seen = now

    def silent(self, now: float, limit: float) -> bool:
        """Whether any worker has been silent for more than `limit` seconds, or for as much longer as one
        that was only slow is given."""
        return any(self._silent(now, limit))

    def lose(self, now: float, limit: float) -> list[Lost]:
        """Let go of the workers that are `silent`. One that was taken for lost and lives is new again with
        its next heartbeat, and asked for its roster."""
        lost = [(key, self._lives[key].beat) for key in self._silent(now, limit)]
        for key, _ in lost:
            self._patience.give_up(key, self._lives[key].seen, limit * self._patience.factor(key, now))
        return [Lost(beat.worker, beat, self._forget(key)) for key, beat in lost]

    def _silent(self, now: float, limit: float) -> Iterator[Life]:
        for key, life in self._lives.items():
            silence = now - life.seen
            if silence > limit and silence > limit * self._patience.factor(key, now):
                yield key

    def _forget(self, key: Life) -> list[str]:
        """The receipts of what it held."""
        life = self._lives.pop(key, None)
        return [] if life is None else [self._entries.pop(seq).receipt for seq in sorted(life.seqs)]
