"""The instance pool's decisions, by cases and in runs of a simulated host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import pool
from workers.pool import Action, Policy, Seat

ONE = Policy(memory=10, linger=1, starve_after=5, dwell=2, turn_factor=3, idle_least=10, idle_factor=2)


def does(seats: Sequence[Seat], policy: Policy, now: float) -> list[tuple[str, str]]:
    return [(action.do, action.base) for action in pool.decide(seats, policy, now)]


def test_a_cold_base_is_started_when_requests_wait() -> None:
    cold = Seat("a", "cold", hot=10)
    assert does([cold], ONE, 100) == []
    assert does([replace(cold, wanted=100.0, busy=True)], ONE, 100) == [("start", "a")]


def test_a_warm_one_is_woken() -> None:
    assert does([Seat("a", "warm", hot=10, warm=2, wanted=1)], ONE, 5) == [("wake", "a")]


def test_what_others_serve_is_left_to_them() -> None:
    assert does([Seat("a", "cold", hot=10, wanted=1, busy=True, elsewhere=True)], ONE, 5) == []


def test_one_that_failed_is_started_again_after_its_pause() -> None:
    failed = Seat("a", "failed", hot=10, wanted=1, not_before=7)
    assert does([failed], ONE, 6.9) == []
    assert does([failed], ONE, 7) == [("start", "a")]


def test_an_idle_one_makes_room_after_it_has_lingered() -> None:
    idle, cold = Seat("a", "hot", hot=10, idle=4), Seat("b", "cold", hot=10, wanted=4.5, busy=True)
    assert does([idle, cold], ONE, 4.9) == []
    assert does([idle, cold], ONE, 5) == [("stop", "a")]
    drains = replace(idle, state="draining")
    assert does([drains, cold], ONE, 6) == []  # its room is not free yet
    assert does([replace(drains, state="cold"), cold], ONE, 7) == [("start", "b")]


def test_a_busy_one_has_its_turn_and_goes_only_if_another_starves() -> None:
    busy = Seat("a", "hot", hot=10, since=0, busy=True, start=4)
    assert pool.turn(busy, ONE) == 12
    assert does([busy, Seat("b", "cold", hot=10, wanted=0.0)], ONE, 11.9) == []
    assert does([busy, Seat("b", "cold", hot=10, wanted=7.1)], ONE, 12) == []
    assert does([busy, Seat("b", "cold", hot=10, wanted=7.0)], ONE, 12) == [("stop", "a")]


def test_one_that_is_kept_stays() -> None:
    kept, cold = Seat("a", "hot", hot=10, keep=True), Seat("b", "cold", hot=10, wanted=0)
    assert does([kept, cold], ONE, 1000) == []


def test_the_cheapest_to_bring_back_goes_first_and_no_more_than_are_needed() -> None:
    policy = replace(ONE, memory=20)
    seats = [
        Seat("small", "hot", hot=4, idle=0, start=1),
        Seat("large", "hot", hot=8, idle=0, start=2),
        Seat("dear", "hot", hot=8, idle=0, start=50),
        Seat("new", "cold", hot=8, wanted=1),
    ]
    assert does(seats, policy, 5) == [("stop", "large")]


def test_the_larger_of_two_and_the_one_that_sleeps_lightly_go_first() -> None:
    policy = replace(ONE, memory=20)
    new = Seat("new", "cold", hot=4, wanted=1)
    small, large = Seat("small", "hot", hot=4, start=5), Seat("large", "hot", hot=16, start=6)
    assert does([small, large, new], policy, 5) == [("stop", "large")]
    light = Seat("light", "hot", hot=4, start=50, wake=1, asleep=4, can_sleep=True)
    policy = replace(policy, memory=8, sleep_memory=4)
    assert does([small, light, new], policy, 5) == [("sleep", "light")]


def test_room_that_is_coming_free_is_waited_for() -> None:
    policy = replace(ONE, memory=20)
    seats = [
        Seat("goes", "draining", hot=10),
        Seat("idle", "hot", hot=10),
        Seat("new", "cold", hot=10, wanted=1),
    ]
    assert does(seats, policy, 5) == []
    less = [replace(seats[0], hot=8), replace(seats[1], hot=12), seats[2]]
    assert does(less, policy, 5) == [("stop", "idle")]


def test_one_that_wakes_or_falls_asleep_takes_both_memories() -> None:
    for seat in (Seat("a", "waking", hot=10, asleep=8), Seat("a", "draining", 10, asleep=8, to_warm=True)):
        assert (seat.held, seat.held_asleep) == (10, 8)
    stops = Seat("a", "draining", hot=10, warm=2, asleep=8, was_warm=True)
    assert (stops.held, stops.held_asleep, stops.leaving) == (2, 8, 2)


def test_nobody_goes_while_it_would_not_be_enough() -> None:
    policy = replace(ONE, memory=20)
    seats = [
        Seat("idle", "hot", hot=5),
        Seat("starts", "starting", hot=15),
        Seat("new", "cold", hot=20, wanted=1),
    ]
    assert does(seats, policy, 8) == []


def test_nobody_overtakes_one_that_waits_for_room() -> None:
    policy = replace(ONE, memory=20)
    seats = [
        Seat("busy", "hot", hot=15, busy=True, since=7),
        Seat("large", "cold", hot=20, wanted=1),
        Seat("small", "cold", hot=5, wanted=2),
    ]
    assert does(seats, policy, 8) == []


def test_an_idle_one_rests_once_it_idled_as_long_as_a_start_takes() -> None:
    hot = Seat("a", "hot", hot=10, idle=0, start=20)
    assert does([hot], ONE, 39.9) == []
    assert does([hot], ONE, 40) == [("stop", "a")]
    assert does([replace(hot, keep=True)], ONE, 400) == []


def test_one_that_can_sleep_sleeps_and_is_stopped_later() -> None:
    policy = replace(ONE, sleep_memory=8)
    hot = Seat("a", "hot", hot=10, warm=1, asleep=8, can_sleep=True, wake=0.5, start=20, idle=0)
    assert does([hot], policy, 10) == [("sleep", "a")]
    warm = replace(hot, state="warm")
    assert does([warm], policy, 49) == []
    assert does([warm], policy, 50) == [("stop", "a")]
    assert does([hot], replace(policy, sleep_memory=7), 10) == []  # no room to sleep: it goes as any


def test_a_sleeper_that_frees_too_little_is_stopped_instead() -> None:
    policy = replace(ONE, sleep_memory=8)
    hot = Seat("a", "hot", hot=10, warm=1, asleep=8, can_sleep=True, idle=0)
    assert does([hot, Seat("b", "cold", hot=9, wanted=1)], policy, 5) == [("sleep", "a")]
    assert does([hot, Seat("b", "cold", hot=10, wanted=1)], policy, 5) == [("stop", "a")]


def test_two_that_idle_out_at_once_do_not_sleep_in_the_room_for_one() -> None:
    policy = replace(ONE, memory=20, sleep_memory=8)
    seats = [
        Seat(name, "hot", hot=10, asleep=8, can_sleep=True, wake=0.1, start=0.1, idle=0) for name in "ab"
    ]
    assert does(seats, policy, 50) == [("sleep", "a"), ("stop", "b")]


# A simulated host


@dataclass
class Base:
    hot: int
    warm: int
    asleep: int
    can_sleep: bool
    start: float
    drain: float
    arrivals: frozenset[int]  # ticks at which a request comes
    flood: bool  # it always has requests


TICK = 0.5


class Host:
    """Carries actions out with the bases' delays; a hot base serves one request a tick."""

    def __init__(self, bases: dict[str, Base], policy: Policy) -> None:
        self.bases, self.policy = bases, policy
        self.now, self.tick = 0.0, 0
        self.queue = dict.fromkeys(bases, 0)
        self.served = dict.fromkeys(bases, 0)
        self.done_at: dict[str, float] = {}
        self.longest = dict.fromkeys(bases, 0.0)
        self.seats = {
            name: Seat(
                name,
                "cold",
                hot=base.hot,
                warm=base.warm,
                asleep=base.asleep,
                can_sleep=base.can_sleep,
                start=base.start,
                wake=base.start / 4,
            )
            for name, base in bases.items()
        }

    def step(self, quiet: bool) -> list[Action]:
        for name, base in self.bases.items():
            if not quiet and (base.flood or self.tick in base.arrivals):
                self.queue[name] += 1
            self._advance(name)
        actions = pool.decide(list(self.seats.values()), self.policy, self.now)
        for action in actions:
            self._do(action)
            self._check()
        self.now += TICK
        self.tick += 1
        return actions

    def _advance(self, name: str) -> None:
        seat = self.seats[name]
        if self.done_at.get(name, self.now + 1) <= self.now:
            del self.done_at[name]
            drained: pool.State = "warm" if seat.to_warm else "cold"
            state = drained if seat.state == "draining" else "hot"
            seat = replace(seat, state=state, since=self.now, to_warm=False, was_warm=False, idle=self.now)
        if seat.state == "hot" and self.queue[name]:
            self.queue[name] -= 1
            self.served[name] += 1
        busy = bool(self.queue[name]) or self.bases[name].flood
        wanted = None
        if self.queue[name] and seat.state != "hot":
            wanted = self.now if seat.wanted is None else seat.wanted
            self.longest[name] = max(self.longest[name], self.now - wanted)
        self.seats[name] = replace(seat, wanted=wanted, busy=busy, idle=self.now if busy else seat.idle)

    def _do(self, action: Action) -> None:
        seat, base = self.seats[action.base], self.bases[action.base]
        match action.do:
            case "start":
                assert seat.state in ("cold", "failed")
                seat, wait = replace(seat, state="starting"), base.start
            case "wake":
                assert seat.state == "warm"
                seat, wait = replace(seat, state="waking"), base.start / 4
            case "sleep":
                assert seat.state == "hot"
                seat, wait = replace(seat, state="draining", to_warm=True), base.drain
            case "stop":
                assert seat.state in ("hot", "warm")
                if seat.state == "hot" and seat.busy:
                    assert self.now - seat.since >= pool.turn(seat, self.policy), "no turn was broken off"
                slept = seat.state == "warm"
                seat, wait = replace(seat, state="draining", was_warm=slept), base.drain
        self.seats[action.base] = seat
        self.done_at[action.base] = self.now + wait

    def _check(self) -> None:
        assert pool.used(self.seats.values()) <= self.policy.memory
        assert sum(seat.held_asleep for seat in self.seats.values()) <= self.policy.sleep_memory


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    memory = draw(st.integers(4, 20))
    policy = Policy(
        memory=memory,
        sleep_memory=draw(st.integers(0, 20)),
        dwell=2,
        turn_factor=2,
        starve_after=3,
        linger=draw(st.sampled_from([0.0, 1.0])),
        idle_least=2,
        idle_factor=1,
    )
    bases = {}
    for name in "abcde"[: draw(st.integers(1, 5))]:
        hot = draw(st.integers(1, memory))
        bases[name] = Base(
            hot=hot,
            warm=draw(st.integers(0, hot)),
            asleep=draw(st.integers(0, 8)),
            can_sleep=draw(st.booleans()),
            start=draw(st.sampled_from([0.5, 2.0, 5.0])),
            drain=draw(st.sampled_from([0.5, 2.0])),
            arrivals=draw(st.frozensets(st.integers(0, 100), max_size=20)),
            flood=draw(st.booleans()),
        )
    return Host(bases, policy)


@settings(max_examples=150)
@given(hosts())
def test_memory_is_never_exceeded_and_everybody_is_served_in_bounded_time(host: Host) -> None:
    for _ in range(200):
        host.step(quiet=False)
    # Each of those before has at most its whole turn, and a start and two drains go with it.
    most = len(host.bases) * (10.0 + 3 + 5 + 2 * 2 + 2 * TICK + 1) * 2
    assert max(host.longest.values()) <= most, host.longest
    for name, base in host.bases.items():
        assert host.served[name] or not (base.flood or base.arrivals), f"{name} was never served"


@settings(max_examples=100)
@given(hosts())
def test_a_quiet_host_scales_to_zero_with_its_queues_empty(host: Host) -> None:
    for _ in range(101):
        host.step(quiet=False)
    for base in host.bases.values():
        base.flood = False
    for _ in range(800):
        host.step(quiet=True)
    assert not any(host.queue.values())
    assert {seat.state for seat in host.seats.values()} == {"cold"}


@pytest.mark.parametrize("bases", [2, 3])
def test_between_busy_bases_swaps_take_a_bounded_part_of_the_time(bases: int) -> None:
    policy = Policy(memory=10, dwell=1, turn_factor=10, starve_after=1)
    flood = Base(
        hot=10, warm=0, asleep=0, can_sleep=False, start=2, drain=0.5, arrivals=frozenset(), flood=True
    )
    host = Host({name: replace(flood) for name in "abc"[:bases]}, policy)
    hot = 0
    for _ in range(1000):
        host.step(quiet=False)
        hot += any(seat.state == "hot" for seat in host.seats.values())
    assert hot / 1000 > 0.8
    assert min(host.served.values()) > 0.7 * max(host.served.values())
