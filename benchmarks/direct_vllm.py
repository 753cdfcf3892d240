"""AsyncLLM called directly: what the same engine does with nothing of Headrace around it.

    python -m benchmarks.direct_vllm MODEL

reads one JSON line `{"streams", "requests", "tokens"}` after another and answers each with
`{"wall", "tokens"}` (seconds, output tokens); an empty line before the first says that it is ready.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from benchmarks.load import prompt
from workers.config import VllmConfig
from workers.engines import vllm as worker_engine

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Direct:
    """An engine, and the chat template that its server would apply."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._numbers = itertools.count()
        self._tokenizer = llm.get_tokenizer()

    async def chat(self, prompt: str, tokens: int) -> int:
        """Greedy; exactly `tokens` output tokens, streamed as the server streams them. Returns how many."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        done = 0
        async for output in self._llm.generate(text, params, f"direct-{next(self._numbers)}"):
            done += len(output.outputs[0].token_ids)
        return done


@asynccontextmanager
async def direct(config: VllmConfig) -> AsyncIterator[Direct]:
    """vLLM's own AsyncLLM in the environment and with the options that a worker gives it."""
    worker_engine._prepare(worker_engine._ENVIRONMENT | worker_engine._CPU_ENVIRONMENT)
    worker_engine._prepare(worker_engine._EAGER_CPU_ENVIRONMENT)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from workers.engines import vllm_core, vllm_engine

    options = worker_engine._options(config, Path(config.model), cpu=True)
    with vllm_core.bound():
        args = AsyncEngineArgs.from_cli_args(vllm_engine._parse(options, required=set()))
        llm = AsyncLLM.from_engine_args(args)
    try:
        yield Direct(llm)
    finally:
        llm.shutdown()


async def closed_loop(engine: Direct, streams: int, requests: int, tokens: int) -> tuple[float, int]:
    """Wall time and output tokens of `requests` chats, `streams` at a time."""
    numbers = iter(range(requests))

    async def slot() -> int:
        return sum([await engine.chat(prompt(number), tokens) for number in numbers])

    started = time.perf_counter()
    done = await asyncio.gather(*(slot() for _ in range(streams)))
    return time.perf_counter() - started, sum(done)


async def _serve(model: str) -> None:
    async with direct(VllmConfig(model=model)) as engine:
        print(flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            wall, tokens = await closed_loop(engine, **orjson.loads(line))
            print(orjson.dumps({"wall": wall, "tokens": tokens}).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
