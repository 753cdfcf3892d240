"""Which of the requests sent to a worker its figures include."""

from __future__ import annotations

from scheduler.sends import Sends


def test_it_counts_what_the_worker_has_told_of() -> None:
    sends = Sends()
    for number in (3, 8, 11):
        sends.add(number)
    assert [sends.upto(told) for told in (0, 3, 2, 10, 11, 10**30)] == [0, 1, 1, 2, 3, 3]


def test_one_that_joins_anew_begins_at_nothing_whatever_it_told_before() -> None:
    sends = Sends()
    assert sends.upto(57) == 0
    sends.add(58)
    assert sends.upto(57) == 0
    assert sends.upto(58) == 1
