"""vLLM's own publisher of cache events, and who reads them: nothing is missed that it still has."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvstate.blocks import Blocks
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

Publish = Callable[[int], None]
"""One step, in which one block of a prompt of its own was stored."""


class Told(Blocks):
    """`names`: of the blocks that came, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[Any] = []

    def stored(self, blocks: Any, *more: Any) -> None:
        super().stored(blocks, *more)
        self.names += blocks


@asynccontextmanager
async def published(told: Blocks, keeps: int, before: int) -> AsyncIterator[Publish]:
    """A reader that comes after `before` steps, and a publisher that can repeat the last `keeps`."""
    from vllm.distributed import kv_events

    from workers.engines.vllm_events import Events

    events = Events(told)
    options = json.loads(events.option()) | {"buffer_steps": keeps}
    publisher = kv_events.EventPublisherFactory.create(kv_events.KVEventsConfig(**options))

    def publish(name: int) -> None:
        stored = kv_events.BlockStored(
            block_hashes=[name],
            parent_block_hash=None,
            token_ids=[name] * 16,
            block_size=16,
            lora_id=None,
            medium="GPU",
            lora_name=None,
        )
        publisher.publish(kv_events.KVEventBatch(ts=0.0, events=[stored]))

    try:
        for name in range(before):
            publish(name)
        await until(lambda: len(publisher._buffer) == min(keeps, before))
        events.open()
        yield publish
    finally:
        events.close()
        publisher.shutdown()


async def heard(told: Told, publish: Publish, first: int) -> None:
    """Publish until something is: who comes is not connected at once."""
    name = first

    async def came() -> bool:
        nonlocal name
        publish(name)
        name += 1
        return bool(told.names) or told._lost

    await until(came)


async def test_what_was_told_before_is_repeated() -> None:
    told = Told()
    async with published(told, keeps=10_000, before=5) as publish:
        await heard(told, publish, 5)
        count = len(told.names)
        await until(lambda: len(told.names) > 5)
        assert told.names[:count] == list(range(count))
        publish(-1)
        await until(lambda: told.names[-1] == -1)
        assert told.names == [*range(len(told.names) - 1), -1]


async def test_what_it_has_no_more_ends_the_telling() -> None:
    told = Told()
    async with published(told, keeps=2, before=5) as publish:
        await heard(told, publish, 5)
        await until(lambda: told._lost)
        assert not told.names
