"""Which bases of a host have an engine running: cold, warm or hot, within its memory. Pure: clock handed in.

A base is *cold* without a process, *warm* while its weights rest in memory, *hot* when it serves. Requests
for one that is not hot wait in the queue. Whoever waits longest is served first, and nobody overtakes, so
that small bases don't starve a large one. Room is made by whoever is worth least:

- one that has nothing to do goes after `linger`, the cheapest to bring back first, by size and by time idle
  (GreedyDual-Size, Cao and Irani, USITS '97, with its age in seconds);
- one that is busy has its turn first: `turn_factor` times what its start took, and no less than `dwell`. It
  goes then if another has waited for `starve_after`: swaps so take a bounded part of the time.

Without anybody waiting a base goes once it has idled for as long as bringing it back takes: ski rental, which
costs at most twice what knowing the future would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["cold", "starting", "warm", "waking", "hot", "draining", "failed"]
Do = Literal["start", "wake", "sleep", "stop"]


@dataclass(frozen=True, slots=True)
class Policy:
    """Bytes and seconds.

    Attributes:
        memory: that the engines may take together: the accelerator's, or the machine's for those on its CPU.
        sleep_memory: of the machine, for the weights of engines that sleep; 0 = none sleeps.
        dwell, turn_factor: a busy base keeps its place so long, and so many times what its start took.
        starve_after: how long another one must have waited before a busy base makes room.
        linger: how long a base must have idled before it makes room for another.
        idle_least, idle_factor: idle so long, and so many times what bringing it back takes, a base rests.
    """

    memory: int
    sleep_memory: int = 0
    dwell: float = 10.0
    turn_factor: float = 10.0
    starve_after: float = 15.0
    linger: float = 1.0
    idle_least: float = 30.0
    idle_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Seat:
    """One base in the pool as it stands now. Times are of the clock that `decide` gets.

    Attributes:
        hot, warm: bytes of the pool's `memory` that it takes while it serves, and while it sleeps.
        asleep: bytes of `sleep_memory` that it takes while it sleeps.
        can_sleep: its engine knows how to; else it is stopped.
        start, wake: seconds from cold, and from warm, until it serves: measured, or else a guess.
        since: when it came into its state.
        to_warm: where it drains: to sleep, not to end.
        was_warm: where it drains: it slept before, and takes no more than then.
        wanted: since when something waits for it while it is not hot, or None.
        busy: requests for it are queued or run.
        idle: since when it has had nothing to do.
        keep: it is to be hot always.
        elsewhere: other workers serve it, and what waits is theirs to take.
        not_before: it is not started before, since it failed.
    """

    base: str
    state: State
    hot: int
    since: float = 0.0
    warm: int = 0
    asleep: int = 0
    can_sleep: bool = False
    start: float = 1.0
    wake: float = 1.0
    to_warm: bool = False
    was_warm: bool = False
    wanted: float | None = None
    busy: bool = False
    idle: float = 0.0
    keep: bool = False
    elsewhere: bool = False
    not_before: float = 0.0

    @property
    def held(self) -> int:
        """Bytes of `memory` that it may be taking now: until it is cold or warm all that it had."""
        if self.state in ("cold", "failed"):
            return 0
        return self.warm if self._rests else self.hot

    @property
    def held_asleep(self) -> int:
        """Bytes of `sleep_memory` likewise."""
        goes = self.state == "draining" and self.to_warm
        return self.asleep if self._rests or self.state == "waking" or goes else 0

    @property
    def leaving(self) -> int:
        """Bytes of `memory` that it gives free as soon as it has drained."""
        return self.held - (self.warm if self.to_warm else 0) if self.state == "draining" else 0

    @property
    def _rests(self) -> bool:
        return self.state == "warm" or (self.state == "draining" and self.was_warm)

    def worth(self, now: float) -> float:
        """What it would cost to bring it back, by its size and by how long nobody has missed it."""
        cost = self.wake if self.can_sleep else self.start
        return cost / (max(1, self.held) * (1.0 + max(0.0, now - self.idle)))


@dataclass(frozen=True, slots=True)
class Action:
    do: Do
    base: str
    reason: str


def used(seats: Iterable[Seat]) -> int:
    return sum(seat.held for seat in seats)


def turn(seat: Seat, policy: Policy) -> float:
    """Seconds for which a busy base keeps its place."""
    return max(policy.dwell, policy.turn_factor * seat.start)


def may_sleep(seats: Sequence[Seat], base: str, policy: Policy) -> bool:
    """Whether a base's engine knows how to, and there is room for its weights."""
    seat = next(seat for seat in seats if seat.base == base)
    room = policy.sleep_memory - sum(other.held_asleep for other in seats)
    return seat.can_sleep and 0 < seat.asleep <= room


def decide(seats: Sequence[Seat], policy: Policy, now: float) -> list[Action]:
    """What to do now. Carried out in this order, `memory` and `sleep_memory` are never exceeded.

    Nothing is started for which there is no room yet: what makes room is told first, and whoever waits is
    started by a later call, once that has ended.
    """
    actions: list[Action] = []
    free = policy.memory - used(seats)
    for seat in _queue(seats, now):
        need = seat.hot - seat.held
        if need <= free:
            free -= need
            actions.append(_up(seat))
            continue
        missing = need - free - sum(other.leaving for other in seats)
        if missing > 0:
            told = {action.base for action in actions}
            others = [other for other in seats if other is not seat and other.base not in told]
            actions += _make_room(seats, others, seat, missing, policy, now)
        break  # nobody overtakes: what comes free is for this one
    told = {action.base for action in actions}
    for seat in seats:
        if seat.base not in told and (action := _idled_out(seat, seats, policy, now, actions)) is not None:
            actions.append(action)
    return actions


def _queue(seats: Iterable[Seat], now: float) -> list[Seat]:
    """Those that are to be hot and are not, in the order in which they are served."""
    waiting = [
        (seat.wanted, seat.base, seat)
        for seat in seats
        if seat.wanted is not None
        and seat.state in ("cold", "warm", "failed")
        and not seat.elsewhere
        and seat.not_before <= now
    ]
    return [seat for _, _, seat in sorted(waiting, key=lambda entry: entry[:2])]


def _up(seat: Seat) -> Action:
    why = "it is to be kept hot" if seat.keep and not seat.busy else "requests wait for it"
    return Action("wake" if seat.state == "warm" else "start", seat.base, why)


def _make_room(
    seats: Sequence[Seat], others: Sequence[Seat], head: Seat, missing: int, policy: Policy, now: float
) -> list[Action]:
    """Who of `others` has to go so that `head` finds room; nobody, while that would not be enough."""
    starved = head.wanted is not None and now - head.wanted >= policy.starve_after
    ranked: list[tuple[int, float, Seat]] = []
    for seat in others:
        if seat.keep:
            continue
        if seat.state == "warm" and seat.warm > 0:
            ranked.append((2 if seat.wanted is not None else 0, seat.worth(now), seat))
        elif seat.state == "hot" and not seat.busy and now - seat.idle >= policy.linger:
            ranked.append((1, seat.worth(now), seat))
        elif seat.state == "hot" and seat.busy and starved and now - seat.since >= turn(seat, policy):
            ranked.append((3, seat.since, seat))
    ranked.sort(key=lambda entry: entry[:2])
    order = [seat for _, _, seat in ranked]
    for may_sleep in (True, False):
        victims = _enough(order, seats, missing, policy, may_sleep)
        if victims:
            return [
                Action("sleep" if to_warm else "stop", seat.base, f"it makes room for {head.base}")
                for seat, to_warm in victims
            ]
    return []


def _enough(
    order: Sequence[Seat], seats: Sequence[Seat], missing: int, policy: Policy, may_sleep: bool
) -> list[tuple[Seat, bool]]:
    """The first of `order` that give `missing` bytes free together, without those that are not needed, and
    whether each goes to sleep; [] where all are too little."""
    room = policy.sleep_memory - sum(seat.held_asleep for seat in seats)
    chosen: list[tuple[Seat, bool]] = []
    gained = 0
    for seat in order:
        to_warm = may_sleep and seat.state == "hot" and seat.can_sleep and 0 < seat.asleep <= room
        if to_warm:
            room -= seat.asleep
        chosen.append((seat, to_warm))
        gained += _gain(seat, to_warm)
        if gained >= missing:
            break
    if gained < missing:
        return []
    for entry in list(chosen):
        if gained - _gain(*entry) >= missing:
            gained -= _gain(*entry)
            chosen.remove(entry)
    return chosen


def _gain(seat: Seat, to_warm: bool) -> int:
    return seat.held - (seat.warm if to_warm else 0)


def _idled_out(
    seat: Seat, seats: Sequence[Seat], policy: Policy, now: float, actions: Sequence[Action]
) -> Action | None:
    if seat.busy or seat.wanted is not None or seat.keep:
        return None
    idle = now - seat.idle
    if seat.state == "hot":
        going = {action.base for action in actions if action.do == "sleep"}
        taken = sum(other.asleep if other.base in going else other.held_asleep for other in seats)
        to_warm = seat.can_sleep and 0 < seat.asleep <= policy.sleep_memory - taken
        cost = seat.wake if to_warm else seat.start
        if idle >= max(policy.idle_least, policy.idle_factor * cost):
            what: Do = "sleep" if to_warm else "stop"
            return Action(what, seat.base, f"idle for {idle:.0f} s, which bringing it back takes or more")
    elif seat.state == "warm" and idle >= policy.idle_least + policy.idle_factor * seat.start:
        return Action("stop", seat.base, f"idle for {idle:.0f} s, which a start takes or more")
    return None
