"""Shapes in safetensors headers, and adapters that were made for another base."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import artifacts, errors
from tests.adapters import TINY, safetensors, write_adapter
from workers.engines import weights

Q = "model.layers.0.self_attn.q_proj"


def base_of(path: Path, **shapes: tuple[int, int]) -> Path:
    path.mkdir(exist_ok=True)
    tensors = {name: (shape, b"\0" * (4 * shape[0] * shape[1])) for name, shape in shapes.items()}
    (path / "model-1.safetensors").write_bytes(safetensors(tensors))
    return path


def test_the_shapes_of_a_base_are_those_of_all_its_files(tmp_path: Path) -> None:
    base_of(tmp_path, a=(2, 3))
    (tmp_path / "model-2.safetensors").write_bytes(safetensors({"b": ((4, 1), b"\0" * 16)}))
    (tmp_path / "model-3.safetensors").write_bytes(b"damaged")
    assert weights.of_base(tmp_path) == {"a": (2, 3), "b": (4, 1)}


def test_an_adapter_of_the_same_sizes_fits(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "ada", TINY)
    heads = TINY["num_attention_heads"] * TINY["head_dim"]
    base = weights.of_base(base_of(tmp_path / "base", **{f"{Q}.weight": (heads, TINY["hidden_size"])}))
    weights.check(adapter, base)


@pytest.mark.parametrize(("out", "in_", "matrix"), [(17, 16, "lora_B"), (16, 17, "lora_A")])
def test_an_adapter_of_other_sizes_does_not(tmp_path: Path, out: int, in_: int, matrix: str) -> None:
    adapter = write_adapter(tmp_path / "ada", TINY)
    base = weights.of_base(base_of(tmp_path / "base", **{f"{Q}.weight": (out, in_)}))
    with pytest.raises(errors.AdapterFailed, match=matrix):
        weights.check(adapter, base)


@given(data=st.binary(max_size=200), head=st.binary(max_size=60))
def test_no_file_does_more_than_fail(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes
) -> None:
    adapter = tmp_path_factory.mktemp("adapter")
    for content in (data, len(head).to_bytes(8, "little") + head + data):
        (adapter / artifacts.WEIGHTS).write_bytes(content)
        try:
            weights.check(adapter, {})
        except errors.AdapterFailed:
            continue


@pytest.mark.parametrize(
    "header",
    [b"[]", b"3", b'{"a": 1}', b'{"a": {}}', b'{"a": {"shape": [1], "data_offsets": []}}', b"[" * 9999],
)
def test_headers_that_are_none_fail(tmp_path: Path, header: bytes) -> None:
    (tmp_path / artifacts.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(errors.AdapterFailed, match="is no whole safetensors file"):
        weights.check(tmp_path, {})
