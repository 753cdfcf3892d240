"""What became of the last requests, and why. Pure."""

from __future__ import annotations

from collections import OrderedDict

from scheduler.dispatch.lanes import Waiting
from scheduler.dispatch.types import Candidate, Explanation, Preempt


class Explanations:
    """Of the last `most` requests that were decided on."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[int, tuple[Waiting, str, str, float, float, str]] = OrderedDict()
        self._taken: OrderedDict[int, tuple[tuple[str, str], ...]] = OrderedDict()

    def keep(
        self, waiting: Waiting, outcome: str, worker: str, queue_s: float, predicted: float, why: str
    ) -> None:
        if not self._most:
            return
        key = waiting.item.key
        self._kept[key] = waiting, outcome, worker, queue_s, predicted, why
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def take_back(self, preempt: Preempt) -> None:
        """It is to be taken back from its worker."""
        self._taken[preempt.key] = (*self.taken_back(preempt.key), (preempt.worker, preempt.why))
        self._taken.move_to_end(preempt.key)
        while len(self._taken) > self._most:
            self._taken.popitem(last=False)

    def stays(self, key: int) -> None:
        """The last time it could not be."""
        if before := self._taken.pop(key, ())[:-1]:
            self._taken[key] = before

    def taken_back(self, key: int) -> tuple[tuple[str, str], ...]:
        """From which workers, and why."""
        return self._taken.get(key, ())

    def get(self, key: int) -> Explanation | None:
        kept = self._kept.get(key)
        return explanation(*kept) if kept is not None else None


def explanation(
    waiting: Waiting, outcome: str, worker: str, queue_s: float, predicted: float, why: str
) -> Explanation:
    item = waiting.item
    return Explanation(
        key=item.key,
        tenant=item.tenant,
        model=item.model,
        service_class=item.service_class,
        outcome=outcome,
        worker=worker,
        queue_s=queue_s,
        predicted_ttft_s=predicted,
        why=why,
        candidates=tuple(Candidate(*each) for each in waiting.figures),
    )
