"""What became of the last requests, and why. Pure."""

from __future__ import annotations

from collections import OrderedDict

from scheduler.dispatch.types import Explanation

BEST = 3
"""Workers that an explanation compares."""


class Explanations:
    """Of the last `most` requests that were decided on."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[int, Explanation] = OrderedDict()

    def keep(self, explanation: Explanation) -> None:
        self._kept[explanation.key] = explanation
        self._kept.move_to_end(explanation.key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, key: int) -> Explanation | None:
        return self._kept.get(key)
