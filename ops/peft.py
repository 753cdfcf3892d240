"""Whether a directory is a LoRA adapter that can be served, as PEFT saves one. Nothing of it is executed:
the configuration is JSON, the weights are safetensors, and pickles are not opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker import artifacts, errors, safetensors
from broker.safetensors import Tensor

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
_MAX_CONFIG = 2**20
_DTYPES = frozenset({"F16", "BF16", "F32"})
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight", re.DOTALL)
# These only say how training began; others (PiSSA, OLoRA, CorDA, LoftQ) change the base's own weights.
_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """A directory that was found good.

    Attributes:
        rank: the largest of its matrices'.
        targets: names of the modules that it changes, without their layers.
        base: the model that it was made for, as its training named it; "" = it doesn't say.
        files: what is stored of it, by name.
        digest: `artifacts.digest_of` them.
    """

    rank: int
    targets: tuple[str, ...]
    base: str
    files: dict[str, bytes]

    digest: str

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))


def read(directory: Path) -> Adapter:
    """Raises errors.AdapterFailed, saying what is wrong and in which file."""
    files = _files(directory)
    config = _config(files[artifacts.CONFIG])
    ranks, base = _ranks(config), _text(config, "base_model_name_or_path")
    tensors = safetensors.header(files[artifacts.WEIGHTS], artifacts.WEIGHTS)
    modules = _modules(tensors, ranks)
    _check_targets(config, modules)
    targets = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    return Adapter(max(ranks), targets, base, files, artifacts.digest_of(files))


def _files(directory: Path) -> dict[str, bytes]:
    try:
        found = {path.name: path for path in directory.iterdir()}
        pickles = sorted(name for name, path in found.items() if path.suffix.lower() in _PICKLES)
        if pickles:
            raise errors.AdapterFailed(
                f"{pickles[0]} is, by its name, a pickle, which runs code when it is opened. An adapter is "
                f"{artifacts.CONFIG} and {artifacts.WEIGHTS}: save it with safe_serialization=True, and "
                "leave nothing of its training beside it"
            )
        for name, most in ((artifacts.CONFIG, _MAX_CONFIG), (artifacts.WEIGHTS, artifacts.MAX_BYTES)):
            if name not in found or not found[name].is_file():
                raise errors.AdapterFailed(f"there is no {name} in {directory}: is it what PEFT saved?")
            if found[name].stat().st_size > most:
                raise errors.AdapterFailed(f"{name} has more than {most:,} bytes")
        return {name: found[name].read_bytes() for name in (artifacts.CONFIG, artifacts.WEIGHTS)}
    except OSError as exc:
        raise errors.AdapterFailed(f"{directory} can't be read: {exc.strerror or exc}") from exc


def _config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _bad(f"it is no JSON: {str(exc)[:200]}") from exc
    if not isinstance(config, dict):
        raise _bad("it is no JSON object")
    if config.get("peft_type") != "LORA":
        raise _bad(f"peft_type must be LORA, not {_shown(config.get('peft_type'))}")
    if config.get("alora_invocation_tokens") is not None or config.get("invocation_string") is not None:
        raise _bad("it is an activated LoRA (alora_invocation_tokens), which no engine here serves")
    for key in ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "modules_to_save"):
        if config.get(key):
            raise _bad(f"the engine serves no adapter with {key}, which is {_shown(config[key])}")
    for key in ("trainable_token_indices", "fan_in_fan_out"):
        if config.get(key):
            raise _bad(f"the engine would leave {key} out, which is {_shown(config[key])}")
    if config.get("bias", "none") != "none":
        raise _bad(f"the engine serves no adapter with a bias, which is {_shown(config['bias'])}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        raise _bad(
            f"init_lora_weights {_shown(init)} changes the base's weights: convert it to a plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and -1e9 < alpha < 1e9):
        raise _bad(f"lora_alpha must be a number, not {_shown(alpha)}")
    return config


def _ranks(config: dict[str, Any]) -> frozenset[int]:
    """Those that its matrices may have."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise _bad("rank_pattern must be an object")
    ranks = [config.get("r"), *pattern.values()]
    for rank in ranks:
        if type(rank) is not int or not 0 < rank <= 65536:
            raise _bad(f"a rank (r, rank_pattern) must be a whole number from 1 on, not {_shown(rank)}")
    return frozenset(ranks)


def _text(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    return value if isinstance(value, str) else ""


def _modules(tensors: dict[str, Tensor], ranks: frozenset[int]) -> list[str]:
    """Names of the modules that are changed, each with both of its matrices, which fit each other."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise _weak(f"tensor {name[:200]!r} is no matrix of a LoRA: base_model.model.….lora_A.weight")
        if tensor.dtype not in _DTYPES or len(tensor.shape) != 2 or 0 in tensor.shape:
            raise _weak(f"tensor {name[:200]!r} is no matrix of {', '.join(sorted(_DTYPES))}, but {tensor}")
        halves.setdefault(found[1], {})[found[2]] = tensor
    if not halves:
        raise _weak("there is no tensor in it")
    for module, pair in halves.items():
        if len(pair) != 2:
            raise _weak(f"module {module[:200]!r} has a lora_{next(iter(pair))}, and not the other half")
        rank, other = pair["A"].shape[0], pair["B"].shape[1]
        if rank != other:
            raise _weak(f"module {module[:200]!r}: lora_A is of rank {rank}, lora_B of rank {other}")
        if not _expected(module, rank, ranks):
            wanted = " or ".join(map(str, sorted(ranks)))
            raise _weak(f"module {module[:200]!r} is of rank {rank}, and {artifacts.CONFIG} says {wanted}")
    return list(halves)


def _expected(module: str, rank: int, ranks: frozenset[int]) -> bool:
    if ".experts" in module:  # PEFT joins the matrices of all experts into one
        return any(rank % one == 0 for one in ranks)
    return rank in ranks


def _check_targets(config: dict[str, Any], modules: Iterable[str]) -> None:
    """A list names modules by how their paths end; a string is a pattern, or all-linear: PEFT's to judge."""
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        return
    if not (isinstance(targets, list) and targets and all(isinstance(t, str) and t for t in targets)):
        raise _bad(f"target_modules must be a list of modules' names, not {_shown(targets)}")
    ends = tuple(f".{target}" for target in targets)
    for module in modules:
        if ".experts" not in module and not f".{module}".endswith(ends):
            raise _weak(f"module {module[:200]!r} is none of target_modules: {_shown(targets)}")


def _bad(what: str) -> errors.AdapterFailed:
    return errors.AdapterFailed(f"{artifacts.CONFIG}: {what}")


def _weak(what: str) -> errors.AdapterFailed:
    return errors.AdapterFailed(f"{artifacts.WEIGHTS}: {what}")


def _shown(value: object) -> str:
    return f"{value!r:.100}"
