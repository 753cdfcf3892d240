"""Which adapter's requests start: never too many adapters, first come first served, and nobody starves."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.slots import Slots


class Play:
    """Slots with a clock, whose requests end when they are told to."""

    def __init__(self, count: int) -> None:
        self.slots: Slots[str] = Slots(count)
        self.now = 0.0
        self.running: list[tuple[str, str]] = []  # (model, ticket), the longest running first
        self.waiting: dict[str, str] = {}  # ticket -> model
        self.started: list[str] = []

    def enter(self, model: str, ticket: str) -> None:
        self.waiting[ticket] = model
        self.slots.enter(model, ticket, self.now)
        self.start()

    def end(self, number: int = 0) -> None:
        model, _ = self.running.pop(number)
        self.slots.leave(model)
        self.start()

    def give_up(self, ticket: str) -> None:
        self.slots.give_up(self.waiting.pop(ticket), ticket)
        self.start()

    def start(self) -> None:
        for ticket in self.slots.start(self.now):
            self.running.append((self.waiting.pop(ticket), ticket))
            self.started.append(ticket)
        assert self.slots.used == len(self.active)
        assert self.slots.waiting == len(self.waiting)

    @property
    def active(self) -> set[str]:
        return {model for model, _ in self.running}


def test_a_free_slot_goes_to_who_waits_longest() -> None:
    play = Play(1)
    for ticket in ("a1", "b1", "c1", "b2"):
        play.enter(ticket[0], ticket)
    assert play.started == ["a1"]
    play.end()
    assert play.started == ["a1", "b1", "b2"]  # all of an adapter at once
    play.end()
    assert play.active == {"b"}
    play.end()
    assert play.started[-1] == "c1"


def test_an_active_adapter_takes_more_until_its_turn_is_over_and_others_wait() -> None:
    play = Play(1)
    play.enter("a", "a1")
    play.now = 100.0
    play.enter("a", "a2")  # nobody waits: no turn
    assert play.started == ["a1", "a2"]
    play.enter("b", "b1")
    play.enter("a", "a3")
    assert play.started == ["a1", "a2"]
    play.end()
    play.end()
    assert play.started == ["a1", "a2", "b1"]
    play.now += 1.0
    play.enter("b", "b2")  # its turn has just begun
    assert play.started[-1] == "b2"
    play.now += 1.0
    play.enter("b", "b3")
    assert play.started[-1] == "b2"


def test_a_closed_adapter_opens_again_when_nobody_else_waits() -> None:
    play = Play(1)
    play.enter("a", "a1")
    play.now = 3.0
    play.enter("b", "b1")
    play.enter("a", "a2")
    assert play.started == ["a1"]
    play.give_up("b1")
    assert play.started == ["a1", "a2"]


def test_only_as_many_as_wait_are_closed_at_first() -> None:
    play = Play(2)
    play.enter("a", "a1")
    play.now = 1.0
    play.enter("b", "b1")
    play.now = 9.0
    play.enter("c", "c1")
    play.enter("b", "b2")
    play.enter("a", "a2")
    assert play.started == ["a1", "b1", "b2"]
    play.now = 11.5  # c has waited a turn more than it should
    play.enter("b", "b3")
    assert play.started == ["a1", "b1", "b2"]


@pytest.mark.parametrize("count", [1, 8, 20])
def test_where_all_fit_none_is_ever_swapped(count: int) -> None:
    play = Play(count)
    for number in range(500):
        play.now += 0.3
        play.enter(f"m{number * 7 % count}", f"t{number}")
        if number % 3:
            play.end()
    assert not play.slots.swaps
    assert not play.waiting


def test_one_adapter_more_than_slots_swaps() -> None:
    play = Play(2)
    for model in ("a", "b", "c", "a"):
        play.enter(model, model + str(play.now))
        play.end()
        play.now += 1.0
    assert play.slots.swaps == 2  # c for a, a for b


def test_an_unloaded_adapter_leaves_its_slot_empty() -> None:
    play = Play(1)
    play.enter("a", "a1")
    play.end()
    play.slots.forget("a")
    play.enter("b", "b1")
    assert not play.slots.swaps


MODELS = st.sampled_from("abcdefgh")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), MODELS),
        st.tuples(st.just("end"), st.integers(0, 7)),
        st.tuples(st.just("give up"), st.integers(0, 7)),
        st.tuples(st.just("time"), st.floats(0.0, 3.0)),
    ),
    max_size=120,
)


@given(count=st.integers(1, 5), events=EVENTS)
@settings(max_examples=300)
def test_never_more_adapters_than_slots_and_each_in_its_order(
    count: int, events: list[tuple[str, object]]
) -> None:
    play = Play(count)
    for number, (what, value) in enumerate(events):
        if what == "enter":
            play.enter(str(value), f"{value}{number}")
        elif what == "end" and play.running:
            assert isinstance(value, int)
            play.end(value % len(play.running))
        elif what == "give up" and play.waiting:
            assert isinstance(value, int)
            play.give_up(list(play.waiting)[value % len(play.waiting)])
        elif what == "time":
            assert isinstance(value, float)
            play.now += value
        assert len(play.active) <= count
        # No slot stands empty while one waits that could have it.
        assert not play.waiting or len(play.active) == count
        for model in "abcdefgh":
            mine = [int(ticket[1:]) for ticket in play.started if ticket[0] == model]
            assert mine == sorted(mine)
    while play.running:
        play.end()
    assert not play.waiting  # whatever went before, all had their turn


@example(count=4, adapters=12, life=5)  # one slot falls free: the others stay closed
@given(count=st.integers(1, 4), adapters=st.integers(2, 12), life=st.integers(1, 6))
@settings(max_examples=60)
def test_under_endless_traffic_nobody_waits_for_more_turns_than_there_are_adapters(
    count: int, adapters: int, life: int
) -> None:
    """Each moment a request of every adapter comes; each runs for `life` moments of half a second."""
    play = Play(count)
    entered: dict[str, float] = {}
    ends: deque[tuple[float, str]] = deque()
    longest = 0.0
    for moment in range(400):
        play.now = moment * 0.5
        while ends and ends[0][0] <= play.now:
            ticket = ends.popleft()[1]
            play.end([name for _, name in play.running].index(ticket))
        for adapter in range(adapters):
            ticket = f"{adapter}-{moment}"
            entered[ticket] = play.now
            play.enter(f"m{adapter}", ticket)
        known = {name for _, name in ends}
        for _, ticket in play.running:
            if ticket not in known:
                ends.append((play.now + life * 0.5, ticket))
                longest = max(longest, play.now - entered[ticket])
    longest = max([longest, *(play.now - entered[ticket] for ticket in play.waiting)])
    rounds = -(-adapters // count) + 1
    assert longest <= rounds * (play.slots.turn + life * 0.5 + 1.0)
