"""Which way a conversation goes, where there are several: the same at each of its turns and at every
ingress, with no state. What is known of a conversation is its tenant and how it began."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence


def key(tenant: str, opening: str) -> str:
    """Of a conversation: `opening` is its system prompt and first question, or its caller's name for it."""
    whole = f"{tenant}\0{opening}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(whole).hexdigest()


def fraction(conversation: str, name: str) -> float:
    """0 < f < 1, uniform over conversations, independent for each `name`."""
    digest = hashlib.sha256(f"{conversation}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def order(conversation: str, way: str, targets: Sequence[tuple[str, int]]) -> list[int]:
    """Indexes of (name, weight), the conversation's first choice first; those without weight come last.

    Weighted rendezvous hashing: each target's score depends on itself alone, so that a target which leaves,
    or can't serve, moves none but its own conversations, and growing one takes conversations to it alone.
    """
    scores = [
        math.log(fraction(conversation, f"{way}\0{name}")) / weight if weight else -math.inf
        for name, weight in targets
    ]
    return sorted(range(len(targets)), key=lambda index: -scores[index])
