"""Which directories are adapters that can be served: good ones, broken ones, malicious ones."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import artifacts, errors
from ops import peft
from tests.adapters import TINY, Tensor, lora, safetensors, write_adapter


def test_a_good_one_is_read(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", rank=4, targets=("q_proj", "down_proj"), base="org/tiny")
    (directory / "README.md").write_text("left out")
    (directory / "checkpoint-1").mkdir()
    found = peft.read(directory)
    assert (found.rank, found.targets, found.base) == (4, ("down_proj", "q_proj"), "org/tiny")
    assert set(found.files) == artifacts.FILES
    assert found.files[artifacts.WEIGHTS] == (directory / artifacts.WEIGHTS).read_bytes()
    assert found.size == sum((directory / name).stat().st_size for name in artifacts.FILES)
    assert (
        found.digest
        == peft.read(
            write_adapter(tmp_path / "b", rank=4, targets=found.targets[::-1], base="org/tiny")
        ).digest
    )
    assert found.digest != peft.read(write_adapter(tmp_path / "c", seed=1, rank=4)).digest


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, not 'IA3'"),
        ({"peft_type": None}, "peft_type must be LORA"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"r": 0}, "a rank"),
        ({"r": "8"}, "a rank"),
        ({"r": True}, "a rank"),
        ({"r": 16}, "is of rank 8, and adapter_config.json says 16"),
        ({"rank_pattern": {"q_proj": -1}}, "a rank"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "v_proj' is none of target_modules"),
        ({"target_modules": [1]}, "target_modules"),
    ],
)
def test_what_the_engine_can_not_serve_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.AdapterFailed) as raised:
        peft.read(write_adapter(tmp_path, **config))
    assert says in raised.value.message


@pytest.mark.parametrize(
    "config", [{"target_modules": "all-linear"}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}]
)
def test_what_it_can_serve_is_not(tmp_path: Path, config: dict[str, Any]) -> None:
    assert peft.read(write_adapter(tmp_path, **config)).rank == 8


@pytest.mark.parametrize("config", [b"", b"[]", b"\xff", b"{", b"[" * 50_000, b"1" * 5000])
def test_a_config_that_is_none(tmp_path: Path, config: bytes) -> None:
    write_adapter(tmp_path)
    (tmp_path / artifacts.CONFIG).write_bytes(config)
    with pytest.raises(errors.AdapterFailed, match=r"adapter_config\.json: it is no JSON"):
        peft.read(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "x.PKL", "rng_state.pth"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(errors.AdapterFailed, match="is, by its name, a pickle"):
        peft.read(tmp_path / "a")
    (tmp_path / "a" / name).rename(tmp_path / "a" / artifacts.WEIGHTS)  # the name alone is no disguise
    with pytest.raises(errors.AdapterFailed, match="no whole safetensors file"):
        peft.read(tmp_path / "a")
    assert not Path("exploded").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterFailed, match="can't be read"):
        peft.read(tmp_path / "nowhere")
    with pytest.raises(errors.AdapterFailed, match=r"no adapter_config\.json"):
        peft.read(tmp_path)
    write_adapter(tmp_path)
    (tmp_path / artifacts.WEIGHTS).unlink()
    with pytest.raises(errors.AdapterFailed, match=r"no adapter_model\.safetensors"):
        peft.read(tmp_path)
    (tmp_path / artifacts.WEIGHTS).mkdir()
    with pytest.raises(errors.AdapterFailed, match=r"no adapter_model\.safetensors"):
        peft.read(tmp_path)


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


def matrix(*shape: int) -> Tensor:
    return shape, bytes(4 * shape[0] * shape[1])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no tensor in it"),
        ({A: matrix(8, 16)}, "has a lora_A, and not the other half"),
        ({A: matrix(8, 16), B: matrix(16, 4)}, "lora_A is of rank 8, lora_B of rank 4"),
        ({A: matrix(4, 16), B: matrix(16, 4)}, "is of rank 4, and adapter_config.json says 8"),
        ({A: ((8,), bytes(32)), B: matrix(16, 8)}, "is no matrix"),
        ({A: matrix(8, 0), B: matrix(16, 8)}, "is no matrix"),
        ({"model.layers.0.q_proj.weight": matrix(4, 4)}, "is no matrix of a LoRA"),
        ({f"{STEM}.lora_magnitude_vector": matrix(4, 4)}, "is no matrix of a LoRA"),
        ({f"{STEM}.base_layer.weight": matrix(4, 4)}, "is no matrix of a LoRA"),
        ({"base_model.model.lm_head.lora_embedding_A": matrix(4, 4)}, "is no matrix of a LoRA"),
    ],
)
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / artifacts.WEIGHTS).write_bytes(safetensors(tensors))
    with pytest.raises(errors.AdapterFailed) as raised:
        peft.read(tmp_path)
    assert raised.value.message.startswith("adapter_model.safetensors: ")
    assert says in raised.value.message


def test_a_rank_of_its_own_counts(tmp_path: Path) -> None:
    """As the engine counts: the largest that any module may have."""
    write_adapter(tmp_path, rank=4, rank_pattern={"v_proj": 16})
    tensors = lora(TINY, 4, 0, ("q_proj",)) | lora(TINY, 16, 0, ("v_proj",))
    (tmp_path / artifacts.WEIGHTS).write_bytes(safetensors(tensors))
    assert peft.read(tmp_path).rank == 16


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "rank_pattern",
        "use_dora",
        "modules_to_save",
        "init_lora_weights",
        "alora_invocation_tokens",
        "base_model_name_or_path",
        "fan_in_fan_out",
    ]
)


@given(st.dictionaries(KEYS, json_values, max_size=3))
def test_any_config_is_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]
) -> None:
    directory = write_adapter(tmp_path_factory.getbasetemp() / "any", rank=2, targets=("q_proj",))
    path = directory / artifacts.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    try:
        assert peft.read(directory).rank >= 2
    except errors.AdapterFailed as exc:
        assert exc.message.startswith(("adapter_config.json: ", "adapter_model.safetensors: "))  # noqa: PT017
