"""Keeps adapters off the rows that have none, in vLLM's LoRA kernels for CPU.

There (0.32, `lora/ops/torch_ops`) a row without an adapter has index -1, and indexing with it takes the last
slot's weights: beside requests of adapters, the base's were answered by whichever adapter had that slot.
The Triton kernels of GPUs skip such rows. Here they are left out of the computation, so that nothing of any
adapter, not even a NaN, gets near them; and a step without any adapter costs what it would without LoRA.

vLLM imports this in every process that runs the model, as the module of its `worker_extension_cls`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

_OPS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
"""What all others, for prefill too, come down to. Arguments: inputs, weights, output, indices, …"""


class Extension:
    """What vLLM's workers inherit: nothing."""


def _only_with_adapters(op: Callable[..., None]) -> Callable[..., None]:
    """`op` on the rows that have an adapter; the output's others stay as they are, of a shrink zero."""

    @functools.wraps(op)
    def run(inputs: Any, weights: Any, output: Any, indices: Any, *more: Any, **named: Any) -> None:
        rows = (indices >= 0).nonzero().flatten()
        if rows.numel() == indices.numel():
            op(inputs, weights, output, indices, *more, **named)
        elif rows.numel():
            part = output[rows]
            op(inputs[rows], weights, part, indices[rows], *more, **named)
            output[rows] = part

    return run


for _name in _OPS:
    _op = _only_with_adapters(getattr(lora_ops, _name))
    setattr(lora_ops, _name, _op)  # the prefill's find it here
    setattr(punica_cpu, _name, _op)


def _unless_none(method: Callable[..., None]) -> Callable[..., None]:
    """`method`, which adds what adapters change, in steps that hold any."""

    @functools.wraps(method)
    def run(self: punica_cpu.PunicaWrapperCPU, *args: Any, **named: Any) -> None:
        if not (self.is_prefill and self.no_lora):  # the latter is kept with the former only
            method(self, *args, **named)

    return run


for _name in ("add_lora_linear", "add_lora_logits", "add_lora_embedding"):
    setattr(punica_cpu.PunicaWrapperCPU, _name, _unless_none(getattr(punica_cpu.PunicaWrapperCPU, _name)))
