"""AsyncLLM called directly: what the same engine does with nothing of Headrace around it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from ops import demo_model as demo_model_files
from workers.config import VllmConfig


def demo_model() -> Path:
    return demo_model_files.ensure(Path(".data"), progress=True)


class Direct:
    """An engine and the chat template its server would apply."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._tokenizer = engine.get_tokenizer()

    async def chat(self, prompt: str, tokens: int) -> int:
        """Greedy; exactly `tokens` output tokens, streamed as the server streams them. Returns how many."""
        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        done = 0
        async for output in self._engine.generate(text, params, f"direct-{next(self._numbers)}"):
            done += len(output.outputs[0].token_ids)
        return done


@asynccontextmanager
async def direct(model: Path, config: VllmConfig) -> AsyncIterator[Direct]:
    """An AsyncLLM with the settings that a worker would give it."""
    args = AsyncEngineArgs(
        model=str(model),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_memory_bytes=config.kv_cache_bytes,
        block_size=config.block_size,
        enforce_eager=config.enforce_eager,
    )
    engine = AsyncLLM.from_engine_args(args)
    try:
        yield Direct(engine)
    finally:
        engine.shutdown()
