"""Which of the requests sent to one worker its figures include. Pure."""

from __future__ import annotations

from collections import deque


class Sends:
    """Numbers grow over all that this process sends, to whomever, so that none means two things to a worker:
    not after it was taken for lost, nor after we lost the lead and won it again.

    Attributes:
        included: how many of those sent since it joined its figures include, or are known to be lost.
    """

    def __init__(self) -> None:
        self._out: deque[int] = deque()
        self.included = 0

    def add(self, number: int) -> None:
        self._out.append(number)

    def upto(self, number: int) -> int:
        """`included`, once all up to `number` are."""
        while self._out and self._out[0] <= number:
            self._out.popleft()
            self.included += 1
        return self.included
