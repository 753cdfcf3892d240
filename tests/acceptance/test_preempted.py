"""Batch requests on a real engine give way to an interactive one, and go on where they were."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.acceptance.conftest import SLOTS, Fleet
from tests.acceptance.streams import Clients, Stream
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]

TOKENS = 160
BEGUN = 10
"""Tokens that each running batch answer has before the interactive request comes."""


@pytest.fixture
async def clients(fleet: Fleet) -> AsyncIterator[Clients]:
    async with Clients(fleet.url) as made:
        yield made


def asked(tier: str, content: str, tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "service_tier": tier,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


async def test_batch_gives_way_with_its_progress(clients: Clients) -> None:
    asks = [asked("flex", f"Tell of {n} mills.", TOKENS) for n in range(2 * SLOTS)]
    batch = [Stream(clients, "chat", ask) for ask in asks]
    read = [asyncio.create_task(_read(each)) for each in batch]
    await until(lambda: sum(each.tokens >= BEGUN for each in batch) >= SLOTS)
    urgent = await _read(Stream(clients, "chat", asked("priority", "What is the capital of France?", 8)))
    assert "Paris" in urgent.text
    assert not any(task.done() for task in read)
    await asyncio.gather(*read)
    for each in batch:
        assert (len(each.ids), each.usage, each.reason) == (TOKENS, TOKENS, "length"), each.request_id
    gave_way = [n for n, each in enumerate(batch) if len(each.epochs()) > 1]
    assert 1 <= len(gave_way) < SLOTS
    # Alone it says the same, until bf16 sums, which depend on what runs beside it, choose another word.
    alone = await _read(Stream(clients, "chat", asks[gave_way[0]]))
    pairs = zip(alone.ids, batch[gave_way[0]].ids, strict=True)
    assert sum(itertools.takewhile(bool, (a == b for a, b in pairs))) >= BEGUN


async def _read(stream: Stream) -> Stream:
    await stream.begin()
    return await stream.read()
