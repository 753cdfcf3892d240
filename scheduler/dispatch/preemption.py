"""Batch requests are taken back where one with a budget has waited for its room too long. Pure."""

from __future__ import annotations

import math

from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.fleet import Fleet
from scheduler.dispatch.lanes import RANKS, Lanes, Waiting
from scheduler.dispatch.running import Running
from scheduler.dispatch.types import Preempt

STEPS = 8
"""What a worker has not computed of its prompts is long when it fills so many steps."""


class Preemption:
    """One at a time from a worker, for whose turn it is there once half his budget is gone."""

    def __init__(self, config: DispatchConfig, fleet: Fleet, lanes: Lanes, running: Running) -> None:
        self._config = config
        self._fleet = fleet
        self._lanes = lanes
        self._running = running
        self._interval = min(config.budget.values(), default=math.inf) / 8
        self._due = -math.inf
        self._taking: dict[int, int] = {}  # by slot: the request that is on its way back

    def due(self) -> float:
        """When to `take_back` again; inf = never, as things are."""
        return self._due if self._running.with_batch and len(self._lanes) else math.inf

    def take_back(self, now: float) -> list[Preempt]:
        if now < self._due or now < self.due():
            return []
        self._due = now + self._interval
        found = []
        for slot in self._running.with_batch:
            waiting = self._waits_long(slot, now)
            if waiting is not None and (preempt := self._for(waiting)) is not None:
                found.append(preempt)
        return found

    def asked(self, key: int) -> bool:
        """Whether it is on its way back because of this."""
        return key in self._taking.values()

    def back(self, slot: int, key: int) -> None:
        """The worker has it no more."""
        if self._taking.get(slot) == key:
            del self._taking[slot]

    def leave(self, slot: int) -> None:
        self._taking.pop(slot, None)

    def _waits_long(self, slot: int, now: float) -> Waiting | None:
        if slot in self._taking or self._fleet.seen[slot] < now - self._config.stale_after:
            return None
        for service_class, budget in self._config.budget.items():
            waiting = self._lanes.first(slot, RANKS[service_class], now)
            if waiting is not None and now >= waiting.item.arrived + budget / 2:
                return waiting
        return None

    def _for(self, waiting: Waiting) -> Preempt | None:
        slot = waiting.slot
        fleet = self._fleet
        no_slot = not fleet.has_slot(slot, waiting.item.service_class)
        if no_slot or fleet.full[waiting.rank, slot]:
            victim = self._running.victim(slot, waiting.item, no_slot)
        elif fleet.pending[slot] > STEPS * fleet.step_tokens[slot]:
            victim = self._running.longest_prompt(slot)
        else:
            return None
        if victim is None:
            return None
        self._taking[slot] = victim.item.key
        why = f"request {waiting.item.key}, {waiting.item.service_class}, needs its room"
        return Preempt(victim.item.key, self._fleet[slot].worker, why)
