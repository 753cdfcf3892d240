"""Which slots hold which block, as integers of bits. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Holders:
    """A walk along a chain takes one AND a block, whatever the number of slots.

    A block that one slot alone holds, as most are, is kept as `~slot`: an integer with its bit set would take
    room for all bits below.
    """

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._bits: list[int] = []  # 1 << slot

    def extend(self, slots: int) -> None:
        """There are so many slots."""
        self._bits += [1 << slot for slot in range(len(self._bits), slots)]

    def add(self, block: int, slot: int) -> None:
        """`slot` must not hold it yet."""
        holders = self._masks.get(block)
        if holders is None:
            self._masks[block] = ~slot
        elif holders >= 0:
            self._masks[block] = holders | self._bits[slot]
        else:
            self._masks[block] = self._bits[~holders] | self._bits[slot]

    def remove(self, block: int, slot: int) -> None:
        """`slot` must hold it."""
        holders = self._masks[block]
        if holders < 0:
            del self._masks[block]
            return
        holders &= ~self._bits[slot]
        self._masks[block] = holders if holders & (holders - 1) else ~(holders.bit_length() - 1)

    def walk(self, hashes: Sequence[int], among: int) -> list[tuple[int, int]]:
        """(blocks, mask of the slots `among` these that hold at least the first so many), deepest last, each
        mask within the one before; only where it gets smaller."""
        mask, levels, masks = among, [], self._masks
        for depth, block in enumerate(hashes):
            holders = masks.get(block, 0)
            if holders < 0:
                holders = self._bits[~holders]
            deeper = mask & holders
            if deeper != mask:
                if depth:
                    levels.append((depth, mask))
                if not deeper:
                    return levels
                mask = deeper
        if hashes and mask:
            levels.append((len(hashes), mask))
        return levels

    def masks(self) -> dict[int, int]:
        """Of each block that somebody holds."""
        return {block: self._bits[~mask] if mask < 0 else mask for block, mask in self._masks.items()}
