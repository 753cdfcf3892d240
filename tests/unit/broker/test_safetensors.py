"""The header of a safetensors file: whole ones are read, all others refused in one way."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker import errors
from broker.safetensors import Tensor, header
from tests.adapters import TINY, lora, safetensors

GOOD = safetensors(lora(TINY, 2, 0, ("q_proj",)))


def file(described: Any, data: bytes = b"") -> bytes:
    head = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(head)) + head + data


def tensor(first: int, last: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [last - first] if shape is None else shape,
        "data_offsets": [first, last],
    }


def test_names_types_and_shapes_are_read() -> None:
    found = header(GOOD, "x")
    assert len(found) == 4
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert found[name] == Tensor("F32", (2, 16))
    assert header(file({"a": tensor(0, 0, [0, 5], "BF16"), "b": tensor(0, 4, [], "F32")}, b"1234"), "x") == {
        "a": Tensor("BF16", (0, 5)),
        "b": Tensor("F32", ()),
    }


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (GOOD[:20], "its header would have"),
        (struct.pack("<Q", 2**63) + b"{}", "its header would have"),
        (GOOD[:-1], "is it truncated?"),
        (GOOD + b"x", "is it truncated?"),
        (file(b"\x80\x04"), "can't be read"),
        (file(b"{'a': 1}"), "can't be read"),
        (file(b"[" * 100_000), "can't be read"),
        (file(b'{"a":1' + b"0" * 5000 + b"}"), "can't be read"),
        (file(b'{"a":1,"a":2}'), "stands in it twice"),
        (file([]), "no JSON object"),
        (file({"a": 1}), "not described"),
        (file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1"), "not described"),
        (file({"a": tensor(0, 1, ["1"])}, b"1"), "a size or an offset"),
        (file({"a": tensor(0, 1, [True])}, b"1"), "a size or an offset"),
        (file({"a": tensor(0, 1, [1.0])}, b"1"), "a size or an offset"),
        (file({"a": tensor(0, 1, [2**64])}, b"1"), "a size or an offset"),
        (file({"a": tensor(-1, 0, [1])}, b"1"), "a size or an offset"),
        (file({"a": tensor(1, 0, [0])}, b"1"), "not as many bytes"),
        (file({"a": tensor(0, 1, [1], "F32")}, b"1"), "not as many bytes"),
        (file({"a": tensor(0, 1, [1] * 9)}, b"1"), "not as many bytes"),
        (file({"a": tensor(0, 1, [1], "PICKLE")}, b"1"), "unknown type"),
        (file({"a": tensor(0, 9)}, b"1234"), "it holds 4"),
        (file({"a": tensor(0, 2), "b": tensor(1, 4)}, b"1234"), "overlap"),
        (file({"a": tensor(0, 1), "b": tensor(2, 4)}, b"1234"), "hole"),
    ],
)
def test_what_is_not_whole_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(errors.AdapterFailed, match=r"adapter\.safetensors") as raised:
        header(data, "adapter.safetensors")
    assert says in raised.value.message
    assert len(raised.value.message) < 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
described = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F32", "BF16", "X"]) | json_values,
        "shape": st.lists(st.integers(-2, 5) | json_values, max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-2, 40) | json_values, min_size=1, max_size=3) | json_values,
    },
)
headers = st.dictionaries(st.text(max_size=8), described | json_values, max_size=4)
damaged = st.builds(
    lambda at, cut, bits: GOOD[: at % len(GOOD)] + bits + GOOD[at % len(GOOD) + cut :],
    st.integers(0, 10_000),
    st.integers(0, 20),
    st.binary(max_size=20),
)


@given(st.binary(max_size=200) | st.builds(file, headers, st.binary(max_size=40)) | damaged)
@example(b"\x02\0\0\0\0\0\0\0{}")
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    try:
        found = header(data, "x")
    except errors.AdapterFailed:
        return
    sizes = {"U8": 1, "F32": 4, "BF16": 2}
    total = 0
    for one in found.values():
        size = sizes.get(one.dtype, 0)
        for side in one.shape:
            size *= side
        total += size
    if {one.dtype for one in found.values()} <= set(sizes):
        assert total + 8 + struct.unpack_from("<Q", data)[0] == len(data)


@given(st.builds(file, headers, st.binary(max_size=40)) | damaged)
@example(GOOD)
def test_what_is_read_here_the_library_reads_too(data: bytes) -> None:
    """In a worker it is the library that opens the file."""
    library = pytest.importorskip("safetensors")
    try:
        found = header(data, "x")
    except errors.AdapterFailed:
        return
    read = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in library.deserialize(data)}
    assert read == {name: tuple(tensor) for name, tensor in found.items()}
