"""Requests that are made up: when they come, what they share, how long they are. All drawn from one seed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile, LengthsSection, StreamSection

_CHUNK = 4096  # draws at once: one by one they cost ten times as much

T = TypeVar("T")


def calls(fleet: FleetFile) -> Iterator[Call]:
    """All streams' requests in order of time, until the fleet's duration is over."""
    streams = [
        _Stream(section, number, fleet).calls(fleet.duration) for number, section in enumerate(fleet.stream)
    ]
    return heapq.merge(*streams, key=lambda call: call.at)


@dataclass(order=True, slots=True)
class _Turn:
    """A conversation's next request. `length`: tokens of prompts and answers so far; `first`: the hash that
    block 0 would have if the prefix were not shared; `adapter`: its number, -1 = none; `group`: that of its
    prefix with that adapter; `known`: tokens of it that an earlier one has had."""

    at: float
    first: int
    adapter: int = field(compare=False)
    group: int = field(compare=False)
    tenant: int = field(compare=False)
    length: int = field(compare=False)
    known: int = field(compare=False)


class _Stream:
    def __init__(self, section: StreamSection, number: int, fleet: FleetFile) -> None:
        self._section, self._number = section, number
        self._size, self._context = fleet.block_size, fleet.context
        self._rng = np.random.default_rng([fleet.seed, number])
        self._groups = _repeat(lambda n: self._zipf(section.groups, section.zipf, n))
        self._tenants = _repeat(lambda n: self._zipf(section.tenants, section.tenant_zipf, n))
        self._adapters = _repeat(lambda n: self._zipf(section.adapters, section.adapter_zipf, n))
        self._added = _repeat(lambda n: self._lengths(section.prompt, n))
        self._outputs = _repeat(lambda n: self._lengths(section.output, n))
        self._dice = _repeat(lambda n: self._rng.random(n).tolist())
        self._pauses = _repeat(lambda n: (section.think * self._rng.standard_exponential(n)).tolist())
        self._names = [f"{section.name}-{n}" for n in range(section.tenants)]
        self._seen: set[int] = set()
        self._shared: dict[int, tuple[int, ...]] = {}
        self._conversations = 0

    def calls(self, duration: float) -> Iterator[Call]:
        due: list[_Turn] = []
        for at in self._arrivals():
            while due and due[0].at <= min(at, duration):
                yield self._call(heapq.heappop(due), due)
            if at > duration:
                return
            yield self._call(self._begin(at), due)

    def _arrivals(self) -> Iterator[float]:
        """Of conversations: candidates at the highest rate, of which each is kept as the rate then is."""
        section, now = self._section, 0.0
        highest = section.peak if section.arrivals != "poisson" else 1.0
        while True:
            gaps = self._rng.standard_exponential(_CHUNK) * section.turns / (section.rate * highest)
            times = now + np.cumsum(gaps)
            now = float(times[-1])
            if highest > 1:
                times = times[self._rng.random(_CHUNK) * highest < self._rate(times)]
            yield from times.tolist()

    def _rate(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """As a multiple of the mean one."""
        section = self._section
        phase = times % section.period / section.period
        if section.arrivals == "diurnal":
            return 1 - (section.peak - 1) * np.cos(2 * math.pi * phase)
        calm = (1 - section.peak * section.burst) / (1 - section.burst)
        return np.where(phase < section.burst, section.peak, calm)

    def _begin(self, at: float) -> _Turn:
        section = self._section
        self._conversations += 1
        adapter = next(self._adapters) if section.adapters else -1
        group, known = -1, 0
        if section.groups:
            # No cache is shared between adapters.
            group = next(self._groups) + (adapter + 1) * section.groups
            known = section.prefix if group in self._seen else 0
            self._seen.add(group)
        base = (self._number << 52) + (self._conversations << 20)
        return _Turn(at, base, adapter, group, next(self._tenants), section.prefix, known)

    def _call(self, turn: _Turn, due: list[_Turn]) -> Call:
        """Its request; the conversation's next one, if there is one, is put into `due`."""
        section, size = self._section, self._size
        output = min(next(self._outputs), self._context - 1)
        prompt = min(turn.length + next(self._added), self._context - output)
        length = prompt + output
        if section.turns > 1 and length < self._context and next(self._dice) < 1 - 1 / section.turns:
            known = prompt // size * size
            at = turn.at + next(self._pauses)
            later = _Turn(at, turn.first, turn.adapter, turn.group, turn.tenant, length, known)
            heapq.heappush(due, later)
        shareable = min(turn.known, prompt - 1) // size * size
        hashes = self._hashes(turn, prompt // size)
        tenant = self._names[turn.tenant]
        model = section.adapter(turn.adapter) if turn.adapter >= 0 else ""
        return Call(
            turn.at, self._number, tenant, prompt, output, hashes, shareable, section.max_tokens, model
        )

    def _hashes(self, turn: _Turn, blocks: int) -> tuple[int, ...]:
        shared = self._prefix(turn.group)[:blocks]
        return shared + tuple(range(turn.first + len(shared), turn.first + blocks))

    def _prefix(self, group: int) -> tuple[int, ...]:
        if group < 0:
            return ()
        if group not in self._shared:
            first = (self._number << 52) + (1 << 51) + (group << 20)
            self._shared[group] = tuple(range(first, first + self._section.prefix // self._size))
        return self._shared[group]

    def _zipf(self, count: int, exponent: float, draws: int) -> list[int]:
        weights = 1 / np.arange(1, count + 1) ** exponent
        shares = np.cumsum(weights / weights.sum())
        found = np.searchsorted(shares, self._rng.random(draws), side="right")
        return [int(n) for n in np.minimum(found, count - 1)]

    def _lengths(self, section: LengthsSection, draws: int) -> list[int]:
        middle = math.log(section.mean) - section.sigma**2 / 2
        drawn = np.rint(self._rng.lognormal(middle, section.sigma, draws))
        return [int(n) for n in np.clip(drawn, 1, section.most)]


def _repeat(draw: Callable[[int], list[T]]) -> Iterator[T]:
    while True:
        yield from draw(_CHUNK)
