"""Which prefix blocks an engine's cache holds, by what it tells of its own blocks. Pure.

An engine names its blocks by hashes of tokens that nobody else can compute; the fleet names the beginning of
a prompt's text (`kvstate.prefix`). Of a request that runs, both are known: its tokens lead along the engine's
blocks, and each of its prefix blocks is bound to the last one that it should fill, tokens being spread evenly
over the text. It is held until the engine has evicted that one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from kvstate.prefix import BLOCK, LIMIT

MOST = 1 << 16
"""Prefix blocks that are bound; of more, those that were bound first are told as evicted."""

UNBOUND = 256
"""Requests that wait to be bound: those of a moment. Of more, the oldest are not."""


@dataclass(slots=True)
class _Block:
    """`copies`: an engine may hold the same content twice."""

    key: int
    copies: int = 1
    names: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Run:
    chain: Sequence[int]
    tokens: Sequence[int]
    length: int
    extra: tuple[str, ...]
    salt: tuple[str, ...]
    again: bool = False


class Blocks:
    """Names are the 64-bit hashes of `prefix.chain`; the engine's may be anything hashable.

    Bounded by the engine's own cache, and by MOST.

    Attributes:
        number: of the last `changes` that had any; 0 = there were none, or no telling any more.
    """

    def __init__(self) -> None:
        self.number = 0
        self._size = 0  # tokens of a block
        self._blocks: dict[Hashable, _Block] = {}
        self._by_key: dict[int, Hashable] = {}  # of what a block holds and follows
        self._bound: dict[int, Hashable] = {}  # by name, the first bound first
        self._runs: deque[_Run] = deque(maxlen=UNBOUND)
        self._changed: dict[int, bool] = {}  # by name: whether it is held now
        self._lost = False

    # What the engine tells

    def stored(
        self,
        blocks: Sequence[Hashable],
        parent: Hashable | None,
        tokens: Sequence[int],
        size: int,
        extras: Sequence[tuple[Hashable, ...]],
    ) -> None:
        """It has taken `blocks`, a chain of `size` tokens each that follows `parent`, None = a beginning.

        Args:
            extras: of each block, what else it is kept apart by.
        """
        self._size = size
        for number, block in enumerate(blocks):
            known = self._blocks.get(block)
            if known is not None:
                known.copies += 1
            else:
                key = _key(parent, tokens[number * size : (number + 1) * size], extras[number])
                self._blocks[block] = _Block(key)
                self._by_key[key] = block
            parent = block

    def removed(self, blocks: Sequence[Hashable]) -> None:
        """It has evicted one copy of each."""
        for block in blocks:
            known = self._blocks.get(block)
            if known is None:
                continue
            known.copies -= 1
            if not known.copies:
                del self._blocks[block]
                if self._by_key.get(known.key) == block:
                    del self._by_key[known.key]
                for name in known.names:
                    del self._bound[name]
                    self._changed[name] = False

    def cleared(self) -> None:
        """It has evicted all."""
        self._changed |= dict.fromkeys(self._bound, False)
        self._blocks.clear()
        self._by_key.clear()
        self._bound.clear()

    def lose(self) -> None:
        """What it told is not known completely, and is of no use any more."""
        self.cleared()
        self._changed.clear()
        self.number, self._lost = 0, True

    # What runs there

    def ran(
        self,
        chain: Sequence[int],
        tokens: Sequence[int],
        length: int,
        extra: tuple[str, ...] = (),
        salt: tuple[str, ...] = (),
    ) -> None:
        """A prompt of these `tokens` has been computed. It is bound by one of the next two `changes`: the
        engine may tell of its blocks a moment later.

        Args:
            chain: names of its text's first blocks.
            length: bytes of its text, as far as known.
            extra: what each of its blocks is kept apart by, and `salt` the first one beside.
        """
        if chain and not self._lost:
            self._runs.append(_Run(chain, tokens, length, extra, salt))

    # What the fleet is told

    def changes(self) -> tuple[list[int], list[int]]:
        """Names held now that were not at the last call, and the reverse; `number` counts those with any."""
        for _ in range(len(self._runs)):
            run = self._runs.popleft()
            if not self._bind(run) and not run.again:
                self._runs.append(replace(run, again=True))
        if not self._changed:
            return [], []
        self.number += 1
        changed, self._changed = self._changed, {}
        held = [name for name, there in changed.items() if there]
        return held, [name for name, there in changed.items() if not there]

    def held(self) -> list[int]:
        """All names that are held, as of `number`; those bound last come first."""
        return [name for name in reversed(self._bound) if name not in self._changed]

    def _bind(self, run: _Run) -> bool:
        """Whether the cache has all of it."""
        size, chain = self._size, run.chain[:LIMIT]
        if not size:
            return False
        # The text goes on for less than a block after the last one that is named, unless there are too many.
        most = len(chain) * BLOCK + BLOCK - 1 if len(chain) < LIMIT else run.length
        length = min(max(run.length, len(chain) * BLOCK), most)
        walk: list[Hashable] = []
        parent: Hashable | None = None
        for count, name in enumerate(chain, 1):
            end = max(1, len(run.tokens) * BLOCK * count // (length * size))
            while len(walk) < end:
                start = len(walk) * size
                extra = run.extra if walk else run.extra + run.salt
                parent = self._by_key.get(_key(parent, run.tokens[start : start + size], extra))
                if parent is None:
                    return False
                walk.append(parent)
            if name not in self._bound:
                self._hold(name, walk[end - 1])
        return True

    def _hold(self, name: int, block: Hashable) -> None:
        self._bound[name] = block
        self._blocks[block].names.append(name)
        self._changed[name] = True
        if len(self._bound) > MOST:
            oldest = next(iter(self._bound))
            self._blocks[self._bound.pop(oldest)].names.remove(oldest)
            self._changed[oldest] = False


def _key(parent: Hashable | None, tokens: Sequence[int], extra: tuple[Hashable, ...]) -> int:
    return hash((parent, tuple(tokens), extra))
