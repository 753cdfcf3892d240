from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import intake
from workers.intake import TURN, Queue, asks, taken

counts = st.integers(0, 300)
queues = st.builds(Queue, backlog=counts, outstanding=counts, passed=counts)


@given(counts, st.lists(queues, min_size=1, max_size=5))
def test_no_queue_is_asked_for_more_than_the_credit(credit: int, state: list[Queue]) -> None:
    for queue, n in zip(state, asks(credit, state), strict=True):
        assert n >= 0
        assert n + queue.outstanding <= max(credit, queue.outstanding)


@given(st.integers(1, 300), st.lists(queues, min_size=1, max_size=5))
def test_more_than_half_of_the_credit_stands_somewhere_unless_known_work_takes_it(
    credit: int, state: list[Queue]
) -> None:
    asked_for = sum(n + queue.outstanding for queue, n in zip(state, asks(credit, state), strict=True))
    assert 2 * asked_for > credit


@given(st.integers(1, 300), counts)
def test_an_empty_queue_is_asked_again_when_half_has_been_taken(credit: int, outstanding: int) -> None:
    (n,) = asks(credit, [Queue(outstanding=outstanding)])
    assert n == (credit - outstanding if outstanding < min(credit, credit // 2 + 1) else 0)


@given(counts)
def test_empty_queues_are_each_asked_for_all(credit: int) -> None:
    assert asks(credit, [Queue(), Queue(), Queue()]) == [credit] * 3


@given(st.integers(1, 100), st.integers(0, 100))
def test_known_work_goes_by_urgency(credit: int, extra: int) -> None:
    """What the urgent backlog leaves goes to the next; a class that may be empty keeps one pull."""
    state = [Queue(backlog=credit + extra), Queue(backlog=5), Queue()]
    assert asks(credit, state) == [credit, 0, 1]
    assert asks(credit + 3, [Queue(backlog=credit), Queue(backlog=5), Queue(backlog=5)])[1:] == [3, 0]


def test_without_credit_nothing_is_asked() -> None:
    assert asks(0, [Queue(), Queue(backlog=9), Queue()]) == [0, 0, 0]


def test_silence_means_an_empty_queue() -> None:
    queue = Queue(backlog=4)
    intake.asked(queue, 0, now=1.0)
    intake.asked(queue, 2, now=1.0 + intake.ANSWER / 2)
    assert (queue.backlog, queue.outstanding) == (4, 2)  # the answer may still be on its way
    intake.asked(queue, 2, now=1.0 + intake.ANSWER * 2)
    assert queue.backlog == 0


class Classes:
    """Three queues and a worker with one slot, which asks, is served, and asks again."""

    def __init__(self, *waiting: int) -> None:
        self.waiting = list(waiting)
        self.known = [Queue() for _ in waiting]
        self.served: Counter[int] = Counter()
        self.order: list[int] = []

    def step(self) -> None:
        wanted = asks(1, self.known)
        room = 1
        for number, n in enumerate(wanted):
            self.known[number].outstanding += n
        for number, queue in enumerate(self.known):
            while queue.outstanding and self.waiting[number]:
                queue.outstanding -= 1
                if room:
                    room = 0
                    self.waiting[number] -= 1
                    self.served[number] += 1
                    self.order.append(number)
                    taken(self.known, number, self.waiting[number], now=0.0)
                else:  # handed back
                    queue.backlog = self.waiting[number]


def test_no_class_starves_behind_busier_ones() -> None:
    classes = Classes(10**6, 10**6, 10**6)
    for _ in range(1000):
        classes.step()
    assert classes.served[0] > classes.served[1] > classes.served[2] > 0
    assert classes.served[0] >= 0.8 * 1000


@pytest.mark.parametrize("late", [1, 2])
def test_who_comes_late_to_a_busy_worker_is_served_within_a_few_turns(late: int) -> None:
    classes = Classes(10**6, 0, 0)
    for _ in range(50):
        classes.step()
    # What stood on the quiet queue has expired meanwhile.
    classes.known[late].outstanding = 0
    classes.waiting[late] = 1
    before = len(classes.order)
    while late not in classes.order:
        classes.step()
        assert len(classes.order) - before <= 2 * TURN


def test_the_urgent_class_goes_first() -> None:
    classes = Classes(5, 5, 5)
    for _ in range(15):
        classes.step()
    assert classes.order[:5] == [0] * 5


def test_only_work_that_a_pull_will_bring_is_owed_credit() -> None:
    assert intake.owed([]) == 0
    assert intake.owed([Queue(backlog=5)]) == 0
    assert intake.owed([Queue(backlog=5, outstanding=2), Queue(outstanding=3)]) == 2
