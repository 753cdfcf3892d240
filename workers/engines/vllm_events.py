"""Reads what vLLM tells of its prefix cache into a `kvstate.blocks.Blocks`.

vLLM's EngineCore publishes over ZeroMQ each block that it takes into the cache and evicts, in numbered
batches, and repeats the last ones when asked. Sockets are files of a directory of our own. Written against
vLLM 0.32; what it adds to an event does no harm.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq.asyncio
from zmq.constants import DEALER, RCVHWM, SUB

from kvstate.blocks import Blocks

_log = logging.getLogger(__name__)

_REPEATED = 1024
"""Batches, one a step, that vLLM keeps to repeat them."""
_PATIENCE = 5.0
"""Seconds for it to repeat what we missed."""
_END = (1 << 64) - 1
"""In place of a number: it has repeated all."""

_KINDS = (None, "full_attention", "mla_attention")
"""Where a model has several kinds of layers: those of which a prompt needs every block."""


_PREFIX = "headrace-kv-"


def _sweep() -> None:
    """Remove what workers left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            pass  # none of ours


class Events:
    """See the module. Owned by the worker's event loop; `open` it once EngineCore is there."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        _sweep()
        self._folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
        self._next = 0
        self._group: int | None = None
        self._context = zmq.asyncio.Context()
        self._reading: asyncio.Task[None] | None = None

    def option(self) -> str:
        """vLLM's `--kv-events-config`."""
        return json.dumps(
            {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"ipc://{self._folder}/events",
                "replay_endpoint": f"ipc://{self._folder}/again",
                "buffer_steps": _REPEATED,
                "hwm": 0,
            }
        )

    def open(self) -> None:
        socket = self._context.socket(SUB)
        socket.setsockopt(RCVHWM, 0)
        socket.subscribe(b"")
        socket.connect(f"ipc://{self._folder}/events")
        self._reading = asyncio.create_task(self._read(socket))

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        """Until something is missed that it does not repeat: then the cache is not told of any more."""
        try:
            while True:
                _, number, payload = await socket.recv_multipart()
                if (count := int.from_bytes(number, "big")) > self._next:
                    await self._catch_up(count)
                self._take(count, payload)
        except (TimeoutError, LookupError, TypeError, ValueError, msgspec.DecodeError):
            _log.warning("what vLLM's cache holds is not known any more: it is guessed", exc_info=True)
            self._blocks.lose()
        finally:
            socket.close(linger=0)  # else what is told further would pile up in it

    async def _catch_up(self, upto: int) -> None:
        """Those before `upto` that were missed. Raises LookupError when vLLM has them no more."""
        with self._context.socket(DEALER) as socket:
            socket.connect(f"ipc://{self._folder}/again")
            await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
            async with asyncio.timeout(_PATIENCE):
                while True:
                    *_, number, payload = await socket.recv_multipart()
                    if (count := int.from_bytes(number, "big")) == _END:
                        break
                    if count == self._next and count < upto:
                        self._take(count, payload)
        if self._next < upto:
            raise LookupError(f"vLLM told {self._next} to {upto - 1}, and does not repeat them")

    def _take(self, count: int, payload: bytes) -> None:
        if count != self._next:
            return
        self._next += 1
        for event in msgspec.msgpack.decode(payload)[1]:
            self._tell(event)

    def _tell(self, event: Mapping[str, Any]) -> None:
        kind, group = event["type"], event.get("group_idx")
        if kind == "AllBlocksCleared":
            self._blocks.cleared()
        elif event.get("medium") not in (None, "GPU"):
            return  # where a connector keeps copies
        elif kind == "BlockStored":
            if self._group is None and event.get("kv_cache_spec_kind") in _KINDS:
                self._group = group or 0
            if (group or 0) == self._group:
                blocks = event["block_hashes"]
                extras = event.get("extra_keys") or [None] * len(blocks)
                self._blocks.stored(
                    blocks,
                    event["parent_block_hash"],
                    event["token_ids"],
                    event["block_size"],
                    [_hashable(each) for each in extras],
                )
        elif kind == "BlockRemoved" and (group or 0) == self._group:
            self._blocks.removed(event["block_hashes"])


def _hashable(extra: Any) -> Any:
    return tuple(map(_hashable, extra)) if isinstance(extra, list) else () if extra is None else extra
