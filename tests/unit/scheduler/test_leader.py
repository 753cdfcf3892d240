"""The leader's lease: its decisions by a clock of the test's own, and candidates over the fake broker."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors, subjects
from broker.memory import MemoryBroker
from scheduler.leader import Leader, Lease
from tests.waiting import until
from tests.workbench import metric


class Bucket:
    """One key with compare-and-set."""

    def __init__(self) -> None:
        self.revision = 0
        self.holder = ""

    def swap(self, holder: str, expected: int) -> int | None:
        if expected != self.revision:
            return None
        self.revision, self.holder = self.revision + 1, holder
        return self.revision


class Candidate:
    """What `Leader` does, one broker call at a time, each of which may be slow or lose its answer."""

    def __init__(self, name: str, bucket: Bucket, ttl: float, rate: float) -> None:
        self.name, self.bucket, self.rate = name, bucket, rate
        self.lease = Lease(ttl)

    def clock(self, now: float) -> float:
        """Every machine's starts elsewhere and has a speed of its own."""
        return 1000.0 * len(self.name) + now * self.rate

    def step(self, sent: float, applied: float, answered: float, lossy: bool) -> None:
        if not self.lease.held:
            taken = self.bucket.holder not in ("", self.name)
            self.lease.saw(self.bucket.revision, taken, self.clock(applied))
            if not self.lease.free(self.clock(applied)):
                return
        revision = self.bucket.swap(self.name, self.lease.revision)
        if lossy:
            return
        if revision is None:
            self.lease.lost()
        else:
            self.lease.won(revision, self.clock(sent))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0.0, 0.6), st.floats(0.0, 0.4), st.booleans()),
        min_size=1,
        max_size=60,
    ),
    st.tuples(*[st.floats(0.95, 1.05)] * 3),
)
def test_no_two_lead_at_once(
    steps: list[tuple[int, float, float, bool]], rates: tuple[float, float, float]
) -> None:
    """Whoever asks when, however long the broker takes, whichever answers are lost."""
    bucket = Bucket()
    candidates = [
        Candidate(name, bucket, 1.0, rate) for name, rate in zip(("a", "bb", "ccc"), rates, strict=True)
    ]
    now = 0.0
    for number, pause, delay, lossy in steps:
        now += pause
        candidates[number].step(now, now + delay, now + delay, lossy)
        now += delay
        leading = [c.name for c in candidates if c.lease.leads(c.clock(now))]
        assert len(leading) <= 1
        assert leading in ([], [bucket.holder])


def test_a_lease_that_nobody_ever_had_is_free() -> None:
    lease = Lease(1.0)
    lease.saw(0, False, 5.0)
    assert lease.free(5.0)


def test_a_lease_is_taken_when_one_revision_stood_for_its_whole_time() -> None:
    lease = Lease(1.0)
    lease.saw(7, True, 5.0)
    lease.saw(8, True, 5.75)
    lease.saw(8, True, 6.5)
    assert not lease.free(6.7)
    assert lease.free(6.75)


def test_a_holder_leads_until_before_anyone_could_take_it() -> None:
    lease = Lease(1.0)
    assert not lease.leads(0.0)
    lease.won(3, 5.0)
    assert lease.leads(5.7)
    assert not lease.leads(5.9)
    assert lease.held  # by a renewal nobody forestalled it leads again
    lease.lost()
    assert not lease.leads(5.0)


# Over the broker


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker()


async def test_the_first_leads_and_the_second_takes_over_what_is_given_up(broker: MemoryBroker) -> None:
    first, second = Leader(broker, "s1", 30.0), Leader(broker.client(), "s2", 30.0)
    assert await first.confirm()
    assert not await second.confirm()
    assert await first.confirm()
    data, _ = await broker.get(subjects.KV_LEASES, subjects.LEADER)
    assert data is not None
    assert b'"holder":"s1"' in data
    await first.resign()
    assert not first.leads
    assert await second.confirm()
    assert not await first.confirm()
    await first.resign()
    assert await second.confirm()


async def test_a_silent_leaders_lease_is_taken(broker: MemoryBroker) -> None:
    first, second = Leader(broker, "s1", 0.1), Leader(broker.client(), "s2", 0.1)
    assert await first.confirm()
    assert metric("headrace_leader") == 1
    await until(second.confirm)
    assert not first.leads
    assert not await first.confirm()
    assert metric("headrace_leader") == 0


async def test_keeping_it_asks_the_broker_four_times_in_its_time(broker: MemoryBroker) -> None:
    candidate = Leader(broker, "s1", 30.0)
    for _ in range(5):
        await candidate.keep()
    assert (await broker.get(subjects.KV_LEASES, subjects.LEADER)).revision == 1


async def test_nobody_leads_without_the_broker(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Leader(broker, "s1", 30.0)
    assert await candidate.confirm()
    broker.disconnect()
    assert not await candidate.confirm()
    broker.reconnect()
    assert candidate.leads

    async def fails(*_: object) -> None:
        raise errors.Unavailable("no quorum")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(broker, "swap", fails)
        assert await candidate.confirm()  # by the renewal before
        await candidate.resign()
    assert caplog.text.count("no quorum") == 2


async def test_a_renewal_whose_answer_was_lost_is_known_again(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its holder would wait for its own lease to run out."""
    swap = broker.swap

    async def deaf(bucket: str, key: str, value: bytes, expected: int) -> int | None:
        await swap(bucket, key, value, expected)
        raise errors.Unavailable("the answer is lost")

    candidate = Leader(broker, "s1", 30.0)
    assert await candidate.confirm()
    with monkeypatch.context() as patch:
        patch.setattr(broker, "swap", deaf)
        await candidate.confirm()
    assert not await candidate.confirm()
    assert await candidate.confirm()
    # Another process of the same name is another candidate.
    assert not await Leader(broker.client(), "s1", 30.0).confirm()
