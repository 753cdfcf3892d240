"""What a worker tells of its engine's cache, against an engine that caches and evicts blocks of tokens."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import pytest

from kvstate import blocks, prefix
from kvstate.blocks import Blocks

SIZE = 16
BYTES = 4  # a token: the text's blocks are 8 of the engine's


class Engine:
    """Caches `room` blocks, and tells `Blocks` of each that it takes and evicts. A block's name is a tuple of
    all that is before its end, which no two chains share."""

    def __init__(self, told: Blocks, room: int) -> None:
        self.told, self.room = told, room
        self.held: OrderedDict[Hashable, None] = OrderedDict()

    def run(self, text: str, *extra: str) -> None:
        tokens = tokens_of(text)
        chain = [(extra, *tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]
        for number, block in enumerate(chain):
            if block not in self.held:
                parent = chain[number - 1] if number else None
                self.told.stored([block], parent, tokens[number * SIZE :][:SIZE], SIZE, [extra])
        for block in reversed(chain):
            self.held[block] = None
            self.held.move_to_end(block)
        while len(self.held) > self.room:
            self.told.removed([self.held.popitem(last=False)[0]])
        self.told.ran(names(text), tokens, len(text), extra)

    def holds(self, text: str) -> int:
        """How many of the text's own blocks it has."""
        tokens = tokens_of(text)
        ends = range(prefix.BLOCK_TOKENS, len(tokens) + 1, prefix.BLOCK_TOKENS)
        return sum(((), *tokens[:end]) in self.held for end in ends)


def tokens_of(text: str) -> list[int]:
    return [hash(text[at : at + BYTES]) for at in range(0, len(text) - BYTES + 1, BYTES)]


def names(text: str) -> tuple[int, ...]:
    return prefix.chain(text.encode(), prefix.seed("", "m"))


def text(seed: int, count: int) -> str:
    """Of `count` of the fleet's blocks."""
    return "".join(random.Random(seed).choices("abcdefgh ", k=count * prefix.BLOCK))


class Listener:
    """What who hears all changes thinks is held."""

    def __init__(self, told: Blocks) -> None:
        self._told = told
        self.held: set[int] = set()
        self.heard = 0

    def hear(self) -> None:
        taken, evicted = self._told.changes()
        self.held = (self.held - set(evicted)) | set(taken)
        if taken or evicted:
            self.heard += 1
            assert self._told.number == self.heard

    def holds(self, of: Sequence[int]) -> int:
        return sum(name in self.held for name in of)


@pytest.mark.parametrize("seed", range(5))
def test_who_hears_all_knows_what_the_engine_holds(seed: int) -> None:
    told, dice = Blocks(), random.Random(seed)
    engine, listener = Engine(told, 100), Listener(told)
    begins = [text(n, 4) for n in range(6)]
    for number in range(200):
        engine.run(dice.choice(begins) + text(100 + number, 1) * dice.randint(0, 1))
        if dice.random() < 0.7:
            listener.hear()
            assert listener.held == set(told.held())
            assert [listener.holds(names(each)) for each in begins] == list(map(engine.holds, begins))


def test_blocks_of_another_adapter_or_salt_are_others() -> None:
    told = Blocks()
    engine, listener = Engine(told, 100), Listener(told)
    engine.run(text(1, 2), "adapter")
    told.ran(names(text(1, 2)), tokens_of(text(1, 2)), 2 * prefix.BLOCK)
    told.ran(names(text(1, 1)), tokens_of(text(1, 2)), 2 * prefix.BLOCK, (), ("salt",))
    listener.hear()
    assert len(listener.held) == 2
    told.cleared()
    listener.hear()
    assert not listener.held


def test_a_block_with_two_copies_goes_with_the_second() -> None:
    told = Blocks()
    engine, listener = Engine(told, 100), Listener(told)
    engine.run(text(1, 1))
    tokens = tokens_of(text(1, 1))
    (last,) = [block for block in engine.held if len(block) == len(tokens) + 1]  # type: ignore[arg-type]
    told.stored([last], None, tokens[-SIZE:], SIZE, [()])
    told.removed([last])
    listener.hear()
    assert listener.held == set(names(text(1, 1)))
    told.removed([last, last])
    listener.hear()
    assert not listener.held


def test_an_engine_may_tell_of_its_blocks_a_moment_after_a_run() -> None:
    told = Blocks()
    listener, content = Listener(told), text(1, 2)
    told.ran(names(content), tokens_of(content), len(content))
    listener.hear()
    told.stored(*_whole(content))
    listener.hear()
    assert listener.held == set(names(content))


def test_what_never_was_there_is_not_waited_for() -> None:
    told = Blocks()
    listener, content = Listener(told), text(1, 2)
    told.ran(names(content), tokens_of(content), len(content))
    listener.hear()
    listener.hear()
    told.stored(*_whole(content))
    listener.hear()
    assert not listener.held


def _whole(content: str) -> tuple[list[int], None, list[int], int, list[tuple[()]]]:
    tokens = tokens_of(content)
    count = len(tokens) // SIZE
    return list(range(count)), None, tokens, SIZE, [()] * count


def test_what_was_missed_is_told_no_more() -> None:
    told = Blocks()
    engine = Engine(told, 100)
    engine.run(text(1, 2))
    assert told.changes()[0]
    assert told.number == 1
    told.lose()
    engine.run(text(2, 2))
    assert told.changes() == ([], [])
    assert (told.number, told.held()) == (0, [])


def test_there_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST", 10)
    told = Blocks()
    engine, listener = Engine(told, 10_000), Listener(told)
    for seed in range(8):
        engine.run(text(seed, 4))
        listener.hear()
        assert len(listener.held) <= 10
        assert listener.holds(names(text(seed, 4))) == 4
