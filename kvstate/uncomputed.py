"""What of a worker's prompts no step of its engine has begun to compute. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Uncomputed(Generic[K]):
    """Engines say when a step ends and which requests have a first token, not what a step computes. That is
    inferred: they compute prompts in the order in which these come, as much as a step takes.

    Attributes:
        tokens: the sum over all prompts.
    """

    def __init__(self) -> None:
        self._left: dict[K, int] = {}
        self.tokens = 0

    def add(self, key: K, tokens: int) -> None:
        """A prompt of which so much is not cached; one that was there is replaced."""
        self.drop(key)
        self._left[key] = tokens
        self.tokens += tokens

    def drop(self, key: K) -> None:
        """It has its first token, or is gone. Idempotent."""
        self.tokens -= self._left.pop(key, 0)

    def step(self, budget: int) -> None:
        """A step begins that has room for so many prompt tokens."""
        for key, left in self._left.items():
            if budget <= 0:
                return
            begun = min(left, budget)
            self._left[key] = left - begun
            self.tokens -= begun
            budget -= begun
