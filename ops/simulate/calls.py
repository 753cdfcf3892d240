"""A request of a workload, as the simulated world knows it: its true output included."""

from __future__ import annotations

from dataclasses import dataclass

from kvstate import prefix


@dataclass(frozen=True, slots=True)
class Call:
    """Times in seconds, lengths in tokens.

    Attributes:
        source: number of the stream, or trace, that it is from.
        output: what it will make; nobody knows before it is made.
        hashes: one a block of the engines; equal ones mean equal prefixes.
        shareable: of its prompt, what a cache that forgets nothing would have of earlier requests.
        max_tokens: the bound that the request names; 0 = none.
        model: the adapter that it is for, `<name>@<version>`; "" = none, the base.
    """

    at: float
    source: int
    tenant: str
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()
    shareable: int = 0
    max_tokens: int = 0
    model: str = ""

    def prefix(self, block_size: int) -> tuple[int, ...]:
        """What the dispatcher is told of `hashes`: those at the ends of its own, larger blocks."""
        step = prefix.BLOCK_TOKENS // block_size
        return self.hashes[step - 1 : step * prefix.LIMIT : step]
