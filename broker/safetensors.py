"""The header of a safetensors file, read without the library, which needs torch or numpy for more than it.

The format: 8 bytes, little endian, the header's length; the header, a JSON object of tensor name ->
{dtype, shape, data_offsets}; the tensors' data, with no hole and nothing shared
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from broker import errors

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 8 * 2**20
"""Bytes. LoRA for each of 128 experts in 48 layers takes 5.5 MiB; the parser holds Python's lock, and with it
every stream of the process, for up to 0.14 s for each MiB that only pretends to be one."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class _Broken(Exception):
    pass


def of_file(path: Path) -> dict[str, Tensor]:
    """As `header`, of a file of any size. Raises OSError too."""
    with path.open("rb") as file:
        return _read(file, path.stat().st_size, path.name)


def header(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of the file `name` with the bytes `data`, all of which lie within it.

    Raises errors.AdapterFailed, and nothing else, whatever the bytes are.
    """
    return _read(io.BytesIO(data), len(data), name)


def _read(file: BinaryIO, size: int, name: str) -> dict[str, Tensor]:
    try:
        return _header(file, size)
    except _Broken as exc:
        raise errors.AdapterFailed(f"{name} is no whole safetensors file: {exc}") from None


def _header(file: BinaryIO, size: int) -> dict[str, Tensor]:
    if size < _LENGTH.size:
        raise _Broken(f"it has {size} bytes")
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    room = size - _LENGTH.size
    if length > min(room, _MAX_HEADER):
        raise _Broken(f"its header would have {length:,} bytes, and {min(room, _MAX_HEADER):,} is the most")
    try:
        parsed = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise _Broken(f"its header can't be read: {str(exc)[:200]}") from exc
    if not isinstance(parsed, dict):
        raise _Broken("its header is no JSON object")
    parsed.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    tensors: dict[str, Tensor] = {}
    for name, described in parsed.items():
        tensors[name], span = _tensor(name, described)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise _Broken(f"its tensors overlap, or leave a hole, at byte {min(first, end):,} of the data")
        end = last
    if end != room - length:
        raise _Broken(f"its tensors take {end:,} bytes, and it holds {room - length:,}: is it truncated?")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _tensor(name: str, described: object) -> tuple[Tensor, tuple[int, int]]:
    match described:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]}:
            numbers = (*shape, first, last)
            if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
                raise _Broken(f"tensor {name[:200]!r} has a size or an offset that is none")
            if dtype not in _BITS:
                raise _Broken(f"tensor {name[:200]!r} is of the unknown type {dtype[:20]!r}")
            if len(shape) > 8 or math.prod(shape) * _BITS[dtype] != 8 * (last - first):
                raise _Broken(f"tensor {name[:200]!r} has not as many bytes as its shape {shape[:8]} takes")
            return Tensor(dtype, tuple(shape)), (first, last)
        case _:
            raise _Broken(f"tensor {name[:200]!r} is not described by dtype, shape and data_offsets")
