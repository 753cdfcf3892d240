"""The table of what each worker holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.messages import Credit, Heartbeat, Held
from scheduler.held import Table

LIMIT = 0.3


def beat(worker: str, told: int = 0, started_ms: int = 1, state: str = "serving") -> Heartbeat:
    return Heartbeat.model_validate(
        {
            "worker": worker,
            "engine": "sim",
            "base": "sim",
            "models": (),
            "started_ms": started_ms,
            "seq": 0,
            "state": state,
            "credit": Credit(),
            "told": told,
        }
    )


def takes(number: int, *seqs: int, attempt: int = 1, full: bool = False, started_ms: int = 1) -> Held:
    take = tuple((seq, attempt, f"receipt {seq}/{attempt}") for seq in seqs)
    return Held(started_ms=started_ms, number=number, take=take, full=full)


def drops(number: int, *seqs: int, attempt: int = 1) -> Held:
    return Held(started_ms=1, number=number, drop=tuple((seq, attempt) for seq in seqs))


def table(*workers: str) -> Table:
    made = Table()
    for worker in workers:
        assert not made.beat(beat(worker), 0.0)
    return made


def lost(of: Table, now: float = 1.0) -> dict[str, list[str]]:
    return {gone.worker: gone.receipts for gone in of.lose(now, LIMIT)}


def test_what_a_silent_worker_took_and_kept_is_its_loss() -> None:
    held = table("w1", "w2")
    held.hear("w1", takes(1, 1, 2))
    held.hear("w2", takes(1, 3))
    held.hear("w1", drops(2, 1))
    held.beat(beat("w2", told=1), 0.9)
    assert not held.silent(0.3, LIMIT)
    assert held.silent(0.31, LIMIT)
    assert lost(held) == {"w1": ["receipt 2/1"]}
    assert not held.silent(1.0, LIMIT)
    assert len(held) == 1


def test_what_moved_to_another_worker_is_not_lost_with_the_first() -> None:
    """In whichever order the two are heard."""
    held = table("w1", "w2")
    held.hear("w1", takes(1, 1, 2, 3))
    held.hear("w2", takes(1, 1, attempt=2))
    held.hear("w2", takes(2, 4, attempt=2))
    held.hear("w1", takes(2, 4))
    held.hear("w1", drops(3, 1, 2))  # its own end of it, told late
    held.beat(beat("w2", told=2), 1.0)
    assert lost(held) == {"w1": ["receipt 3/1"]}
    assert lost(held, 2.0) == {"w2": ["receipt 1/2", "receipt 4/2"]}


def test_what_was_handed_back_and_taken_again_at_once_is_held() -> None:
    held = table("w1")
    held.hear("w1", takes(1, 1))
    both = Held(started_ms=1, number=2, take=((1, 2, "again"),), drop=((1, 1),))
    held.hear("w1", both)
    assert lost(held) == {"w1": ["again"]}


def test_a_missed_message_shows_in_the_heartbeat_until_the_roster_is_told() -> None:
    held = table("w1")
    held.hear("w1", takes(1, 1))
    assert not held.beat(beat("w1", told=1), 0.0)
    held.hear("w1", takes(3, 3))
    assert held.beat(beat("w1", told=3), 0.0)
    held.hear("w1", takes(4, 2, 3, 4, full=True))
    assert not held.beat(beat("w1", told=4), 0.0)
    held.hear("w1", drops(5, 4))
    assert not held.beat(beat("w1", told=5), 0.0)
    assert lost(held) == {"w1": ["receipt 2/1", "receipt 3/1"]}


def test_the_roster_of_a_worker_that_came_back_takes_nothing_from_others() -> None:
    held = table("w1", "w2")
    held.hear("w1", takes(1, 1, 2))
    held.beat(beat("w2"), 1.0)
    assert lost(held) == {"w1": ["receipt 1/1", "receipt 2/1"]}
    held.hear("w2", takes(1, 1, attempt=2))
    assert held.beat(beat("w1", told=1), 1.0)
    held.hear("w1", takes(2, 1, 2, full=True))
    assert not held.beat(beat("w1", told=2), 1.0)
    held.beat(beat("w2", told=1), 2.0)
    assert lost(held, 2.0) == {"w1": ["receipt 2/1"]}


def test_a_worker_that_was_started_again_has_lost_what_it_held() -> None:
    held = table("w1")
    held.hear("w1", takes(1, 1))
    held.beat(beat("w1", started_ms=2), 1.0)
    held.hear("w1", takes(1, 2, started_ms=2))
    assert lost(held) == {"w1": ["receipt 1/1"]}
    assert len(held) == 1


def test_one_that_says_goodbye_is_not_lost() -> None:
    held = table("w1")
    held.hear("w1", takes(1, 1))
    assert not held.beat(beat("w1", told=9, state="gone"), 0.0)
    assert not held.beat(beat("w2", state="gone"), 0.0)
    assert lost(held) == {}
    assert len(held) == 0


def test_a_worker_whose_heartbeat_was_not_heard_yet_is_nobodys_loss() -> None:
    held = Table()
    held.hear("w1", takes(1, 1))
    assert len(held) == 0
    assert held.beat(beat("w1", told=1), 0.0)


def test_after_our_own_silence_everybody_has_time_again() -> None:
    held = table("w1", "w2")
    held.grace(1.0)
    held.beat(beat("w2"), 1.2)
    assert lost(held, 1.2) == {}
    assert lost(held, 1.4) == {"w1": []}


@dataclass
class Worker:
    """As `workers.held` tells it. `late` messages were published and not heard yet; `holds` is the truth."""

    name: str
    holds: dict[int, int] = field(default_factory=dict)
    late: list[Held | Heartbeat] = field(default_factory=list)
    number: int = 0

    def say(self, told: Held) -> None:
        self.number += 1
        self.late.append(told.model_copy(update={"number": self.number}))


class Telling(RuleBasedStateMachine):
    """Messages of one worker keep their order; those of two don't, and any may be lost. Once all is told and
    heard, the table holds what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.workers = [Worker(f"w{number}") for number in range(3)]
        self.attempts: dict[int, int] = {}
        self.queue = [1, 2, 3]
        for worker in self.workers:
            self.table.beat(beat(worker.name), 0.0)

    @precondition(lambda self: self.queue)
    @rule(number=st.integers(0, 2))
    def take(self, number: int) -> None:
        seq, worker = self.queue.pop(0), self.workers[number]
        worker.holds[seq] = self.attempts[seq] = self.attempts.get(seq, 0) + 1
        worker.say(takes(0, seq, attempt=self.attempts[seq]))

    @rule(number=st.integers(0, 2), again=st.booleans())
    def let_go(self, number: int, again: bool) -> None:
        worker = self.workers[number]
        if worker.holds:
            seq, attempt = worker.holds.popitem()
            worker.say(drops(0, seq, attempt=attempt))
            if again:
                self.queue.append(seq)

    @rule(number=st.integers(0, 2))
    def redeliver(self, number: int) -> None:
        """The ack wait passed, or a NAK came too early: the holder runs on, and another gets it."""
        for seq, attempt in self.workers[number].holds.items():
            if attempt == self.attempts[seq] and seq not in self.queue:
                self.queue.append(seq)

    @rule(number=st.integers(0, 2), heard=st.booleans())
    def hear(self, number: int, heard: bool) -> None:
        worker = self.workers[number]
        if worker.late:
            self._hear(worker, worker.late.pop(0), heard)

    def _hear(self, worker: Worker, message: Held | Heartbeat, heard: bool = True) -> None:
        if not heard:
            return
        if isinstance(message, Held):
            self.table.hear(worker.name, message)
        elif self.table.beat(message, 0.0):
            take = tuple((seq, attempt, f"receipt {seq}/{attempt}") for seq, attempt in worker.holds.items())
            worker.say(Held(started_ms=1, number=0, full=True, take=take))

    @rule(number=st.integers(0, 2))
    def live(self, number: int) -> None:
        self.workers[number].late.append(beat(self.workers[number].name, told=self.workers[number].number))

    @invariant()
    def each_request_has_one_holder(self) -> None:
        seqs = [seq for life in self.table._lives.values() for seq in life.seqs]
        assert sorted(seqs) == sorted(self.table._entries)

    def teardown(self) -> None:
        for worker in self.workers:
            self.live(self.workers.index(worker))
        while any(worker.late for worker in self.workers):
            for worker in self.workers:
                if worker.late:
                    self._hear(worker, worker.late.pop(0))
        found = {gone.worker: set(gone.receipts) for gone in self.table.lose(1.0, LIMIT)}
        for worker in self.workers:
            newest = {seq: n for seq, n in worker.holds.items() if n == self.attempts[seq]}
            mine = {f"receipt {seq}/{attempt}" for seq, attempt in newest.items()}
            # What a worker runs though it was redelivered may stand here too, while the newest attempt is
            # unknown or over; never the other way round.
            assert mine <= found[worker.name]
            stale = {f"receipt {seq}/{n}" for seq, n in worker.holds.items()} - mine
            assert found[worker.name] <= mine | stale


TestTelling = Telling.TestCase
TestTelling.settings = settings(max_examples=200, stateful_step_count=40)


def test_one_that_was_only_slow_is_given_more_time() -> None:
    held = table("w1")
    for at in 0.0, 0.5:
        assert lost(held, at + 1.1 * LIMIT) == {"w1": []}
        held.beat(beat("w1"), at + 0.5)
    assert not held.silent(1.0 + 1.9 * LIMIT, LIMIT)
    assert lost(held, 1.0 + 2.1 * LIMIT) == {"w1": []}
