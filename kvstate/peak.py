"""The most KV room that running requests will take together ("Past-Future", arXiv 2507.10150). Pure.

At the moment when the request with the k-th longest rest ends, the k longest are there, each grown by that
rest; only at such moments can the sum be at its largest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate


def peak(held: Iterable[tuple[float, float]]) -> float:
    """Tokens. `held`: of each request the tokens it has now and those it will still add."""
    most = total = 0.0
    for count, (tokens, remaining) in enumerate(sorted(held, key=_longest_first), 1):
        total += tokens
        most = max(most, total + count * remaining)
    return most


def _longest_first(entry: tuple[float, float]) -> float:
    return -entry[1]


class Forecast:
    """The peak of `held`, and what it would be with one more request, in O(log n).

    A newcomer leaves what ends after it as it is and adds its tokens, and one more growing request, to every
    moment before its own end: the largest of both kinds is kept for each place where it could come in.
    """

    def __init__(self, held: Sequence[tuple[float, float]]) -> None:
        ordered = sorted(held, key=_longest_first)
        self._order = [-remaining for _, remaining in ordered]
        self._sums = list(accumulate((tokens for tokens, _ in ordered), initial=0.0))
        moments = [
            total + count * remaining
            for count, ((_, remaining), total) in enumerate(zip(ordered, self._sums[1:], strict=True), 1)
        ]
        self._before = list(accumulate(moments, max, initial=0.0))
        after = [
            moment + remaining
            for moment, (_, remaining) in zip(reversed(moments), reversed(ordered), strict=True)
        ]
        self._after = list(accumulate(after, max, initial=0.0))[::-1]

    def __len__(self) -> int:
        return len(self._order)

    @property
    def peak(self) -> float:
        """Tokens."""
        return self._before[-1]

    def after(self, tokens: float, remaining: float) -> float:
        """The peak with one more request that has `tokens` and will add `remaining`."""
        place = bisect_left(self._order, -remaining)
        own = self._sums[place] + tokens + (place + 1) * remaining
        later = self._after[place] + tokens if place < len(self._order) else 0.0
        return max(self._before[place], own, later)
