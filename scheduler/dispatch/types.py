"""What goes into a dispatcher and what comes out. Times: seconds of one monotonic clock; lengths: tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from broker.messages import ServiceClass


@dataclass(frozen=True, slots=True)
class Item:
    """A request that waits.

    Attributes:
        key: unique among the requests that the dispatcher knows.
        model: the base itself, or an adapter of it.
        deadline: time after which its first token is worth nothing; inf = none.
        prompt_tokens: an estimate, at least 1.
        max_tokens: bound of its output; 0 = unknown.
        hashes: of the prompt's leading blocks (`kvstate.prefix.chain`); () = never shared.
        weight: of its tenant; twice the weight, twice the share.
        done_tokens: output that earlier attempts made; it extends the prompt.
    """

    key: int
    tenant: str
    model: str
    service_class: ServiceClass
    arrived: float
    deadline: float = math.inf
    prompt_tokens: int = 1
    max_tokens: int = 0
    hashes: tuple[int, ...] = ()
    weight: float = 1.0
    done_tokens: int = 0

    @property
    def context(self) -> int:
        """Tokens to be in the KV cache before it makes its next one."""
        return self.prompt_tokens + self.done_tokens


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker said of itself.

    Attributes:
        seen: when it said so.
        step_tokens: token budget of one engine step.
        slots_total: requests that it runs at once.
        running: requests that it holds and that have not ended, waiting ones included.
        prefill_held: prompt tokens of theirs that no step, nor the one under way, has computed.
        kv_total: room of its KV cache; 0 = unknown, not a limit.
        kv_free: below the ceiling (`kvstate.budget`), and neither taken nor promised to requests there;
            prefix-cached blocks are free.
        block_size: tokens for which that room is given out together.
        sends: how many of this dispatcher's sends to it the figures above include.
        serving: it takes requests; False while it drains.
        adapters: those loaded.
        adapter_room: one more than those could run.
    """

    worker: str
    seen: float
    step_tokens: int
    slots_total: int
    running: int
    prefill_held: int
    kv_total: int
    kv_free: int
    block_size: int = 16
    sends: int = 0
    serving: bool = True
    adapters: frozenset[str] = frozenset()
    adapter_room: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Hand request `key` to `worker` now.

    Attributes:
        queue_s: how long it waited.
        predicted_ttft_s: time from now to its first token, as predicted.
        hit_tokens: of its prompt that the worker's cache should hold.
    """

    key: int
    worker: str
    queue_s: float
    predicted_ttft_s: float
    hit_tokens: int
    why: str


@dataclass(frozen=True, slots=True)
class Shed:
    """Refuse request `key`: it can't be served in time. `retry_after_s`: the wait predicted for it."""

    key: int
    retry_after_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take request `key` back from `worker`, which then gives it back with its progress."""

    key: int
    worker: str
    why: str


Decision = Send | Shed | Preempt


@dataclass(frozen=True, slots=True)
class Candidate:
    """How one worker stood for a request; the lowest score wins (`scheduler.dispatch.score`).

    Attributes:
        pending: prompt tokens that it holds and has not computed.
        backlog: prompt tokens that wait for it and go first, beyond those that wait for every worker.
        uncached: tokens of the request that it would compute.
        load: requests that it holds.
    """

    worker: str
    score: float
    pending: float
    backlog: float
    uncached: float
    load: float


Figures = tuple[tuple[str, float, float, float, float, float], ...]
"""The fields of some `Candidate`s."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request went where it went.

    Attributes:
        candidates: the best few workers, best first.
        step_tokens: prompt tokens in a step of its class's workers, at most.
        step_s: seconds of a full one on the slowest of them.
        taken_back: workers from which it was taken back, and why.
    """

    key: int
    tenant: str
    model: str
    service_class: ServiceClass
    outcome: str
    worker: str
    queue_s: float
    predicted_ttft_s: float
    why: str
    candidates: tuple[Candidate, ...] = ()
    step_tokens: int = 0
    step_s: float = 0.0
    taken_back: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers that some classes have in common.

    Attributes:
        workers: how many there are.
        step_tokens: prompt tokens in a step of theirs, at most.
        step_s: seconds of a full step on the slowest.
    """

    classes: tuple[ServiceClass, ...]
    workers: int
    step_tokens: int
    step_s: float
