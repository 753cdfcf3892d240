"""Shapes of the tensors in safetensors files, from their headers alone; whether an adapter's fit its base's.

vLLM takes matrices of a smaller base without a word, and serves what comes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from broker import artifacts, errors

_LENGTH = 8
"""Bytes of the header's length, at the head of a file."""
_MAX_HEADER = 64 * 2**20

_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

Shapes = Mapping[str, tuple[int, ...]]


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """By tensor name. Raises ValueError for a file that has no such header, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 0 < length <= min(size - _LENGTH, _MAX_HEADER):
            raise ValueError(f"{path.name} is cut off, or no safetensors file")
        try:
            header = json.loads(file.read(length))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            if any(tensor["data_offsets"][1] > size - _LENGTH - length for tensor in tensors.values()):
                raise ValueError(f"{path.name} is cut off within its tensors")
            return {name: tuple(map(int, tensor["shape"])) for name, tensor in tensors.items()}
        except (AttributeError, KeyError, IndexError, TypeError, RecursionError) as exc:
            raise ValueError(f"{path.name} is no safetensors file: {exc!r}") from exc


def of_base(model: Path) -> dict[str, tuple[int, ...]]:
    """Of a model's directory. What can't be read is left out: whatever lacks a shape is not compared."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        try:
            found |= shapes(path)
        except (ValueError, OSError):
            continue
    return found


def check(adapter: Path, base: Shapes) -> None:
    """Raises errors.AdapterFailed when an adapter's matrices are not of its base's sizes, or unreadable."""
    try:
        tensors = shapes(adapter / artifacts.WEIGHTS)
    except (ValueError, OSError) as exc:
        raise errors.AdapterFailed(f"{artifacts.WEIGHTS} can't be read: {exc}") from exc
    for name, shape in tensors.items():
        found = _LORA.fullmatch(name)
        whole = base.get(f"{found[1]}.weight") if found else None
        if found is None or whole is None or len(whole) != 2 or len(shape) != 2:
            continue
        side, has, wants = ("in", shape[1], whole[1]) if found[2] == "A" else ("out", shape[0], whole[0])
        if has != wants:
            raise errors.AdapterFailed(
                f"{found[1]}: lora_{found[2]} has {has} {side}puts, and the base's module {wants}: it was "
                "trained on another base"
            )
