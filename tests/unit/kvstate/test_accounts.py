from __future__ import annotations

import bisect
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstate.accounts import CEILINGS, Account
from kvstate.budget import KV_CEILING
from kvstate.errors import IntegrityError
from kvstate.prefix import BLOCK_TOKENS

SIZE = 16
WASTE = (SIZE - 1) / 2
TOTAL = 5000

classes = st.sampled_from(list(CEILINGS))
prompts = st.integers(0, 1200)
rests = st.integers(0, 200)
chains = st.text("01", max_size=6).map(
    lambda path: tuple(int("1" + path[:end], 2) for end in range(1, len(path) + 1))
)


@dataclass
class Request:
    service_class: str
    tokens: int
    remaining: int
    blocks: set[int]

    def at(self, step: int) -> int:
        return self.tokens + step


def naive_private(requests: list[Request], request: Request) -> int:
    others = [other.blocks for other in requests if other is not request]
    return request.tokens - BLOCK_TOKENS * len(request.blocks & set().union(*others))


def naive_common(requests: list[Request]) -> int:
    every = [block for request in requests for block in request.blocks]
    return BLOCK_TOKENS * len({block for block in every if every.count(block) > 1})


def naive_peak(requests: list[Request], among: list[Request]) -> float:
    """Of the private tokens of those `among` the requests, step by step."""
    longest = max((request.remaining for request in among), default=0)
    entries = [(naive_private(requests, request) + WASTE, request.remaining) for request in among]
    return max(sum(tokens + step for tokens, rest in entries if rest >= step) for step in range(longest + 1))


def naive_fits(requests: list[Request], foreign: int, newcomer: Request, total: int) -> bool:
    if not requests and not foreign:
        return True
    every = [*requests, newcomer]
    own = [request for request in every if request.service_class == newcomer.service_class]
    most = foreign + naive_common(every) + naive_peak(every, every)
    ceiling = CEILINGS[newcomer.service_class]
    return most <= KV_CEILING * total and (len(own) == 1 or naive_peak(every, own) <= ceiling * total)


def least_room(requests: list[Request], foreign: int, newcomer: Request) -> int:
    """In which it fits, so that one token less is too little."""
    return (
        bisect.bisect_left(
            range(1, 10**6), True, key=lambda total: naive_fits(requests, foreign, newcomer, total)
        )
        + 1
    )


def request_of(service_class: str, prompt: int, remaining: int, hashes: tuple[int, ...]) -> Request:
    return Request(service_class, prompt, remaining, set(hashes[: prompt // BLOCK_TOKENS]))


def real_use(requests: list[Request], step: int) -> int:
    """What an engine takes: shared blocks once, and each request's last block whole."""
    alive = [request for request in requests if request.remaining >= step]
    distinct = set[int]().union(*(request.blocks for request in alive))
    rest = [request.at(step) - BLOCK_TOKENS * len(request.blocks) for request in alive]
    return BLOCK_TOKENS * len(distinct) + sum(-(-tokens // SIZE) * SIZE for tokens in rest)


class Books(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.account = Account(TOTAL, SIZE)
        self.requests: dict[int, Request] = {}
        self.next = 0

    @rule(service_class=classes, prompt=prompts, rest=rests, hashes=chains)
    def add(self, service_class: str, prompt: int, rest: int, hashes: tuple[int, ...]) -> None:
        self.account.add(self.next, service_class, prompt, rest, hashes)
        self.requests[self.next] = request_of(service_class, prompt, rest, hashes)
        self.next += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), made=st.integers(0, 200), rest=rests)
    def progress(self, data: st.DataObject, made: int, rest: int) -> None:
        key = data.draw(st.sampled_from(list(self.requests)))
        request = self.requests[key]
        request.tokens, request.remaining = request.tokens + made, rest
        self.account.progress(key, request.tokens, rest)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.requests)))
        del self.requests[key]
        self.account.finish(key)
        assert key not in self.account

    @rule(tokens=st.sampled_from([0, 0, 1000]))
    def others(self, tokens: int) -> None:
        self.account.foreign = tokens

    @rule(data=st.data(), service_class=classes, prompt=prompts, rest=rests, hashes=chains)
    def ask(
        self, data: st.DataObject, service_class: str, prompt: int, rest: int, hashes: tuple[int, ...]
    ) -> None:
        foreign, newcomer = int(self.account.foreign), request_of(service_class, prompt, rest, hashes)
        gone = data.draw(st.sets(st.sampled_from(list(self.requests) or [-5]), max_size=3))
        for without in (set[int](), gone):
            stay = [request for key, request in self.requests.items() if key not in without]
            least = least_room(stay, foreign, newcomer)
            for total in (least, least - 1):
                self.account.total = total
                expected = total == 0 or naive_fits(stay, foreign, newcomer, total)
                assert self.account.fits(service_class, prompt, rest, hashes, without) == expected

    @rule(hashes=chains)
    def common(self, hashes: tuple[int, ...]) -> None:
        held = set[int]().union(*(request.blocks for request in self.requests.values()))
        assert self.account.shared(hashes) == BLOCK_TOKENS * sum(block in held for block in hashes)

    @invariant()
    def books_agree(self) -> None:
        self.account.check()
        requests, foreign = list(self.requests.values()), self.account.foreign
        assert len(self.account) == len(requests)
        private = sum(naive_private(requests, request) + WASTE for request in requests)
        assert self.account.used() == foreign + naive_common(requests) + private
        peak = self.account.peak()
        assert peak == foreign + naive_common(requests) + naive_peak(requests, requests)
        longest = max((request.remaining for request in requests), default=0)
        most = peak + WASTE * len(requests)  # if each one's last block has a single token
        assert all(foreign + real_use(requests, step) <= most for step in range(longest + 1))


Books.TestCase.settings = settings(max_examples=100, stateful_step_count=25)
TestAgainstTheNaiveBooks = Books.TestCase

arrivals = st.lists(st.tuples(classes, prompts, rests, chains), max_size=25)


@given(arrivals)
def test_who_asks_before_adding_keeps_below_the_ceilings(
    requests: list[tuple[str, int, int, tuple[int, ...]]],
) -> None:
    account = Account(TOTAL, SIZE)
    for key, request in enumerate(requests):
        if account.fits(*request):
            account.add(key, *request)
            assert account.peak() <= KV_CEILING * TOTAL or len(account) == 1


@given(arrivals, st.tuples(classes, prompts, rests, chains))
def test_asking_changes_nothing(
    requests: list[tuple[str, int, int, tuple[int, ...]]], one: tuple[str, int, int, tuple[int, ...]]
) -> None:
    account = Account(TOTAL, SIZE)
    for key, request in enumerate(requests):
        account.add(key, *request)
    before = account.used(), account.peak(), len(account)
    account.fits(*one, without=range(0, len(requests), 2))
    assert (account.used(), account.peak(), len(account)) == before
    account.check()


@given(classes, st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_empty_worker_takes_one_of_any_size(service_class: str, prompt: int, rest: int) -> None:
    assert Account(TOTAL, SIZE).fits(service_class, prompt, rest)


def test_a_worker_of_unknown_room_takes_all() -> None:
    account = Account(0)
    account.add(1, "batch", 10**9, 10**9)
    assert account.fits("batch", 10**9, 10**9)


def test_classes_have_their_ceilings_and_a_first_one_its_place() -> None:
    account = Account(10_000, block_size=1)
    account.add(1, "batch", 3_900, 0)
    assert account.fits("batch", 100, 0)
    assert not account.fits("batch", 101, 0)
    assert account.fits("standard", 5_600, 0)
    assert not account.fits("standard", 5_601, 0)
    account.add(2, "standard", 3_000, 0)
    assert account.fits("interactive", 2_600, 0)
    assert not account.fits("interactive", 2_601, 0)
    assert account.fits("interactive", 2_601, 0, without=[1])
    account.foreign = 1_000
    assert not account.fits("interactive", 2_600, 0)


def test_a_shared_prefix_counts_once() -> None:
    account = Account(10_000, block_size=1)
    hashes = tuple(range(10))
    account.add(1, "interactive", 1_300, 0, hashes)
    account.add(2, "interactive", 1_300, 0, hashes)
    assert account.used() == 1_280 + 2 * 20
    assert account.shared((*hashes, 99)) == 1_280
    account.finish(1)
    assert account.used() == 1_300


def test_a_key_is_held_once() -> None:
    account = Account(TOTAL)
    account.add(1, "batch", 10, 10)
    with pytest.raises(ValueError, match="held already"):
        account.add(1, "batch", 10, 10)
    account.finish(1)
    with pytest.raises(KeyError):
        account.finish(1)
    with pytest.raises(KeyError):
        account.progress(1, 10, 10)


@pytest.mark.parametrize("harm", ["counts", "common", "shared"])
def test_books_that_disagree_are_found(harm: str) -> None:
    account = Account(TOTAL)
    for key in (1, 2):
        account.add(key, "batch", 500, 10, (7, 8, 9))
    account.check()
    if harm == "counts":
        account._counts[7] = 1
    elif harm == "common":
        account._common = 2
    else:
        account._held[2].shared = 2
    with pytest.raises(IntegrityError):
        account.check()
