"""What one worker's cache is thought to hold. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST = 0.25
"""Share of a worker's capacity that counts as its cache, whatever is learned: a caller can see to it that an
engine caches nothing of its requests, which must not cost the others their places."""

SLACK = 4
"""Blocks in which an engine's count may be off by one, besides one: tokens a block are an estimate, and an
engine computes the last tokens of a prompt even where it has them all."""


SPARE = 2
"""By how many times more of an engine that tells of its cache is remembered than it was thought to hold: it
says itself what it evicts, and how many tokens a block has is an estimate."""


@dataclass(slots=True)
class Cache:
    """
    Attributes:
        blocks: used longest ago first, with the time since when the block has been there: when it was last
            confirmed, or predicted if it never was.
        unsure: those only predicted, by when they expire, the soonest first.
        share: of the capacity that is a cache, as far as was learned; what runs takes the rest.
        told: number of the last change of the engine's that was taken; 0 = it tells none.
        leftovers: blocks that no chain has; they are named -1, -2 and so on.
    """

    worker: str
    capacity: int
    blocks: OrderedDict[int, float] = field(default_factory=OrderedDict)
    unsure: dict[int, float] = field(default_factory=dict)
    share: float = 1.0
    told: int = 0
    leftovers: int = 0

    @property
    def room(self) -> int:
        """In blocks."""
        return max(0, SPARE * self.capacity if self.told else round(self.capacity * self.share))

    def learn(self, hashes: Sequence[int], cached: int, sent: float) -> None:
        """The engine had the first `cached` when it ran what was sent then; call it before they are kept."""
        counted = hashes[:cached]
        sure = sum(map(self.blocks.__contains__, counted)) - sum(map(self.unsure.__contains__, counted))
        unexpected = len(counted) - sure
        missing = 0
        for block in hashes[cached + 1 + cached // SLACK :]:
            if block in self.unsure or self.blocks.get(block, math.inf) >= sent:
                break
            missing += 1
        if unexpected != missing:
            share = self.share + (unexpected - missing) / max(1, self.capacity)
            self.share = min(1.0, max(LEAST, share))

    def leave_behind(self, count: int, now: float) -> None:
        for _ in range(count):
            self.leftovers -= 1
            self.blocks[self.leftovers] = now
