"""Hands each request to one worker, as late as that worker's credit asks for it. Pure.

A request that comes is scored against every worker. If the best one has credit, it goes there; else it takes
a place in that worker's lane, and is scored again when its turn comes. Places bind nobody: a worker that
leaves or drains strands nothing, and one that has credit which nobody in its own lane can use takes from
the longest lanes what it would begin sooner, and whatever it can from those of workers that are silent or
have no room. So none idles beside others' queues, but for as long as waiting for a cached prefix costs less
than computing it anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from broker.messages import ServiceClass
from kvstate.index import PrefixIndex
from kvstate.prefix import BLOCK_TOKENS
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.deadlines import Deadlines
from scheduler.dispatch.explain import Explanations, explanation
from scheduler.dispatch.fair import Shares
from scheduler.dispatch.fleet import Fleet
from scheduler.dispatch.lanes import RANKS, Lanes, Waiting
from scheduler.dispatch.places import Places
from scheduler.dispatch.preemption import Preemption
from scheduler.dispatch.running import Running, Sent
from scheduler.dispatch.score import Scorer, View
from scheduler.dispatch.ttft import Predictor
from scheduler.dispatch.types import Decision, Explanation, Item, Pool, Send, Shed, WorkerState

MOVES = 8
"""Requests that change lanes or are refused before a worker with credit is left for the next call."""

FILLS = 8
"""Requests of each class that are looked at to use the room that another one waits for."""

KEPT_FOR = 0.05
"""Seconds until it is looked again how many workers those who go first need."""

TOO_LATE = "its first token would come after its deadline"

MOST_URGENT = next(iter(ServiceClass))

UNKNOWN_BLOCKS = 4096
"""Prefix blocks that a worker is taken to cache where it does not tell its KV room."""


class Dispatcher:
    """Of one base. Follow every call that brings news by `decide`, with the same or a later `now`."""

    def __init__(self, base: str, config: DispatchConfig) -> None:
        self._config = config
        self._shares = [Shares(config.memory, config.burst) for _ in ServiceClass]
        self._fleet = Fleet(base, config)
        self._lanes = Lanes(self._shares, [config.quanta[each] for each in ServiceClass])
        self._index = PrefixIndex()
        self._predictor = Predictor(config.step)
        self._scorer = Scorer(config, self._fleet, self._lanes, self._index, self._predictor)
        self._running = Running(config)
        self._places = Places(config, self._fleet, self._lanes, self._scorer)
        self._queue: dict[int, Waiting] = {}
        self._deadlines = Deadlines(self._queue, self._scorer)
        self._preemption = Preemption(config, self._fleet, self._lanes, self._running)
        self._explained = Explanations(config.explained)
        self._dirty: dict[int, None] = {}  # slots to be served, in order
        self._new: dict[int, Waiting] = {}  # they came since the last `decide`, and have no place
        self._refused: list[Decision] = []
        self._kept_at = -math.inf

    # What happens

    def arrive(self, item: Item, now: float) -> None:
        """It is queued. One of the same key is replaced, wherever it is."""
        self.cancel(item.key)
        self.returned(item.key, now)
        if item.done_tokens:
            item = replace(item, deadline=math.inf)  # its first token was in time, or late already
        shares = self._shares[RANKS[item.service_class]]
        shares.enter(item.tenant, item.weight, item.context, now)
        waiting = Waiting(item, RANKS[item.service_class], tuned=item.model != self._fleet.base)
        waiting.over = shares.over(item.tenant, now)
        if self._fleet.note_arrival(waiting.row, now):
            self._kept_at = -math.inf
        self._queue[item.key] = self._new[item.key] = waiting

    def cancel(self, key: int) -> bool:
        """Drop it from the queue. False: it is not there."""
        waiting = self._queue.get(key)
        if waiting is None:
            return False
        if self._new.pop(key, None) is None:
            self._places.lift(waiting)
        self._leave(waiting)
        return True

    def state(self, state: WorkerState, now: float) -> None:
        """A worker told how it is. News older than the last is ignored."""
        try:
            slot = self._index.slot(state.worker)
        except KeyError:
            slot = self._join(state)
        was_serving = bool(self._fleet.serving[slot])
        if slot in self._fleet:
            before = self._fleet[slot]
            if state.seen < before.seen:
                return
            self._changed(slot, before, state)
        self._fleet.state(slot, state)
        if was_serving and not state.serving:
            self._places.strand(self._lanes.leave(slot))
        self._running.state(slot, state, self._fleet.unseen(slot))
        self._touch(slot)

    def lose(self, worker: str) -> None:
        """It is gone. What it had comes back by `arrive`; who waited for it waits for others."""
        try:
            slot = self._index.slot(worker)
        except KeyError:
            return
        self._places.strand(self._lanes.leave(slot))
        self._index.leave(worker)
        self._running.leave(slot)
        self._fleet.leave(slot)
        self._dirty.pop(slot, None)
        self._preemption.leave(slot)

    def first(self, key: int, now: float, cached_tokens: int | None) -> None:
        """Its first token has come. `cached_tokens`: of its prompt, as the engine counts; None = untold."""
        sent = self._running.get(key)
        if sent is None or sent.first is not None:
            return
        sent.first = now
        self._predictor.erred(now - sent.at - sent.predicted)
        cached = self._running.estimated(cached_tokens) if cached_tokens is not None else float(sent.hit)
        self._predictor.first(sent.slot, max(1.0, sent.tokens + sent.hit - cached), now - sent.at)
        if cached_tokens is not None:
            self._confirm(sent, cached / BLOCK_TOKENS, 0, now)

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int | None, output_tokens: int
    ) -> None:
        """It has ended, with these counts of the engine; 0 and None where it told none."""
        sent = self._forget(key)
        if sent is None:
            return
        item = sent.item
        self._running.learn(sent, output_tokens, now, prompt_tokens)
        self._shares[RANKS[item.service_class]].charge(item.tenant, 2.0 * output_tokens, now)
        self._predictor.ended(sent.slot, now - sent.at, self._fleet[sent.slot].slots_total)
        if cached_tokens is not None and prompt_tokens:
            blocks = cached_tokens / prompt_tokens * item.context / BLOCK_TOKENS
            self._confirm(sent, blocks, output_tokens // BLOCK_TOKENS, now)
        self._touch(sent.slot)

    def returned(self, key: int, now: float) -> None:
        """Its worker gave it back; it comes again by `arrive`. Unasked: it has less room than it said."""
        asked = self._preemption.asked(key)
        sent = self._forget(key)
        if sent is not None and not asked:
            self._fleet.distrust(sent.slot)

    def stays(self, key: int) -> None:
        """Its worker can't give it back: it is not to be taken back again."""
        sent = self._running.get(key)
        if sent is not None:
            sent.stays = True
            self._explained.stays(key)
            self._preemption.back(sent.slot, key)

    def told(self, worker: str) -> int:
        """Number of the last change of its engine's cache that is known; 0 = it tells none."""
        return self._index.told(worker)

    def cache(
        self, worker: str, number: int, taken: Sequence[int], evicted: Sequence[int], now: float
    ) -> None:
        """Its engine has taken prefix blocks into its cache and evicted others: the change of that number."""
        self._index.change(worker, number, taken, evicted, now)

    def caches(self, worker: str, number: int, blocks: Sequence[int], now: float) -> None:
        """These are all that its engine caches, as of that change. Number 0: it tells nothing any more."""
        self._index.reset(worker, number, blocks, now)

    def served(self, now: float) -> dict[str, dict[str, float]]:
        """Tokens that each tenant was served for its weight, by class: for a successor's `resume`."""
        return {each.value: self._shares[rank].served(now) for each, rank in RANKS.items()}

    def resume(self, served: Mapping[str, Mapping[str, float]], at: float, now: float) -> None:
        """Go on from what another one had `served` at `at`; before any request has come here."""
        for each, rank in RANKS.items():
            self._shares[rank].resume(served.get(each.value, {}), self._config.weights, at, now)

    # What shall happen

    def decide(self, now: float) -> list[Decision]:
        """All that is to be done now."""
        out: list[Decision] = []
        if now >= self._kept_at + KEPT_FOR:
            self._keep(now)
        if self._new:
            self._receive(now, out)
        if self._deadlines.due() <= now:
            self._ring(now)
        if self._places.stranded():
            self._dirty |= dict.fromkeys(self._places.put_stranded(now))
        again: dict[int, None] = {}
        while self._dirty:
            slot = next(iter(self._dirty))
            del self._dirty[slot]
            if not self._serve(slot, now, out):
                again[slot] = None
        self._dirty = again
        for preempt in self._preemption.take_back(now):
            self._explained.take_back(preempt)
            out.append(preempt)
        out += self._refused
        self._refused = []
        return out

    def next_due(self, now: float) -> float:
        """When `decide` has something to do even if nothing happens before; inf = never."""
        if self._dirty or self._new or self._refused or self._places.stranded():
            return now
        return max(now, min(self._deadlines.due(), self._preemption.due()))

    # Questions

    def queued(self) -> int:
        return len(self._queue)

    def error_p90(self) -> float:
        """Seconds by which predicted times from sending to the first token were off, nine of ten at most."""
        return self._predictor.error_p90()

    def saturation(self) -> float:
        """Mean over workers of how full each is: 1 = five requests wait for it, or one, and 80 % of its KV is
        used."""
        slots = np.flatnonzero(self._fleet.serving)
        if not len(slots):
            return 1.0 if self._queue else 0.0
        waiting = self._lanes.counts[-1][slots]
        kv_used = np.where(waiting > 0, self._fleet.kv_used[slots] / 0.8, 0.0)
        return float(np.maximum(waiting / 5, kv_used).mean())

    def pools(self) -> list[Pool]:
        """The workers of each class, those of several once. A class that has none is left out."""
        tokens, seconds = self._fleet.step_tokens, self._predictor.step(self._fleet.step_tokens)
        classes: dict[bytes, list[ServiceClass]] = {}
        for each in ServiceClass:
            classes.setdefault(self._fleet.eligible(each, self._fleet.base).tobytes(), []).append(each)
        found = []
        for of in classes.values():
            mask = self._fleet.eligible(of[0], self._fleet.base)
            if mask.any():
                figures = int(mask.sum()), int(tokens[mask].max()), float(seconds[mask].max())
                found.append(Pool(tuple(of), *figures))
        return found

    def explain(self, key: int, now: float) -> Explanation | None:
        """Of one that waits, or was decided on lately; None = not known."""
        waiting = self._queue.get(key)
        if waiting is None:
            told = self._explained.get(key)
        else:
            self._places.compare(waiting, self._scorer.view(waiting, now))
            worker = self._fleet[waiting.slot].worker if waiting.slot >= 0 else ""
            why = f"it waits for {worker}" if worker else "no worker is there that could run it"
            queued = now - waiting.item.arrived
            told = explanation(waiting, "queued", worker, queued, waiting.least, why)
        if told is None:
            return None
        told = replace(told, taken_back=self._explained.taken_back(key))
        for pool in self.pools():
            if told.service_class in pool.classes:
                return replace(told, step_tokens=pool.step_tokens, step_s=pool.step_s)
        return told

    # Serving

    def _receive(self, now: float, out: list[Decision]) -> None:
        """Give those that have come their places, or send the only one at once. Of several, turns decide."""
        new = list(self._new.values())
        self._new.clear()
        for waiting in new:
            view = self._scorer.view(waiting, now)
            if self._is_shed(waiting, view, now):
                continue
            if len(new) == 1 and self._sent_at_once(waiting, view, now, out):
                continue
            self._put(waiting, view, now)
            self._deadlines.watch(waiting, now)

    def _keep(self, now: float) -> None:
        """Keep as many workers as those who go first need; the others are for whoever comes."""
        fleet, slots = self._fleet, np.flatnonzero(self._fleet.serving)
        if len(slots):
            vectors = self._predictor.rate, fleet.slots, fleet.kv_total
            rate, places, room = (float(np.median(each[slots])) for each in vectors)  # one may tell anything
            fleet.keep(self._running.reserve.needs(rate, places, room, now), now)
        self._kept_at = now

    def _serve(self, slot: int, now: float, out: list[Decision]) -> bool:
        """Send the worker what it takes. False: there is more to do for it."""
        skipped: set[int] = set()  # rows of the lanes
        left, known, tuned = MOVES, False, False
        while True:
            if not known:
                known, tuned = True, self._lanes.tuned > 0
                skipped |= self._fleet.full_rows(slot, now, tuned=tuned)
            if all(2 * rank in skipped for rank in self._lanes.ranks()):
                return True
            if not left:
                return False
            waiting = self._lanes.next(slot, skipped, now) or self._places.steal(slot, skipped, now)
            if waiting is None:
                return True
            item = waiting.item
            over = self._lanes.over(waiting, now)
            if tuned and not self._fleet.takes(slot, item.service_class, over, now, item.model):
                skipped.update(range(2 * waiting.rank + over, 2 * waiting.rank + 2))
                continue
            if waiting.version != self._fleet.version:
                view = self._scorer.view(waiting, now)
                if self._moved(waiting, view, now):
                    left -= 1
                    continue
                self._places.compare(waiting, view)
            predicted = self._predictor.after(slot, float(self._fleet.pending[slot]) + waiting.cost)
            if now + predicted > item.deadline:
                self._give_up(waiting, now)
                left -= 1
            elif self._running.fits(slot, item, self._fleet.fills_as(slot, item.service_class, over), now):
                self._send_next(waiting, over, now, predicted, out)
                known = False
            else:
                self._fill_in(waiting, over, now, out)
                self._no_room(waiting, now)
                known = False
                if self._moved(waiting, self._scorer.view(waiting, now), now):
                    left -= 1
                    continue
                skipped |= {2 * waiting.rank, 2 * waiting.rank + 1}

    def _moved(self, waiting: Waiting, view: View, now: float) -> bool:
        """Whether another worker is better for it now, to whose lane it goes."""
        if view.best == waiting.slot:
            return False
        self._places.lift(waiting)
        self._put(waiting, view, now)
        return True

    def _no_room(self, waiting: Waiting, now: float) -> None:
        """Its worker's KV room has none for it. What falls free is kept for it, else those less urgent would
        take it piece by piece, for ever; unless it is its class that has enough."""
        rank, slot = waiting.rank, waiting.slot
        below = rank + 1 if self._running.fits(slot, waiting.item, MOST_URGENT, now) else len(RANKS)
        self._fleet.cram(slot, slice(rank, below))

    def _fill_in(self, before: Waiting, over: bool, now: float, out: list[Decision]) -> None:
        """What falls free for `before` lies idle until it is enough. Those of its lane may use it who will be
        gone by then, as far as is known (EASY backfilling): they have no more tokens in all than it has."""
        slot, fleet, running = before.slot, self._fleet, self._running
        until = running.until(slot, before.item, fleet.fills_as(slot, before.item.service_class, over))
        for rank in range(before.rank, len(RANKS)):
            for waiting, _ in list(self._lanes.walk(slot, rank, FILLS)):
                item = waiting.item
                over = self._lanes.over(waiting, now)
                if not (
                    before.passed + item.context <= before.item.context
                    and running.gone_by(item, until)
                    and fleet.takes(slot, item.service_class, over, now, item.model)
                    and running.fits(slot, item, fleet.fills_as(slot, item.service_class, over), now)
                ):
                    continue
                predicted = self._predictor.after(slot, float(fleet.pending[slot]) + waiting.cost)
                if now + predicted <= item.deadline:
                    before.passed += item.context
                    self._send_next(waiting, over, now, predicted, out)

    def _sent_at_once(self, waiting: Waiting, view: View, now: float, out: list[Decision]) -> bool:
        """Send one that has just come to the best worker for it, where that takes it and nobody waits."""
        slot, item, fleet = view.best, waiting.item, self._fleet
        if slot < 0 or self._lanes.counts[-1, slot] or self._places.stranded():
            return False
        if not fleet.takes(slot, item.service_class, waiting.over, now, item.model):
            return False
        rights = fleet.fills_as(slot, item.service_class, waiting.over)
        if not self._running.fits(slot, item, rights, now):
            return False
        waiting.cost, waiting.placed = view.uncached.item(slot), now
        predicted = self._predictor.after(slot, fleet.pending.item(slot) + waiting.cost)
        self._places.compare(waiting, view)
        self._send(waiting, slot, waiting.over, now, predicted, out)
        self._touch(slot)
        return True

    def _send_next(
        self, waiting: Waiting, over: bool, now: float, predicted: float, out: list[Decision]
    ) -> None:
        """It is sent to the worker in whose lane it is."""
        slot = waiting.slot
        if waiting.ahead > self._fleet.step_tokens[slot]:
            self._predictor.sent(slot, waiting.rank, waiting.ahead, now - waiting.placed)
        self._lanes.charge(slot, waiting)
        self._places.lift(waiting)
        self._send(waiting, slot, over, now, predicted, out)

    def _send(
        self, waiting: Waiting, slot: int, over: bool, now: float, predicted: float, out: list[Decision]
    ) -> None:
        item = waiting.item
        worker = self._fleet[slot].worker
        tokens = self._fleet.pending.item(slot) + waiting.cost
        hit = max(0, round(item.context - waiting.cost))
        self._leave(waiting)
        self._shares[waiting.rank].charge(item.tenant, waiting.cost, now)
        self._index.predict(worker, item.hashes, now)
        self._fleet.sent(slot, item.model, waiting.cost)
        row = 2 * waiting.rank + over
        self._running.add(Sent(item, slot, now, tokens, predicted, hit, row))
        queue = now - item.arrived
        why = "the best of those that could take it" if waiting.ahead == 0.0 else "its turn in the lane"
        out.append(Send(item.key, worker, queue, predicted, hit, why))
        self._explained.keep(waiting, "sent", worker, queue, predicted, why)

    # Refusing

    def _is_shed(self, waiting: Waiting, view: View, now: float) -> bool:
        """Refuse it at once if no worker can make it, or where its class gives way as the fleet fills up."""
        wait = self._deadlines.refuses(waiting, view, now)
        if wait is not None:
            self._shed(waiting, now, wait, TOO_LATE)
            return True
        item = waiting.item
        if view.best < 0 or item.done_tokens or item.service_class not in self._config.sheddable:
            return False  # an answer that has begun is worth its end
        # The golden ratio spreads consecutive keys evenly over (0, 1), alike on every run.
        if (item.key * 0.6180339887498949) % 1.0 >= self.saturation() ** 5:
            return False
        wait = float(self._scorer.ttft(view)[view.best])
        self._shed(waiting, now, wait, "the fleet is full, and its class gives way")
        return True

    def _give_up(self, waiting: Waiting, now: float) -> None:
        """It has waited in vain. It is told how long it would take if it came again."""
        self._places.lift(waiting)
        wait = self._deadlines.wait(waiting, self._scorer.view(waiting, now))
        self._shed(waiting, now, wait, TOO_LATE)

    def _shed(self, waiting: Waiting, now: float, wait: float, why: str) -> None:
        self._leave(waiting)
        self._refused.append(Shed(waiting.item.key, wait, why))
        self._explained.keep(waiting, "shed", "", now - waiting.item.arrived, wait, why)

    def _ring(self, now: float) -> None:
        for waiting, late in self._deadlines.ring(now):
            if late:
                self._give_up(waiting, now)
            else:
                self._lanes.hurry(waiting)
                self._dirty[waiting.slot] = None

    # Keeping the books

    def _leave(self, waiting: Waiting) -> None:
        """It is queued no more, and has no place."""
        item = waiting.item
        del self._queue[item.key]
        self._shares[waiting.rank].leave(item.tenant, item.context)

    def _put(self, waiting: Waiting, view: View, now: float) -> None:
        if self._places.put(waiting, view, now):
            self._dirty[waiting.slot] = None

    def _touch(self, slot: int) -> None:
        """The worker may have room: somebody may wait for it, here or in another's lane."""
        if len(self._lanes):
            self._dirty[slot] = None

    def _join(self, state: WorkerState) -> int:
        slot = self._index.join(state.worker, _blocks(state))
        self._fleet.join(slot)
        self._lanes.join(slot)
        self._predictor.join(slot, state.step_tokens)
        self._running.join(slot)
        return slot

    def _changed(self, slot: int, before: WorkerState, state: WorkerState) -> None:
        """Its engine is another than it was thought to be."""
        if state.kv_total != before.kv_total:
            self._index.resize(state.worker, _blocks(state))
        if state.step_tokens != before.step_tokens:
            self._predictor.join(slot, state.step_tokens)

    def _forget(self, key: int) -> Sent | None:
        """A worker has it no more."""
        sent = self._running.pop(key)
        if sent is not None:
            self._preemption.back(sent.slot, key)
        return sent

    def _confirm(self, sent: Sent, cached_blocks: float, tail: int, now: float) -> None:
        """The engine's count corrects the index, the first time that it is told; then all of it is there."""
        item = sent.item
        blocks = len(item.hashes) if sent.confirmed else round(cached_blocks)
        tail += max(0, item.context // BLOCK_TOKENS - len(item.hashes)) if not sent.confirmed else 0
        sent.confirmed = True
        self._index.confirm(self._fleet[sent.slot].worker, item.hashes, blocks, now, sent.at, tail)


def _blocks(state: WorkerState) -> int:
    """Prefix blocks that it caches."""
    return state.kv_total // BLOCK_TOKENS if state.kv_total else UNKNOWN_BLOCKS
