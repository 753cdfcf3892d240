"""The workers as vectors over their slots: what they said last, and what was sent to them since. Pure."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.lanes import RANKS, ROWS
from scheduler.dispatch.types import WorkerState

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]

_NUMBERS = ("seen", "step_tokens", "slots", "pending", "load", "short", "kv_total", "kv_used")
_FLAGS = ("lives", "serving", "room")


LEAST = 1.25
"""So many times the workers that others fill must be theirs, for any to be closed to who comes after."""


class Fleet:
    """A slot without a worker, or whose worker drains, is never eligible.

    Attributes:
        base: the model that all of them run.
        version: grows with every change that could make another worker the best for a request.
        homes: grows with every change of who may run what.
        pending: prompt tokens that the worker holds and has not computed, those sent since included.
        load: requests that it holds, those sent since included.
        short: slots that must fall free before it runs one more; negative where more than one is free.
        kv_used: share of its KV room that is taken.
        full: by class: its KV room had none for the first request, or is kept for a more urgent one.
        crammed: slots of those that are full for any class.
    """

    def __init__(self, base: str, config: DispatchConfig) -> None:
        self.base = base
        self._config = config
        # By row of the lanes: steps, and share of the slots, that it may fill.
        self._limits: list[tuple[float, float]] = []
        for each in RANKS:
            theta, slots = config.theta[each], config.slots[each]
            self._limits += (theta, slots), (min(theta, config.theta_over), min(slots, config.slots_over))
        self.version = 0
        self.homes = 0
        self.seen: Vector = np.zeros(0)
        self.step_tokens: Vector = np.zeros(0)
        self.slots: Vector = np.zeros(0)
        self.pending: Vector = np.zeros(0)
        self.load: Vector = np.zeros(0)
        self.short: Vector = np.zeros(0)
        self.kv_total: Vector = np.zeros(0)
        self.kv_used: Vector = np.zeros(0)
        self.lives: Mask = np.zeros(0, bool)
        self.serving: Mask = np.zeros(0, bool)
        self.room: Mask = np.zeros(0, bool)
        self.crammed: set[int] = set()
        self.full: Mask = np.zeros((ROWS // 2, 0), bool)
        self._said: dict[int, WorkerState] = {}
        self._sends: dict[int, int] = {}
        self._since: dict[
            int, deque[tuple[int, float, str]]
        ] = {}  # not in its figures: number, tokens, loads
        self._holders: dict[str, Mask] = {}  # of an adapter that anybody has
        self._nobody: Mask = np.zeros(0, bool)
        self._pools: dict[ServiceClass, Mask] = {}  # workers of a class; made when asked for
        self._barred: dict[ServiceClass, Vector] = {}  # from the base, by class; made when asked for
        self._has_room: dict[ServiceClass, bool] = {}  # for an adapter; made when asked for
        self._came = np.full(ROWS, -math.inf)  # by row of the lanes
        self._kept = [0] * ROWS  # on workers in slots below this some room is kept for those before the row,
        self._closed = [0] * ROWS  # and below this all, while they have anything to do

    def __getitem__(self, slot: int) -> WorkerState:
        return self._said[slot]

    def __contains__(self, slot: int) -> bool:
        return slot in self._said

    # What changes it

    def join(self, slot: int) -> None:
        more = slot + 1 - len(self.seen)
        if more > 0:
            for name in _NUMBERS:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more)]))
            for name in _FLAGS:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, bool)]))
            self.full = np.hstack([self.full, np.zeros((len(self.full), more), bool)])
            self._nobody = np.zeros(len(self.seen), bool)
            for model, mask in self._holders.items():
                self._holders[model] = np.concatenate([mask, np.zeros(more, bool)])
        self._sends[slot], self._since[slot] = 0, deque()
        self.lives[slot] = True

    def leave(self, slot: int) -> None:
        del self._sends[slot], self._since[slot], self._said[slot]
        self.lives[slot] = self.serving[slot] = False
        for model in list(self._holders):
            self._hold(slot, model, False)
        self._uncram(slot)
        self._regroup()
        self.version += 1

    def state(self, slot: int, state: WorkerState) -> None:
        """The worker in `slot` said so."""
        before = self._said.get(slot)
        self._said[slot] = state
        if before is None or (before.step_tokens, before.serving) != (state.step_tokens, state.serving):
            self._regroup()
        if before is None or before.adapters != state.adapters:
            for model in (before.adapters if before else frozenset()) | state.adapters:
                self._hold(slot, model, model in state.adapters)
        since = self._since[slot]
        while since and since[0][0] <= state.sends:
            _, _, loads = since.popleft()
            if loads and loads not in state.adapters:
                self._hold(slot, loads, False)
        self.seen[slot], self.step_tokens[slot] = state.seen, state.step_tokens
        self.slots[slot], self.serving[slot] = state.slots_total, state.serving
        pending, room = float(state.prefill_held), state.adapter_room
        for _, tokens, loads in since:
            pending += tokens
            room = room and not loads
        self.pending[slot] = pending
        self.load[slot] = load = state.running + len(since)
        self.short[slot] = load + 1 - state.slots_total
        self.kv_total[slot] = state.kv_total
        self.kv_used[slot] = 1.0 - state.kv_free / state.kv_total if state.kv_total else 0.0
        if room != self.room[slot]:
            self.room[slot] = room
            self._moved()
        self._uncram(slot)
        self.version += 1

    def note_arrival(self, row: int, now: float) -> bool:
        """A request of the row (`lanes.ROWS`) joined the queue; whether it is the first for long."""
        first = bool(self._came[row] < now - self._config.memory)
        self._came[row] = now
        return first

    def keep(self, needs: Vector, now: float) -> None:
        """Of each class's workers the first are kept for those who go before a row, by what these fill.

        `reserve` times as many are closed to the row, but not all, and on one more it has its limits. Where
        hardly any would be left, it has its limits on each; where nobody of those came lately, on none.

        Args:
            needs: by row, how many workers they fill.
        """
        fills, lately = np.diff(needs), self._came >= now - self._config.memory
        able = self.fresh(now) & (self.slots > 0)
        pools = [self._pool(service_class) for service_class in RANKS]
        floor = 0
        for row in range(ROWS):
            pool = pools[row // 2]
            before = [each for each in range(row) if (pools[each // 2] & pool).any()]
            slots = np.flatnonzero(pool & able).tolist()
            if not slots or not any(lately[each] for each in before):
                self._closed[row] = self._kept[row] = 0
                continue
            need, last = sum(fills[each] for each in before), len(slots) - 1
            closed = round(self._config.reserve * need)
            if closed > last < LEAST * need:
                closed, kept = 0, len(self.seen)
            else:
                closed = max(0, min(closed, last))
                kept = [*slots, len(self.seen)][closed + 1]
            # What is closed to those before it is not open to it, but for one.
            floor = max(slots[closed] if closed else 0, min(floor, slots[-1]))
            self._closed[row], self._kept[row] = floor, max(kept, floor)

    def distrust(self, slot: int) -> None:
        """What the worker in `slot` said was not so: it is given nothing until it says anew."""
        self.seen[slot] = -math.inf
        self.version += 1

    def sent(self, slot: int, model: str, tokens: float) -> None:
        """A request of `model` was sent there that would compute `tokens`."""
        loads = model != self.base and not self._held(model)[slot]
        self._sends[slot] += 1
        self._since[slot].append((self._sends[slot], tokens, model if loads else ""))
        self.pending[slot] += tokens
        self.load[slot] += 1
        self.short[slot] += 1
        if loads:
            self._hold(slot, model, True)
            self.room[slot] = False  # until it says that one more could run
            self._moved()
        self.version += 1

    def cram(self, slot: int, ranks: slice) -> None:
        """Its KV room has none for these classes, until it says anew."""
        self.full[ranks, slot] = True
        self.crammed.add(slot)

    # Questions

    def unseen(self, slot: int) -> int:
        """Sends to it that its figures do not include."""
        return len(self._since[slot])

    def eligible(self, service_class: ServiceClass, model: str) -> Mask:
        """Who may run it at all, now or later."""
        mask = self._pool(service_class)
        return mask if model == self.base else mask & (self._held(model) | self.room)

    def barred(self, service_class: ServiceClass, model: str) -> Vector:
        """What to add to figures of which the lowest counts: inf for who may not run it, else 0."""
        if model != self.base:
            return np.where(self.eligible(service_class, model), 0.0, np.inf)
        barred = self._barred.get(service_class)
        if barred is None:
            barred = self._barred[service_class] = np.where(self._pool(service_class), 0.0, np.inf)
        return barred

    def closed(self, service_class: ServiceClass, over: bool, model: str | None = None) -> int:
        """Workers in slots below this are kept for others: closed to it while they have anything to do. None
        is to an adapter's, which may find no place elsewhere. `model`: None is the base."""
        return self._closed[2 * RANKS[service_class] + over] if model in (None, self.base) else 0

    def runs(self, service_class: ServiceClass, model: str) -> bool:
        """Whether anybody may run it at all."""
        pool, held = self._pool(service_class), self._holders.get(model)
        if model == self.base:
            return bool(pool.any())
        has_room = self._has_room.get(service_class)
        if has_room is None:
            has_room = self._has_room[service_class] = bool((pool & self.room).any())
        return has_room or (held is not None and bool((pool & held).any()))

    def loaded(self, model: str) -> Mask | None:
        """Who has the adapter; None = everybody, it is the base."""
        return None if model == self.base else self._held(model)

    def fresh(self, now: float) -> Mask:
        """Whose figures are not too old to act on."""
        mask: Mask = self.seen >= now - self._config.stale_after
        return mask

    def is_fresh(self, slot: int, now: float) -> bool:
        """Whether its figures are not."""
        return bool(self.seen[slot] >= now - self._config.stale_after)

    def takes(self, slot: int, service_class: ServiceClass, over: bool, now: float, model: str) -> bool:
        """Whether it takes one more of the class and model now. `over`: of a tenant above its share."""
        row, tuned = 2 * RANKS[service_class] + over, model != self.base
        return self._ready(slot, now) and self._adds(slot, row, tuned)

    def full_rows(self, slot: int, now: float, *, tuned: bool = False) -> set[int]:
        """Rows of the lanes of which it takes none now. `tuned`: of those that ask for an adapter, to which
        nobody is closed."""
        if not self._ready(slot, now):
            return set(range(ROWS))
        return {row for row in range(ROWS) if not self._adds(slot, row, tuned)}

    def has_slot(self, slot: int, service_class: ServiceClass) -> bool:
        """Whether one is free there for one more of the class, of a tenant within its share."""
        _, share = self._limit(slot, 2 * RANKS[service_class])
        return self.load.item(slot) < share * self.slots.item(slot)

    def hopeless(self, slot: int, service_class: ServiceClass, over: bool, now: float) -> bool:
        """Whether nobody knows when it will take one of the class: it tells nothing, or has no room."""
        row = 2 * RANKS[service_class] + over
        _, share = self._limit(slot, row)
        return not (self.is_fresh(slot, now) and self._has_place(slot, row, share, tuned=False))

    def fills_as(self, slot: int, service_class: ServiceClass, over: bool) -> ServiceClass:
        """The class as which it may fill the worker: the most urgent, where no room is kept for others. Such
        room would lie idle where nobody wants it."""
        kept = slot < self._kept[2 * RANKS[service_class] + over]
        return service_class if kept else ServiceClass.INTERACTIVE

    def _ready(self, slot: int, now: float) -> bool:
        return self.serving.item(slot) and self.is_fresh(slot, now)

    def _adds(self, slot: int, row: int, tuned: bool) -> bool:
        """Whether it has room for one more of the row now."""
        theta, share = self._limit(slot, row)
        computes = self.pending.item(slot) < theta * self.step_tokens.item(slot)
        return computes and self._has_place(slot, row, share, tuned)

    def _has_place(self, slot: int, row: int, share: float, tuned: bool) -> bool:
        """Whether it has room for one more of the row, once its steps have. `share`: of its slots."""
        load = self.load.item(slot)
        return not (
            load >= share * self.slots.item(slot)
            or (slot < self._closed[row] and load and not tuned)
            or (slot in self.crammed and self.full.item(row // 2, slot))
        )

    def _limit(self, slot: int, row: int) -> tuple[float, float]:
        """Steps, and share of the slots, that the row may fill there."""
        return self._limits[row if slot < self._kept[row] else 0]

    def _pool(self, service_class: ServiceClass) -> Mask:
        mask = self._pools.get(service_class)
        if mask is None:
            mask = self.lives & self.serving
            pool = self._config.pools.get(service_class)
            if pool is not None:
                within = (
                    mask
                    & (self.step_tokens >= pool.least_step_tokens)
                    & (self.step_tokens <= pool.most_step_tokens)
                )
                mask = within if within.any() else mask
            self._pools[service_class] = mask
        return mask

    def _held(self, model: str) -> Mask:
        return self._holders.get(model, self._nobody)

    def _hold(self, slot: int, model: str, holds: bool) -> None:
        mask = self._holders.get(model)
        if mask is None:
            if not holds:
                return
            mask = self._holders[model] = self._nobody.copy()
        if mask[slot] != holds:
            mask[slot] = holds
            self._moved()
        if not mask.any():
            del self._holders[model]

    def _uncram(self, slot: int) -> None:
        if slot in self.crammed:
            self.full[:, slot] = False
            self.crammed.remove(slot)

    def _regroup(self) -> None:
        self._pools.clear()
        self._barred.clear()
        self._closed = [0] * ROWS  # until it is known who is left
        self._moved()

    def _moved(self) -> None:
        self.homes += 1
        self._has_room.clear()
