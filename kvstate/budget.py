"""How much more work an engine should hold. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine holds and what its requests look like; tokens throughout.

    Attributes:
        slots_free: sequences that may still join the running batch.
        prefill_limit: unprefilled tokens the engine should hold at most: a step or two of its
            budget. What waits inside it can no longer be reordered.
        prefill_held: unprefilled tokens it holds.
        kv_total: room of the KV cache; 0 = unknown, not a limit.
        kv_free: free now, prefix-cached blocks included.
        kv_promised: what the requests it holds will still take: prompts not yet prefilled and the
            rest of the expected outputs.
        mean_prompt, mean_output: of recent requests, for those still to come.
    """

    slots_free: int
    prefill_limit: float
    prefill_held: float
    kv_total: int
    kv_free: int
    kv_promised: float
    mean_prompt: float
    mean_output: float


KV_CEILING = 0.95
"""Share of the KV cache to fill: the last blocks are for guesses that were too low. At .97 the engines of the
simulator's small caches preempt 2 % of the requests; real vLLM has no more in use (`benchmarks hostile`)."""


def prefill_free(load: Load) -> float:
    return max(0.0, load.prefill_limit - load.prefill_held)


def kv_free(load: Load) -> float:
    """Tokens of KV room that nothing holds or will take, below the ceiling; inf when unknown."""
    if load.kv_total == 0:
        return math.inf
    return max(0.0, load.kv_free - (1 - KV_CEILING) * load.kv_total - load.kv_promised)


def requests(load: Load) -> int:
    """How many more requests of the usual size fit now.

    An engine that holds no unprefilled work takes one whatever its size: a prompt larger than the
    limit is prefilled in chunks. An empty one takes one whatever its KV forecast, since nothing
    that runs could ever free more room.
    """
    by_prefill = math.ceil(prefill_free(load) / max(1.0, load.mean_prompt))
    free = kv_free(load)
    by_kv = math.inf if math.isinf(free) else free // max(1.0, load.mean_prompt + load.mean_output)
    if by_kv < 1 and load.kv_free == load.kv_total and load.kv_promised == 0:
        by_kv = 1
    return max(0, int(min(load.slots_free, by_prefill, by_kv)))
