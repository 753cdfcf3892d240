"""The timing of a continuous-batching engine, as a pure simulation: no clock, no I/O, no threads.

It schedules as vLLM's V1 scheduler does with `fcfs`: each step spends one token budget, first on the
running sequences in order of admission (a decode token, or the next chunk of a prefill), then on
waiting ones; a sequence that finds no KV block throws back the one admitted last, which frees its
blocks and later computes prompt and output again. Whoever holds the clock calls `begin`, lets
`Step.duration_ms` pass, then calls `finish`.

Only blocks under a hash have an identity; the others are a count. So a step costs time by the
sequences it runs, never by the blocks they hold, and an idle model costs no memory by its size.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from workers.config import SimConfig


def fits(adapter: str, active: set[str], slots: int) -> bool:
    """Whether a sequence may run beside those of the adapters in `active`, which it joins then."""
    if not adapter or adapter in active:
        return True
    if len(active) >= slots:
        return False
    active.add(adapter)
    return True


class IntegrityError(Exception):
    """The accounts of the KV blocks don't balance: a defect of this module."""


def block_hashes(ids: list[int], block_size: int, salt: int = 0) -> tuple[int, ...]:
    """One hash for each full block of `ids`, each chained to the one before it.

    Equal hashes mean equal prefixes up to that block's end. `salt` keeps prefixes apart that must
    not meet.
    """
    chain, hashes = salt, []
    for end in range(block_size, len(ids) + 1, block_size):
        chain = hash((chain, *ids[end - block_size : end]))
        hashes.append(chain)
    return tuple(hashes)


class State(enum.Enum):
    NEW = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()
    ABORTED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence. The caller sets the first four fields, `StepModel` writes all others.

    Attributes:
        prompt_tokens: at least 1.
        max_tokens: output tokens after which it is finished; at least 1.
        hashes: `block_hashes` of the prompt, for the prefix cache; () = never shared.
        adapter: the adapter that it runs with; "" = none.
        generated: output tokens so far.
        computed: tokens whose keys and values lie in blocks.
        cached: prompt tokens that the prefix cache held when it was first admitted; None before.
        held: hashes it holds a reference to, `private`: further blocks it owns alone.
        chunk: tokens the running step computes for it.
    """

    prompt_tokens: int
    max_tokens: int
    hashes: tuple[int, ...] = ()
    adapter: str = ""
    generated: int = 0
    computed: int = 0
    cached: int | None = None
    held: list[int] = field(default_factory=list)
    private: int = 0
    chunk: int = 0
    state: State = State.NEW

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.generated


class BlockPool:
    """KV blocks: each is blank, private to a sequence, referenced under a hash, or idle under one.

    Idle blocks keep their content until they are taken, least recently used first.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.blank = total
        self.refs: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return self.blank + len(self.idle)

    def cached(self, hashes: tuple[int, ...], limit: int) -> list[int]:
        """The longest run of leading `hashes`, at most `limit`, whose blocks are here."""
        hits: list[int] = []
        for key in hashes[:limit]:
            if key not in self.refs and key not in self.idle:
                break
            hits.append(key)
        return hits

    def hold(self, hits: list[int], fresh: int) -> bool:
        """Reference the blocks `hits` and take `fresh` more: all of it, or nothing and False."""
        if fresh + sum(key in self.idle for key in hits) > self.available:
            return False
        for key in hits:
            if key in self.idle:
                del self.idle[key]
                self.refs[key] = 1
            else:
                self.refs[key] += 1
        self.take(fresh)
        return True

    def take(self, count: int) -> None:
        """Give out `count` private blocks; the caller has made sure that they are available."""
        while self.blank < count:
            self.idle.popitem(last=False)
            self.blank += 1
        self.blank -= count

    def publish(self, key: int) -> bool:
        """Put a private block under its hash. False when another holds that content already."""
        if key in self.refs or key in self.idle:
            return False
        self.refs[key] = 1
        return True

    def release(self, held: list[int], private: int) -> None:
        """The last block of a prefix goes first to the idle ones: it is the first to be evicted."""
        self.blank += private
        for key in reversed(held):
            if self.refs[key] > 1:
                self.refs[key] -= 1
            else:
                del self.refs[key]
                self.idle[key] = None

    def check(self, owners: Iterable[Sequence]) -> None:
        """Raises IntegrityError unless every block is accounted for exactly once."""
        refs: dict[int, int] = {}
        private = 0
        for seq in owners:
            private += seq.private
            for key in seq.held:
                refs[key] = refs.get(key, 0) + 1
        if refs != self.refs:
            raise IntegrityError(f"references {self.refs} but sequences hold {refs}")
        if both := self.refs.keys() & self.idle.keys():
            raise IntegrityError(f"blocks both idle and referenced: {both}")
        if self.blank < 0 or self.blank + private + len(refs) + len(self.idle) != self.total:
            raise IntegrityError(
                f"{self.blank} blank + {private} private + {len(refs)} shared + {len(self.idle)} idle"
                f" blocks are not {self.total}"
            )


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """A step that has begun.

    Attributes:
        duration_ms: time it takes.
        batch: the sequences it computes, in order; each has its `chunk` set.
        admitted: those of `batch` that came from the waiting queue.
        preempted: sequences thrown back to the head of the waiting queue, last admitted first.
    """

    duration_ms: float
    batch: list[S]
    admitted: list[S]
    preempted: list[S]


class StepModel(Generic[S]):
    """The scheduler of one engine. One caller owns it; nothing in it blocks."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.kv_blocks)
        self.running: list[S] = []
        self.waiting: deque[S] = deque()
        self.steps = 0
        self.preemptions = 0
        self.skipped = 0  # waiting sequences that the last step passed over, for want of an adapter slot
        self._batch: list[S] = []

    def add(self, seq: S) -> None:
        """Queue a new sequence. Raises ValueError for one that could never run to its end."""
        if seq.state is not State.NEW or seq.prompt_tokens < 1 or seq.max_tokens < 1:
            raise ValueError(f"not a new sequence with a prompt and room for output: {seq}")
        # The last token generated is never computed.
        if self._blocks(seq.prompt_tokens + seq.max_tokens - 1) > self.pool.total:
            raise ValueError(
                f"{seq.prompt_tokens} + {seq.max_tokens} tokens need more than the engine's"
                f" {self.pool.total} blocks of {self.config.block_size}"
            )
        seq.state = State.WAITING
        self.waiting.append(seq)

    def abort(self, seq: S) -> None:
        """Drop a sequence and free its blocks, also in the middle of a step. Idempotent."""
        if seq.state is State.WAITING:
            self.waiting.remove(seq)
        elif seq.state is State.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        if seq.state is not State.FINISHED:
            seq.state = State.ABORTED

    def begin(self) -> Step[S] | None:
        """Schedule the next step; None when there is nothing to do. Follow it by one `finish`."""
        budget = self.config.max_num_batched_tokens
        preempted: list[S] = []
        batch: list[S] = []
        while budget and len(batch) < len(self.running):
            seq = self.running[len(batch)]
            seq.chunk = min(seq.total - seq.computed, budget)
            if not self._grow(seq, preempted):
                break
            budget -= seq.chunk
            batch.append(seq)
        admitted: list[S] = []
        passed: list[S] = []
        active = {seq.adapter for seq in self.running} - {""}
        while self.waiting and budget and not preempted and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not fits(seq.adapter, active, self.config.adapter_slots):
                passed.append(self.waiting.popleft())
                continue
            if not self._admit(seq, budget):
                break
            self.waiting.popleft()
            self.running.append(seq)
            budget -= seq.chunk
            admitted.append(seq)
        self.waiting.extendleft(reversed(passed))
        self.skipped = len(passed)
        self._batch = batch + admitted
        if not self._batch:
            return None
        self.steps += 1
        return Step(self._duration(self._batch), self._batch, admitted, preempted)

    def finish(self) -> list[S]:
        """End the step: those returned have one output token more, and may be FINISHED."""
        emitted: list[S] = []
        ended = False
        for seq in self._batch:
            if seq.state is not State.RUNNING:
                continue
            seq.computed += seq.chunk
            if seq.computed < seq.total:
                continue
            seq.generated += 1
            emitted.append(seq)
            if seq.generated == seq.max_tokens:
                seq.state = State.FINISHED
                self._release(seq)
                ended = True
        if ended:
            self.running = [seq for seq in self.running if seq.state is State.RUNNING]
        self._batch = []
        return emitted

    def check(self) -> None:
        """Raises IntegrityError unless blocks and sequences are all where they belong."""
        for seq in self.running:
            if seq.state is not State.RUNNING or len(seq.held) + seq.private < self._blocks(seq.computed):
                raise IntegrityError(f"runs without the blocks it needs: {seq}")
        for seq in self.waiting:
            if seq.state is not State.WAITING or seq.held or seq.private:
                raise IntegrityError(f"waits and yet holds blocks: {seq}")
        self.pool.check(self.running)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _admit(self, seq: S, budget: int) -> bool:
        # The last token is computed even where its block is cached: its logits make the next one.
        hits = self.pool.cached(seq.hashes, (seq.total - 1) // self.config.block_size)
        found = len(hits) * self.config.block_size
        chunk = min(seq.total - found, budget)
        fresh = self._blocks(found + chunk) - len(hits)
        if not self.pool.hold(hits, fresh):
            return False
        seq.held, seq.private, seq.computed, seq.chunk = hits, fresh, found, chunk
        seq.state = State.RUNNING
        if seq.cached is None:
            seq.cached = found
        self._publish(seq)
        return True

    def _grow(self, seq: S, preempted: list[S]) -> bool:
        """Find blocks for `seq.chunk` more tokens; False when `seq` itself had to make room."""
        need = self._blocks(seq.computed + seq.chunk) - len(seq.held) - seq.private
        if need > 0:
            while need > self.pool.available:
                victim = self.running.pop()
                self._preempt(victim)
                preempted.append(victim)
                if victim is seq:
                    return False
            self.pool.take(need)
            seq.private += need
        if seq.computed < seq.prompt_tokens:
            self._publish(seq)
        return True

    def _publish(self, seq: S) -> None:
        """Share the prompt blocks that this step fills; vLLM too does so before they are computed."""
        size = self.config.block_size
        for key in seq.hashes[seq.computed // size : (seq.computed + seq.chunk) // size]:
            if self.pool.publish(key):
                seq.held.append(key)
                seq.private -= 1

    def _preempt(self, seq: S) -> None:
        self._release(seq)
        seq.computed = 0
        seq.state = State.WAITING
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _release(self, seq: S) -> None:
        self.pool.release(seq.held, seq.private)
        seq.held, seq.private = [], 0

    def _duration(self, batch: list[S]) -> float:
        prefill = attention = decode_kv = 0
        for seq in batch:
            if seq.chunk == 1 and seq.generated:
                decode_kv += seq.computed + 1
            else:
                prefill += seq.chunk
                attention += seq.chunk * (seq.computed + seq.chunk)
        c = self.config
        base = c.beta0 + c.beta1 * prefill + c.beta2 * attention + c.beta3 * decode_kv + c.beta4 * len(batch)
        if not c.kappa:
            return base
        return base * (1 + c.kappa * len({seq.adapter for seq in batch} - {""}))
