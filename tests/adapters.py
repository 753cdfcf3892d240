"""LoRA adapters in PEFT's format, written by hand: valid for the base whose shapes they are given."""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from broker import artifacts

TINY: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
"""A llama-like config.json for engines that read no weights."""

_MLP = ("gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path,
    config_json_of_base: Mapping[str, Any] | Path | None = None,
    rank: int = 8,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    base: str = "SmolLM2-135M-Instruct",
    **config: Any,
) -> Path:
    """An adapter of float32 weights in `directory`, made where it is not there; B is not zero, so that it
    changes what the base says.

    `config_json_of_base`: the base's config.json, as its path, its directory or read; None = TINY.
    `config`: more keys of adapter_config.json, or others in the place of those it has.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = lora(_read(config_json_of_base), rank, seed, targets)
    (directory / artifacts.WEIGHTS).write_bytes(safetensors(tensors))
    written = peft_config(rank, targets, base) | config
    (directory / artifacts.CONFIG).write_text(json.dumps(written, indent=2))
    return directory


def peft_config(rank: int, targets: Sequence[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


Tensor = tuple[Sequence[int], bytes]
"""Shape, and float32 values."""


def lora(shapes: Mapping[str, Any], rank: int, seed: int, targets: Sequence[str]) -> dict[str, Tensor]:
    dice = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(shapes["num_hidden_layers"]):
        for target in targets:
            inside, outside = _in_out(shapes, target)
            block = "mlp" if target in _MLP else "self_attn"
            stem = f"base_model.model.model.layers.{layer}.{block}.{target}"
            tensors[f"{stem}.lora_A.weight"] = ((rank, inside), _floats(dice, rank * inside))
            tensors[f"{stem}.lora_B.weight"] = ((outside, rank), _floats(dice, outside * rank))
    return tensors


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The file format: length of the header, 8 bytes little endian; the header, JSON; the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(data for _, data in tensors.values())


def _floats(dice: random.Random, count: int) -> bytes:
    return array("f", (dice.uniform(-0.05, 0.05) for _ in range(count))).tobytes()


def _in_out(shapes: Mapping[str, Any], target: str) -> tuple[int, int]:
    hidden, heads = shapes["hidden_size"], shapes["num_attention_heads"]
    head = shapes.get("head_dim") or hidden // heads
    kv = shapes.get("num_key_value_heads", heads) * head
    return {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, shapes["intermediate_size"]),
        "up_proj": (hidden, shapes["intermediate_size"]),
        "down_proj": (shapes["intermediate_size"], hidden),
    }[target]


def _read(config: Mapping[str, Any] | Path | None) -> Mapping[str, Any]:
    if config is None:
        return TINY
    if isinstance(config, Path):
        found: dict[str, Any] = json.loads(
            (config / "config.json" if config.is_dir() else config).read_text()
        )
        return found
    return config
