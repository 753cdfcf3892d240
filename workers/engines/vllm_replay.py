"""Continuing an answer that another worker began, on vLLM: its tokens are given, the rest is generated.

The serving layer sees the same outputs as in an undisturbed run, the given tokens first. How the engine
comes to the state after them differs:

- *Extension*: prompt and given tokens are the new prompt; one prefill. Exact where the next token
  depends on the tokens before it and on nothing else.
- *Forced replay*: the engine generates, and a logits processor allows but the given token; one
  decode step a token. Exact for all that counts output from its beginning: grammars, penalties, `min_tokens`,
  stop strings, logprobs, the seeded generator.

Written against vLLM 0.32; what is for its second model runner has not run (it needs a GPU). The
EngineCore process imports this module.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from broker import errors
from workers.engines.base import current_tap

_FORCED = "headrace_forced"
"""Key of `SamplingParams.extra_args`: the tokens to begin with."""

_EXTENDABLE = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_tokens",
        "ignore_eos",
        "stop_token_ids",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "output_kind",
        "skip_clone",
    }
)
"""Sampling parameters that see prompt and output alike, or only what comes next. One that this list does
not know, of a later vLLM say, takes the forced replay."""

Generate = Callable[..., AsyncIterator[Any]]


class Forced(AdapterLogitsProcessor):  # type: ignore[misc]
    """Allows only the given token for as long as there are any."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        given: list[int] = (params.extra_args or {}).get(_FORCED, [])
        if not given:
            return None

        def force(output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            at = len(output_ids)
            if at < len(given):
                allowed = logits[given[at]].clone()
                logits.fill_(float("-inf"))
                # A grammar that is a step ahead may have ruled it out already: then there is no choice left.
                logits[given[at]] = torch.where(torch.isfinite(allowed), allowed, 0.0)
            return logits

        return force


class Force(enum.Enum):
    """By what the engine can be made to generate given tokens."""

    NOTHING = enum.auto()
    PROCESSOR = enum.auto()
    TRACE = enum.auto()
    """The second model runner's own trace replay."""


def prepare(config: VllmConfig) -> Force:
    """Set the engine up for forced replays, before it starts."""
    model = config.model_config
    if config.speculative_config or model.runner_type == "pooling":
        return Force.NOTHING
    if config.use_v2_model_runner:
        model.enable_trace_replay = True
        return Force.TRACE
    model.logits_processors = [*(model.logits_processors or ()), f"{__name__}:{Forced.__name__}"]
    return Force.PROCESSOR


class Collector(RequestOutputCollector):  # type: ignore[misc]
    """Hands the outputs of a replay out one by one. vLLM merges those that its caller is slow to take, and
    a merged one could hold given and new tokens."""

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        tap = current_tap.get()
        self.output: Any
        self._later: deque[Any] | None = deque() if tap is not None and tap.replay else None

    def put(self, output: Any) -> None:
        if self._later is None or self.output is None or isinstance(output, Exception):
            super().put(output)
        else:
            self._later.append(output)

    async def get(self) -> Any:
        try:
            return await super().get()
        finally:
            self._refill()

    def get_nowait(self) -> Any:
        try:
            return super().get_nowait()
        finally:
            self._refill()

    def _refill(self) -> None:
        if self._later and self.output is None:
            self.output = self._later.popleft()
            self.ready.set()


def attach(llm: Any, force: Force) -> None:
    """After its start: `llm` may be given answers to continue."""
    llm.force = force
    if force is Force.TRACE:
        # Left to itself, vLLM ends an answer with its trace.
        llm.input_processor._normalize_trace_replay_params = lambda params, prompt_len: None


def replayed(
    generate: Generate,
    prompt: Any,
    params: SamplingParams,
    request_id: str,
    given: Mapping[int, list[int]],
    tokenizer: Any,
    force: Force,
) -> AsyncIterator[Any]:
    """The outputs of `generate(prompt, params, request_id)` where choice i begins with `given[i]`.

    Raises errors.WorkerLost when a choice needs the forced replay and the engine has none.
    """
    choices = []
    for index in range(params.n):
        one = params.clone()
        one.n = 1
        if params.n > 1 and params.seed is not None:
            one.seed = params.seed + index  # as vLLM seeds its choices
        name = request_id if params.n == 1 else f"{index}_{request_id}"
        ids = given.get(index, [])
        if not ids:
            outputs = generate(prompt, one, name)
        elif (pieces := _extendable(prompt, one, ids, tokenizer)) is not None:
            outputs = _extended(generate, prompt, one, name, ids, pieces)
        elif force is Force.PROCESSOR:
            one.extra_args = {**(one.extra_args or {}), _FORCED: ids}
            outputs = generate(prompt, one, name)
        elif force is Force.TRACE:
            one.trace_decode_token_ids = ids
            outputs = generate(prompt, one, name)
        else:
            raise errors.WorkerLost(
                "the worker was lost while it was answering, and this engine can't continue an answer with "
                "such sampling parameters; send the request again"
            )
        choices.append(outputs)
    return choices[0] if params.n == 1 else _side_by_side(choices)


async def _side_by_side(choices: list[AsyncIterator[Any]]) -> AsyncIterator[Any]:
    running = len(choices)
    async with aclosing(merge_async_iterators(*choices)) as merged:
        async for index, output in merged:
            output.outputs[0].index = index
            running -= output.finished
            output.finished = not running
            yield output


def _extendable(prompt: Any, params: SamplingParams, ids: list[int], tokenizer: Any) -> list[str] | None:
    """Each one's text, where the prompt may be extended by `ids`; None where they must be replayed."""
    if not isinstance(prompt, dict) or prompt.get("type") != "token" or params.max_tokens is None:
        return None
    plain = SamplingParams()
    special = {
        name
        for name in params.__struct_fields__
        if not name.startswith("_") and getattr(params, name) != getattr(plain, name, None)
    }
    if special - _EXTENDABLE or params.max_tokens <= len(ids):
        return None
    if tokenizer is None or ids[-1] in {*(params.stop_token_ids or ()), *tokenizer.all_special_ids}:
        return None
    return _whole_text(prompt["prompt_token_ids"], params, ids, tokenizer)


def _whole_text(
    prompt_ids: list[int], params: SamplingParams, ids: list[int], tokenizer: Any
) -> list[str] | None:
    """None when the last token's text is incomplete: what follows would be read against a wrong beginning."""
    request = SimpleNamespace(
        request_id="", sampling_params=params, prompt_token_ids=prompt_ids, prompt_embeds=None
    )
    words = IncrementalDetokenizer.from_new_request(tokenizer, request)
    pieces: list[str] = []
    for each in ids:
        words.update([each], False)
        pieces.append(words.get_next_output_text(False, True))
    whole = pieces[-1] and not pieces[-1].endswith("\ufffd")
    return pieces if whole else None


async def _extended(
    generate: Generate,
    prompt: Any,
    params: SamplingParams,
    request_id: str,
    ids: list[int],
    pieces: list[str],
) -> AsyncIterator[Any]:
    prompt_ids = prompt["prompt_token_ids"]
    longer = {**prompt, "prompt_token_ids": [*prompt_ids, *ids]}
    params.max_tokens -= len(ids)
    for each, text in zip(ids, pieces, strict=True):
        # One by one: parsers of tool calls, of which some take one step each time, come to where they were.
        yield _given(request_id, prompt, [each], text)
    longer_run: Any = generate(longer, params, request_id)
    async with aclosing(longer_run) as outputs:
        async for output in outputs:
            output.prompt_token_ids = prompt_ids
            output.num_cached_tokens = min(output.num_cached_tokens or 0, len(prompt_ids))
            yield output


def _given(request_id: str, prompt: Any, ids: list[int], text: str) -> RequestOutput:
    choice = CompletionOutput(index=0, text=text, token_ids=ids, cumulative_logprob=None, logprobs=None)
    return RequestOutput(
        request_id=request_id,
        prompt=prompt.get("prompt"),
        prompt_token_ids=prompt["prompt_token_ids"],
        prompt_logprobs=None,
        outputs=[choice],
        finished=False,
        num_cached_tokens=0,
    )
