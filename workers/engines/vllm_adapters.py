"""Adapters in vLLM: loaded before any request names them, under ids of our own.

Three things would harm who has no part in them: a request that brings an adapter which can't be loaded kills
the engine, an id that comes again serves the weights of the one before, and a path that comes again finds its
prefix blocks. So an adapter is added first, which fails alone; an id is never used twice; and each
version has a path of its own. Written against vLLM 0.32; imported through `vllm.start` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from broker import errors
from workers.engines import weights

_log = logging.getLogger(__name__)

_REASON = 500
"""Characters of vLLM's reason that are passed on."""


class Loras:
    """The adapters of one vLLM. `served` is its application's table of them, by the names in requests."""

    def __init__(self, llm: Any, served: MutableMapping[str, LoRARequest]) -> None:
        self._llm = llm
        self._served = served
        self._last_id = 0
        self._base: weights.Shapes | None = None

    async def load(self, model: str, path: Path) -> None:
        """Raises errors.AdapterFailed, errors.EngineFailed."""
        await asyncio.to_thread(self._check, path)
        self._last_id += 1
        request = LoRARequest(lora_name=model, lora_int_id=self._last_id, lora_path=str(path))
        try:
            added = await self._llm.add_lora(request)
        except EngineDeadError as exc:
            raise errors.EngineFailed("the engine died") from exc
        except Exception as exc:
            with contextlib.suppress(Exception):
                await self._llm.remove_lora(request.lora_int_id)  # what of it may have got in
            raise errors.AdapterFailed(f"vLLM does not take it: {_reason(exc)}") from exc
        if not added:
            raise errors.AdapterFailed("vLLM does not take it, and doesn't say why")
        self._served[model] = request

    def _check(self, path: Path) -> None:
        if self._base is None:
            self._base = weights.of_base(Path(self._llm.model_config.model))
        weights.check(path, self._base)

    async def unload(self, model: str) -> None:
        request = self._served.pop(model, None)
        if request is None:
            return
        try:
            await self._llm.remove_lora(request.lora_int_id)
        except EngineDeadError as exc:
            raise errors.EngineFailed("the engine died") from exc


def _reason(exc: Exception) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text if len(text) <= _REASON else f"{text[:_REASON]}…"
