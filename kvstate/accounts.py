"""The KV room of one worker, as whoever sends it requests forecasts it. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvstate.budget import KV_CEILING
from kvstate.errors import IntegrityError
from kvstate.peak import Forecast
from kvstate.prefix import BLOCK_TOKENS

CEILINGS = {"batch": 0.4, "standard": 0.7, "interactive": 0.9}
"""Share of the KV cache that the requests of a class may take, so that the others find room at once."""

_TRIAL = -1
"""The key of a request that is added to see what would be."""


@dataclass(slots=True)
class _Held:
    """A request that the worker holds. `shared`: how many of `hashes` others have too."""

    service_class: str
    tokens: int  # its prompt and its output so far
    remaining: float
    hashes: tuple[int, ...]
    shared: int = 0

    @property
    def private(self) -> int:
        return self.tokens - self.shared * BLOCK_TOKENS


class Account:
    """Tokens throughout. What several requests share counts once, and against the total alone, not against
    the ceiling of any class. Of a worker's total room 0 says that it is unknown, and nothing is limited.

    Attributes:
        total: room of the KV cache.
        block_size: tokens for which room is given out together.
        foreign: taken by requests that are not known here.
    """

    def __init__(
        self,
        total: int,
        block_size: int = 16,
        ceilings: Mapping[str, float] = CEILINGS,
        ceiling: float = KV_CEILING,
    ) -> None:
        self.total, self.block_size = total, block_size
        self.foreign = 0.0
        self._rounding = (block_size - 1) / 2  # what requests' last blocks waste, on average
        self._ceilings = ceilings
        self._ceiling = ceiling
        self._held: dict[int, _Held] = {}
        self._counts: dict[int, int] = {}  # of a block: how many requests have it
        self._keys: dict[int, int] = {}  # of a block: the sum of their keys, which is the key of a single one
        self._common = 0  # blocks that several have
        self._ends = 0.0  # tokens that all would have at their ends
        self._forecasts: dict[str | None, Forecast] = {}  # by class, None = all; made when asked for

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: int) -> bool:
        return key in self._held

    # What changes it

    def add(
        self, key: int, service_class: str, prompt_tokens: int, remaining: float, hashes: Sequence[int] = ()
    ) -> None:
        """A request was sent there, with the hashes of its prompt's blocks.

        Raises ValueError if the worker has one of this key.
        """
        if key in self._held:
            raise ValueError(f"{key} is held already")
        self._put(key, _Held(service_class, prompt_tokens, remaining, _countable(hashes, prompt_tokens)))

    def progress(self, key: int, tokens: int, remaining: float) -> None:
        """It has `tokens`, its prompt and its output, and will add `remaining`. Raises KeyError."""
        held = self._held[key]
        self._ends -= held.tokens + held.remaining
        held.tokens, held.remaining = max(tokens, len(held.hashes) * BLOCK_TOKENS), remaining
        self._ends += held.tokens + held.remaining
        self._forecasts.clear()

    def finish(self, key: int) -> None:
        """It is there no more. Raises KeyError if it was not."""
        self._take(key)

    # Questions

    def used(self) -> float:
        """Taken now, with what last blocks waste."""
        private = sum(held.private + self._rounding for held in self._held.values())
        return self._offset() + private

    def peak(self) -> float:
        """The most that will be taken, if all goes as forecast."""
        return self._offset() + self._forecast(None).peak

    def shared(self, hashes: Sequence[int]) -> int:
        """Tokens of a prompt with these blocks that requests which are there have too."""
        count = 0
        for block in hashes:
            if block not in self._counts:
                break
            count += 1
        return count * BLOCK_TOKENS

    def fits(
        self,
        service_class: str,
        prompt_tokens: int,
        remaining: float,
        hashes: Sequence[int] = (),
        without: Collection[int] = (),
    ) -> bool:
        """Whether with one more request all stay below the ceilings to their ends.

        A class that has nothing there is below its own ceiling with one request, and an empty worker below
        the total, whatever its size: nothing that runs could ever free more room for it.

        Args:
            without: keys of requests that would go for it.
        """
        if self.total == 0:
            return True
        most = self.foreign + self._ends + prompt_tokens + remaining + self._rounding * (len(self._held) + 1)
        if most <= min(self._ceilings[service_class], self._ceiling) * self.total:
            return True  # even if all were to end at the same moment, and shared nothing
        mine = _countable(hashes, prompt_tokens)
        counts = [self._counts.get(block, 0) for block in mine]
        if without or 1 in counts:
            return self._try(_Held(service_class, prompt_tokens, remaining, mine), without)
        if not self._held and not self.foreign:
            return True
        tokens = prompt_tokens + self._rounding - BLOCK_TOKENS * sum(map(bool, counts))
        if self._offset() + self._forecast(None).after(tokens, remaining) > self._ceiling * self.total:
            return False
        own = self._forecast(service_class)
        return not own or own.after(tokens, remaining) <= self._ceilings[service_class] * self.total

    def until(
        self, service_class: str, prompt_tokens: int, remaining: float, hashes: Sequence[int] = ()
    ) -> float:
        """Output tokens that each request there will have made before such a one `fits`; inf: never."""
        shared = sum(block in self._counts for block in _countable(hashes, prompt_tokens))
        tokens = prompt_tokens + self._rounding - BLOCK_TOKENS * shared
        total = self._forecast(None).until(tokens, remaining, self._ceiling * self.total - self._offset())
        own = self._forecast(service_class).until(
            tokens, remaining, self._ceilings[service_class] * self.total
        )
        return max(total, own)

    # Integrity

    def check(self) -> None:
        """Raises IntegrityError if the books disagree."""
        counts: dict[int, int] = {}
        keys: dict[int, int] = {}
        for key, held in self._held.items():
            for block in held.hashes:
                counts[block] = counts.get(block, 0) + 1
                keys[block] = keys.get(block, 0) + key
        if (counts, keys) != (self._counts, self._keys):
            raise IntegrityError("the blocks' holders are not the requests that are held")
        if self._common != sum(count > 1 for count in counts.values()):
            raise IntegrityError(f"{self._common} blocks are not those that several requests have")
        ends = sum(held.tokens + held.remaining for held in self._held.values())
        if not math.isclose(self._ends, ends, abs_tol=1e-3):
            raise IntegrityError(f"{self._ends} tokens are not what all would have at their ends")
        for key, held in self._held.items():
            if held.shared != sum(counts[block] > 1 for block in held.hashes):
                raise IntegrityError(f"{key} does not share {held.shared} blocks")

    # Keeping the books

    def _put(self, key: int, held: _Held) -> None:
        self._held[key] = held
        self._ends += held.tokens + held.remaining
        held.shared = 0
        for block in held.hashes:
            count = self._counts.get(block, 0)
            if count:
                held.shared += 1
            if count == 1:
                self._held[self._keys[block]].shared += 1
                self._common += 1
            self._counts[block] = count + 1
            self._keys[block] = self._keys.get(block, 0) + key
        self._forecasts.clear()

    def _take(self, key: int) -> _Held:
        held = self._held.pop(key)
        self._ends = self._ends - held.tokens - held.remaining if self._held else 0.0
        for block in held.hashes:
            count = self._counts[block] = self._counts[block] - 1
            self._keys[block] -= key
            if count == 1:
                self._held[self._keys[block]].shared -= 1
                self._common -= 1
            elif count == 0:
                del self._counts[block], self._keys[block]
        self._forecasts.clear()
        return held

    def _offset(self) -> float:
        """What is there to the end of the forecast: shared blocks go with the last that has them."""
        return self.foreign + self._common * BLOCK_TOKENS

    def _forecast(self, service_class: str | None) -> Forecast:
        forecast = self._forecasts.get(service_class)
        if forecast is None:
            forecast = self._forecasts[service_class] = Forecast(
                [
                    (held.private + self._rounding, held.remaining)
                    for held in self._held.values()
                    if service_class is None or held.service_class == service_class
                ]
            )
        return forecast

    def _try(self, newcomer: _Held, without: Collection[int]) -> bool:
        """`fits`, by doing it and undoing it: what others share changes by it."""
        gone = [(key, self._take(key)) for key in without if key in self._held]
        alone = not self._held and not self.foreign
        self._put(_TRIAL, newcomer)
        fits = alone or self._within(newcomer.service_class)
        self._take(_TRIAL)
        for key, held in gone:
            self._put(key, held)
        return fits

    def _within(self, service_class: str) -> bool:
        own = self._forecast(service_class)
        below = len(own) == 1 or own.peak <= self._ceilings[service_class] * self.total
        return below and self.peak() <= self._ceiling * self.total


def _countable(hashes: Sequence[int], prompt_tokens: int) -> tuple[int, ...]:
    """Those that the prompt is long enough for, by its own count, each once."""
    return tuple(dict.fromkeys(hashes[: prompt_tokens // BLOCK_TOKENS]))
