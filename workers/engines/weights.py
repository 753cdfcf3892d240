"""Whether an adapter's matrices are of its base's sizes, by the headers of their safetensors files.

vLLM takes matrices of a smaller base without a word, and serves what comes of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from broker import artifacts, errors, safetensors

_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

Shapes = Mapping[str, tuple[int, ...]]


def of_base(model: Path) -> dict[str, tuple[int, ...]]:
    """Of a model's directory. What can't be read is left out: whatever lacks a shape is not compared."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with contextlib.suppress(errors.AdapterFailed, OSError):
            found |= {name: tensor.shape for name, tensor in safetensors.of_file(path).items()}
    return found


def check(adapter: Path, base: Shapes) -> None:
    """Raises errors.AdapterFailed when an adapter's matrices are not of its base's sizes, or unreadable."""
    try:
        tensors = safetensors.of_file(adapter / artifacts.WEIGHTS)
    except OSError as exc:
        raise errors.AdapterFailed(f"{artifacts.WEIGHTS} can't be read: {exc}") from exc
    for name, (_, shape) in tensors.items():
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
