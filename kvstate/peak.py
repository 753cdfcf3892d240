"""The most KV room that running requests will take together ("Past-Future", arXiv 2507.10150). Pure.

At the moment when the request with the k-th longest rest ends, the k longest are there, each grown by that
rest; only at such moments can the sum be at its largest.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from operator import itemgetter

_remaining = itemgetter(1)


def peak(held: Iterable[tuple[float, float]]) -> float:
    """Tokens. `held`: of each request the tokens it has now and those it will still add."""
    most = total = 0.0
    for count, (tokens, remaining) in enumerate(sorted(held, key=_remaining, reverse=True), 1):
        total += tokens
        most = max(most, total + count * remaining)
    return most


class Forecast:
    """The peak of `held`, what it would be with one more request in O(log n), and when that finds room.

    A newcomer leaves what is there after its end as it is and adds its tokens, and one more request that
    grows, to every moment before: so of both kinds the largest is kept for each place in the order of ends.
    """

    __slots__ = ("_after", "_before", "_ends", "_grown", "_sums")

    def __init__(self, held: Iterable[tuple[float, float]]) -> None:
        ends: list[float] = []  # negated rests, the longest first
        sums = [0.0]  # tokens of the first so many
        before = [0.0]  # the most there is when only the first so many are left
        grown: list[float] = []  # what there is at each end, and one more rest like it
        total = most = 0.0
        for count, (tokens, remaining) in enumerate(sorted(held, key=_remaining, reverse=True), 1):
            total += tokens
            moment = total + count * remaining
            if moment > most:
                most = moment
            ends.append(-remaining)
            sums.append(total)
            before.append(most)
            grown.append(moment + remaining)
        self._ends, self._sums, self._before, self._grown = ends, sums, before, grown
        self._after = list(accumulate(reversed(grown), max))  # from the last end on, backwards

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def peak(self) -> float:
        """Tokens."""
        return self._before[-1]

    def after(self, tokens: float, remaining: float) -> float:
        """The peak with one more request that has `tokens` and will add `remaining`."""
        place = bisect_left(self._ends, -remaining)
        own = self._sums[place] + tokens + (place + 1) * remaining
        most = max(self._before[place], own)
        if place < len(self._ends):
            most = max(most, self._after[-1 - place] + tokens)
        return most

    def until(self, tokens: float, remaining: float, limit: float) -> float:
        """Tokens that each must add before such a request could join and the peak stay within `limit`.

        The later one joins the fewer are left beside it: the first end that is late enough is searched for.
        """
        if self.after(tokens, remaining) <= limit:
            return 0.0
        first, last = 0, len(self._ends)  # ends within these are late enough from some place down
        if tokens + remaining > limit:
            return math.inf
        while first < last:
            middle = (first + last + 1) // 2
            if self._joining(-self._ends[middle - 1], tokens, remaining) <= limit:
                first = middle
            else:
                last = middle - 1
        return -self._ends[first - 1] if first else math.inf

    def _joining(self, moment: float, tokens: float, remaining: float) -> float:
        """The peak from `moment` on, if it joins those that are left."""
        left, place = bisect_left(self._ends, -moment), bisect_left(self._ends, -moment - remaining)
        own = self._sums[place] + tokens + remaining + place * (moment + remaining)
        beside = max(self._grown[place:left], default=-math.inf) + tokens - moment
        return max(self._before[place], own, beside)
