"""Which way a conversation goes, where there are several: the same at each of its turns and at every
ingress, with no state. What is known of a conversation is its tenant and how it began."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def key(tenant: str, opening: str) -> str:
    """Of a conversation: `opening` is its system prompt and first question, or its caller's name for it."""
    whole = f"{tenant}\0{opening}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(whole).hexdigest()


def fraction(conversation: str, name: str) -> float:
    """0 ≤ f < 1, uniform over conversations, independent for each `name` where ways part."""
    digest = hashlib.sha256(f"{conversation}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def pick(weights: Sequence[int], at: float) -> int:
    """The index whose share of the whole holds `at`; the first where all weights are 0.

    The shares lie one after the other, so that growing the last one takes conversations from its
    neighbours alone.
    """
    left = at * sum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return max((index for index, weight in enumerate(weights) if weight), default=0)
