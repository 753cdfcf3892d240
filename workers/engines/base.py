"""What an engine is: an ASGI app plus a control handle.

The app is the engine's own OpenAI application: a worker calls it once a request and copies the bytes
it sends into reply frames. Everything else a worker must know (how full the engine is, which token ids
a body chunk carries, when prefill began) comes through `Engine.stats` and the request's `Tap`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from broker import errors
from broker.messages import ModelCard
from kvstate.blocks import Blocks

Scope = MutableMapping[str, Any]
ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refused(errors.Unavailable):
    """Raised by an engine's app that has sent nothing: it can't serve now, another worker may."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How full the engine is, as of its last step.

    Attributes:
        running: sequences in the running batch.
        waiting: sequences the engine holds but has not scheduled.
        max_running: slots: the most sequences one step may hold; 0 while it can take none at all.
        step_tokens: token budget of one step (`max_num_batched_tokens`).
        kv_tokens_total, kv_tokens_free: KV-cache room in tokens; 0 total = unknown or unlimited.
        kv_block_tokens: tokens for which room is given out together.
        preemptions: running sequences thrown back for want of KV room, ever.
        steps: steps done, ever.
        skipped: waiting sequences that the last step passed over, as for want of an adapter slot.
    """

    running: int
    waiting: int
    max_running: int
    step_tokens: int
    kv_tokens_total: int
    kv_tokens_free: int
    kv_block_tokens: int = 1
    preemptions: int = 0
    steps: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Tap:
    """What a run shows beyond its bytes. The engine writes; `workers.job` reads. One a request.

    Times are `time.monotonic()` seconds, None until reached. `ids` is drained by the job whenever it
    makes a frame: (choice index, token ids) pairs in the order they were generated. A frame must hold
    all bytes of the tokens that it names, or a stream could not be cut after it: an engine whose app
    may send several bodies for one output sets `more` when it hands the output over, and awaits
    `between` when the app asks for the next one.
    """

    chain: tuple[int, ...] = ()
    """Written by the job before it calls the app: names of its prompt's first blocks, for `Engine.blocks`."""
    body_size: int = 0
    """Bytes; likewise."""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """None = the engine has not told, or never does."""
    output_tokens: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    ids: list[tuple[int, list[int]]] = field(default_factory=list)
    on_first_token: Callable[[], None] | None = None
    choices: int = 0
    """Choice indices given out so far: a request of several prompts numbers on."""
    more: bool = False
    """The app has an output for which it may send more."""
    between: Callable[[], Awaitable[None]] | None = None
    fail: Callable[[errors.HeadraceError], None] | None = None
    """Ends the run with that error, before the app words one of its own into a stream."""
    replay: Mapping[int, list[int]] = field(default_factory=dict)
    """Written by the job before it calls the app: output tokens of each choice that its caller has from an
    earlier attempt. An engine that `continues` begins with exactly these, as if it had just generated
    them, none of them in one output with a later one."""

    def tokens(self, now: float, index: int, ids: list[int]) -> None:
        """Record output tokens `ids` of choice `index`, generated at `now`."""
        self.ids.append((index, ids))
        self.count(now, len(ids))

    def cached(self, tokens: int) -> None:
        """So many more of its prompts' tokens were in the engine's cache, as the engine has told."""
        self.cached_tokens = (self.cached_tokens or 0) + tokens

    def count(self, now: float, tokens: int) -> None:
        """Record output tokens whose ids the engine doesn't know."""
        self.output_tokens += tokens
        if self.first_token_at is None:
            self.first_token_at = now
            if self.on_first_token is not None:
                self.on_first_token()


# Set by the job in the task that calls the app; the engine reads it there, so no endpoint need pass it on.
current_tap: ContextVar[Tap | None] = ContextVar("headrace_tap", default=None)


class Engine(Protocol):
    """The contract every engine meets; `tests/contract/test_engines.py` runs it over all of them.

    Attributes:
        name: `vllm`, `sim` or `http`.
        base: name of the base weights: the queue this engine's worker pulls from.
        app: the OpenAI application. A `http.disconnect` from `receive` stops the run and frees its
            KV blocks; the app then returns without sending more.
        continues: whether it takes a `Tap.replay`.
        adapter_slots: adapters that one step may hold; 0 = it serves none.
        adapters_in_memory: adapters that may be loaded at once, at least as many.
        max_rank: the largest rank of an adapter that it takes.
        can_sleep: whether it takes `sleep` and `wake`.
        blocks: what its prefix cache holds; None = it does not tell.
        models: what it serves, the base first; each card lists the HTTP paths it answers.
        on_change: called, when set, after each step that changed `stats()`. Never blocks.
        died: done when the engine can serve no more, with the reason as its exception.
    """

    name: str
    base: str
    continues: bool
    adapter_slots: int
    adapters_in_memory: int
    max_rank: int
    can_sleep: bool
    blocks: Blocks | None
    app: ASGIApp
    models: tuple[ModelCard, ...]
    on_change: Callable[[], None] | None
    died: asyncio.Future[None]

    def stats(self) -> EngineStats: ...

    async def load_adapter(self, model: str, path: Path, rank: int) -> None:
        """Serve the adapter in directory `path` (PEFT's files) as `model` from now on.

        One call at a time; `path` is absolute, another one for each version, and stays until it is unloaded.
        Raises errors.AdapterFailed, and then every other model is served as before; errors.EngineFailed when
        the engine is dead.
        """
        ...

    async def unload_adapter(self, model: str) -> None:
        """Serve `model` no more, and free its memory; one that is not loaded is fine. Nothing of it runs."""
        ...

    async def sleep(self) -> None:
        """Give the accelerator's memory free and keep the weights in the machine's. Nothing runs, and nothing
        is asked of the app until `wake`. What it raises is the engine's end."""
        ...

    async def wake(self) -> None:
        """Serve again as before; what it had cached of prompts is gone."""
        ...

    async def close(self) -> None:
        """Stop the engine and every process it started. Idempotent."""
        ...


class NoAdapters:
    """For an engine that serves its base alone."""

    adapter_slots = 0
    adapters_in_memory = 0
    max_rank = 0

    async def load_adapter(self, model: str, path: Path, rank: int) -> None:
        raise errors.AdapterFailed(f"this worker's engine takes no adapters, and so not {model}")

    async def unload_adapter(self, model: str) -> None:
        return


class Untold:
    """For an engine that does not tell what it caches."""

    blocks: Blocks | None = None


class NoSleep:
    """For an engine that can't rest: whoever wants its memory stops its process."""

    can_sleep = False

    async def sleep(self) -> None:
        raise errors.EngineFailed("this engine can't sleep")

    async def wake(self) -> None:
        return
