"""Batch requests on a real engine give way to an interactive one, and go on where they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker import base, subjects
from broker.messages import Command, Dispatch
from tests.acceptance.conftest import SLOTS, Fleet
from tests.acceptance.streams import NOISE, Clients, Stream, lead
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]

TOKENS = 160
BEGUN = 10
"""Tokens that each running batch answer has before the interactive request comes."""


@pytest.fixture
async def clients(fleet: Fleet) -> AsyncIterator[Clients]:
    async with Clients(fleet.url) as made:
        yield made


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def asked(tier: str, content: str, tokens: int) -> dict[str, Any]:
    return {
        "messages": said(content),
        "max_tokens": tokens,
        "temperature": 0,
        "service_tier": tier,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


async def read(stream: Stream) -> Stream:
    await stream.begin()
    return await stream.read()


async def test_batch_gives_way_with_its_progress(fleet: Fleet, clients: Clients) -> None:
    words: list[Dispatch] = []
    taken_back: list[str] = []

    def commanded(message: base.Message) -> None:
        command = Command.model_validate_json(message.data)
        if command.do == "preempt":
            taken_back.append(command.request.partition(".")[2])

    dispatch = await fleet.broker.subscribe(
        subjects.DISPATCH, lambda told: words.append(Dispatch.model_validate_json(told.data))
    )
    commands = await fleet.broker.subscribe(subjects.ALL_COMMANDS, commanded)
    await until(lambda: words and words[-1].bases)  # else workers pull, and nobody is preempted
    await dispatch.close()
    prompts = [f"Tell of {number} mills." for number in range(2 * SLOTS)]
    batch = [Stream(clients, "chat", asked("flex", prompt, TOKENS)) for prompt in prompts]
    reading = [asyncio.create_task(read(each)) for each in batch]
    await until(lambda: sum(each.tokens >= BEGUN for each in batch) >= SLOTS)
    urgent = await read(Stream(clients, "chat", asked("priority", "What is a sluice?", 8)))
    assert len(urgent.ids) == 8
    assert not any(task.done() for task in reading)
    await asyncio.gather(*reading)
    for each in batch:
        assert (len(each.ids), each.usage, each.reason) == (TOKENS, TOKENS, "length"), each.request_id
    await commands.close()
    gave_way = [n for n, each in enumerate(batch) if each.request_id in taken_back]
    assert 1 <= len(gave_way) < SLOTS
    for number in gave_way:
        assert len(batch[number].epochs()) > 1
        assert await lead(clients, said(prompts[number]), batch[number].text) <= NOISE
