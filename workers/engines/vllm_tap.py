"""vLLM's engine client, made to tell what happens inside: each request's tokens, each step's load.

Written against vLLM 0.32; imported through `vllm.start` only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from broker import errors
from kvstate.blocks import Blocks
from workers.engines import vllm_replay
from workers.engines.base import Tap, current_tap

async_llm.RequestOutputCollector = vllm_replay.Collector  # for each request, AsyncLLM makes one


class Steps(StatLoggerBase):  # type: ignore[misc]
    """Passes on each engine step's (scheduler, iteration) statistics."""

    def __init__(self) -> None:
        self.on_step: Callable[[Any, Any], None] | None = None

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if self.on_step is not None:
            self.on_step(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass


class TappedLLM(AsyncLLM):  # type: ignore[misc]
    """Every endpoint ends in `generate` or `encode`, in a task that inherits the caller's context: there
    the request's tap is found, whatever the endpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._untold: set[_Untold] = set()
        self.force = vllm_replay.Force.NOTHING
        self.blocks: Blocks | None = None
        super().__init__(*args, **kwargs)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        tap = current_tap.get()
        if tap is None:
            return self._generate(prompt, sampling_params, request_id, **more)
        first_choice, tap.choices = tap.choices, tap.choices + sampling_params.n
        begin = functools.partial(self._begun, tap, first_choice, prompt, sampling_params, request_id, more)
        ran = functools.partial(self._ran, tap, prompt, more.get("lora_request"))
        return self._tapped(begin, tap, first_choice, request_id, sampling_params.output_kind, ran)

    def _generate(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
        outputs: AsyncIterator[Any] = super().generate(*args, **more)
        return outputs

    def _begun(
        self, tap: Tap, first_choice: int, prompt: Any, params: Any, request_id: str, more: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """The outputs, beginning with those that the caller has."""
        given = {index - first_choice: ids for index, ids in tap.replay.items() if index >= first_choice}
        generate = functools.partial(self._generate, **more)
        if not given:
            return generate(prompt, params, request_id)
        return vllm_replay.replayed(
            generate, prompt, params, request_id, given, self.renderer.tokenizer, self.force
        )

    async def _tapped(
        self,
        begin: Callable[[], Any],
        tap: Tap,
        first_choice: int,
        request_id: str,
        kind: Any,
        ran: Callable[[Any], None],
    ) -> AsyncIterator[Any]:
        reader = _Reader(tap, first_choice, ran, delta=kind == RequestOutputKind.DELTA)
        untold = _Untold(tap, request_id)
        if kind != RequestOutputKind.DELTA:
            self._untold.add(untold)
        try:
            async with aclosing(begin()) as outputs:
                async for output in outputs:
                    reader.read(output)
                    tap.more = True
                    yield output
                    if tap.between is not None:
                        await tap.between()
        except EngineDeadError:
            # The app would tell it as an event of the answer, and end that.
            if tap.fail is not None:
                tap.fail(errors.EngineFailed("the engine died"))
            raise
        except errors.HeadraceError as exc:
            if tap.fail is not None:
                tap.fail(exc)
            raise
        finally:
            self._untold.discard(untold)

    def _ran(self, tap: Tap, prompt: Any, lora: Any, tokens: Any) -> None:
        """Its prompt is in the cache, under what vLLM keeps it apart by: adapter, and the caller's salt."""
        if self.blocks is not None and not tap.replay:
            salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
            name = (lora.lora_name,) if lora is not None else ()
            self.blocks.ran(tap.chain, tokens, tap.body_size, name, (salt,) if salt else ())

    async def encode(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        tap = current_tap.get()
        async with aclosing(super().encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                if tap is not None and output.finished:
                    tap.prompt_tokens += len(output.prompt_token_ids)
                    tap.cached(output.num_cached_tokens or 0)
                yield output

    def tell_first_tokens(self) -> None:
        """A whole answer comes out of `generate` at its end only; its tap learns of the first token here."""
        states = self.output_processor
        for untold in list(self._untold):
            for internal_id in states.external_req_ids.get(untold.request_id, ()):
                times = states.request_states[internal_id].stats
                if times and times.first_token_ts:
                    untold.tap.scheduled_at = times.scheduled_ts
                    untold.tap.count(times.first_token_ts, 0)
                    self._untold.discard(untold)
                    break


class _Untold:
    """A request whose caller sees no output before the last."""

    __slots__ = ("request_id", "tap")

    def __init__(self, tap: Tap, request_id: str) -> None:
        self.tap = tap
        self.request_id = request_id


class _Reader:
    """Copies what RequestOutputs say into a tap.

    vLLM's times are the EngineCore's monotonic clock, which on one machine is ours too.
    """

    def __init__(self, tap: Tap, first_choice: int, ran: Callable[[Any], None], delta: bool) -> None:
        self._tap = tap
        self._ran = ran
        self._first_choice = first_choice
        self._delta = delta
        self._seen: dict[int, int] = {}
        self._prompt_counted = False

    def read(self, output: Any) -> None:
        tap, times = self._tap, output.metrics
        if not self._prompt_counted:
            self._prompt_counted = True
            tap.prompt_tokens += len(output.prompt_token_ids or ())
            tap.cached(output.num_cached_tokens or 0)
            self._ran(output.prompt_token_ids or ())
        if tap.scheduled_at is None and times is not None and times.scheduled_ts:
            tap.scheduled_at = times.scheduled_ts
        now = (times.first_token_ts if times is not None else 0.0) or time.monotonic()
        for choice in output.outputs:
            ids = list(choice.token_ids)
            if not self._delta:
                seen = self._seen.get(choice.index, 0)
                self._seen[choice.index] = len(ids)
                ids = ids[seen:]
            if ids:
                tap.tokens(now, self._first_choice + choice.index, ids)
