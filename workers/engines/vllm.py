"""The real engine: vLLM's own OpenAI application, called in this process; its EngineCore is a child.

`start` prepares what must stand before vLLM is imported, then hands over to `vllm_engine`. The same code
runs vLLM's CPU and GPU builds.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from broker import errors
from workers.config import VllmConfig
from workers.engines import vllm_core as vllm_core  # before vLLM: it holds back what vLLM's import logs

if TYPE_CHECKING:
    from workers.engines.vllm_engine import VllmEngine

_ENVIRONMENT = {
    # Weights are a local directory: nothing may hang on a hub out of reach, and nobody is reported to.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Start-up warns a dozen times of what was decided here; VLLM_LOGGING_LEVEL=INFO shows all.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}
"""For vLLM and its child alone, where the operator has not set them: they have no argument of their own."""

_CPU_ENVIRONMENT = {
    # The engine process runs the model itself. As a further process, vLLM's default on CPU, it
    # starts 8 s later and is a third slower on two cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_EAGER_CPU_ENVIRONMENT = {
    # The sampler's logprobs are compiled even so, in the first request that asks: seconds for all streams.
    "TORCHDYNAMO_DISABLE": "1",
}

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank."""

_CPU_CONTEXT = 2048
_CPU_OPTIONS: dict[str, str | int | float | bool] = {
    # What vLLM would take is meant for GPUs, or for a machine that does nothing else.
    "max-num-seqs": 32,
    "max-num-batched-tokens": 512,
    "kv-cache-memory-bytes": 512 * 2**20,
    # CPU's own choice is 128: prefixes shorter than that would never hit.
    "block-size": 32,
    "enforce-eager": True,
}


async def start(config: VllmConfig) -> VllmEngine:
    """Load the model and build the application; the engine is warm when this returns.

    Holds the event loop for most of the time (about 15 s on two cores): vLLM starts its child by
    blocking calls, and from this thread, whose end the child doesn't outlive.

    Raises errors.EngineFailed when the model or the settings are no good.
    """
    model = Path(config.model)
    if not (model / "config.json").is_file():
        raise errors.EngineFailed(f"[vllm] model: {config.model!r} is no directory with a model in it")
    _prepare(_ENVIRONMENT)
    with warnings.catch_warnings(), _root_level_kept():
        warnings.simplefilter("ignore")  # vLLM's imports warn of deprecations among themselves
        try:
            from vllm.platforms import current_platform
        except ImportError as exc:
            raise errors.EngineFailed(f"vLLM is not installed (pip install headrace[cpu]): {exc}") from exc
        cpu = bool(current_platform.is_cpu())
        if cpu:
            _prepare(_CPU_ENVIRONMENT)
        options = _options(config, model, cpu)
        if cpu and options["enforce-eager"]:
            _prepare(_EAGER_CPU_ENVIRONMENT)
        from workers.engines import vllm_engine

        required = {name.replace("_", "-") for name in config.extra}
        # Of several EngineCores each has a cache of its own, and an operator's own listener has the events.
        tells = config.kv_events and not required & {"data-parallel-size", "kv-events-config"}
        return await vllm_engine.start(options, required, tells, config.hang_after)


@contextmanager
def _root_level_kept() -> Iterator[None]:
    """vLLM's start sets the root logger's level, and would silence all that log through it."""
    root = logging.getLogger()
    level = root.level
    try:
        yield
    finally:
        root.setLevel(level)


def _prepare(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    # The child's entry point (vllm_core) is for spawn; vLLM's own server chooses it too.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_API_KEY"] = ""  # who may ask is ingress's to decide


def _options(config: VllmConfig, model: Path, cpu: bool) -> dict[str, str | int | float | bool]:
    """vLLM's command-line options by name. Later ones win: ours, the platform's, the settings, `extra`."""
    options: dict[str, str | int | float | bool] = {
        "model": str(model),
        "served-model-name": config.served_name or model.resolve().name,
        "enable-prefix-caching": True,
        "enable-prompt-tokens-details": True,
        "disable-log-stats": True,  # vllm_engine has its own
        "use-tqdm-on-load": False,
        "disable-fastapi-docs": True,
        "logging-config": json.dumps({"formatter": "json"}),
    }
    if config.sleep and not cpu:  # vLLM's CPU build only pauses, and frees nothing
        options["enable-sleep-mode"] = True
    if config.tool_call_parser:
        options |= {"enable-auto-tool-choice": True, "tool-call-parser": config.tool_call_parser}
    if config.adapter_slots:
        options |= {
            "enable-lora": True,
            "max-loras": config.adapter_slots,
            "max-cpu-loras": max(config.adapter_slots, config.adapters_in_memory),
            "max-lora-rank": next(rank for rank in _RANKS if rank >= config.max_rank),
        }
        if cpu:
            options["worker-extension-cls"] = "workers.engines.vllm_cpu_lora.Extension"
    if cpu:
        options |= _CPU_OPTIONS
        own = json.loads((model / "config.json").read_bytes()).get("max_position_embeddings")
        options["max-model-len"] = min(own or _CPU_CONTEXT, _CPU_CONTEXT)
    settings: dict[str, int] = {
        "max-model-len": config.max_model_len,
        "max-num-seqs": config.max_num_seqs,
        "max-num-batched-tokens": config.max_num_batched_tokens,
        "kv-cache-memory-bytes": config.kv_cache_bytes,
        "block-size": config.block_size,
    }
    options |= {name: value for name, value in settings.items() if value}
    if config.enforce_eager != "auto":
        options["enforce-eager"] = config.enforce_eager
    return options | {name.replace("_", "-"): value for name, value in config.extra.items()}
