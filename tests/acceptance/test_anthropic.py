"""The official Anthropic client on `/v1/messages`."""

from __future__ import annotations

import anthropic
import pytest

from tests.acceptance.conftest import MODEL, Fleet

GREEDY = {"temperature": 0}
"""Newer clients have no argument for it."""

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]


async def test_messages(anthropic_client: anthropic.AsyncAnthropic) -> None:
    whole = await anthropic_client.messages.create(
        model=MODEL,
        max_tokens=24,
        extra_body=GREEDY,
        system="You are a miller.",
        messages=[{"role": "user", "content": "Who are you?"}],
    )
    assert whole.role == "assistant"
    assert whole.content[0].type == "text"
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert 0 < whole.usage.output_tokens <= 24
    async with anthropic_client.messages.stream(
        model=MODEL,
        max_tokens=24,
        extra_body=GREEDY,
        system="You are a miller.",
        messages=[{"role": "user", "content": "Who are you?"}],
    ) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_a_tool_is_used(anthropic_client: anthropic.AsyncAnthropic) -> None:
    answer = await anthropic_client.messages.create(
        model=MODEL,
        max_tokens=60,
        extra_body=GREEDY,
        tools=[
            {
                "name": "get_weather",
                "description": "Weather of a city",
                "strict": True,
                "input_schema": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 12}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            }
        ],
        tool_choice={"type": "tool", "name": "get_weather"},
        messages=[{"role": "user", "content": "Weather in Oslo?"}],
    )
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert use.name == "get_weather"
    assert answer.stop_reason == "tool_use"


async def test_count_tokens(anthropic_client: anthropic.AsyncAnthropic) -> None:
    counted = await anthropic_client.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": "Who are you?"}]
    )
    assert counted.input_tokens == 34


async def test_errors_are_anthropics(fleet: Fleet, anthropic_client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no-such-model") as unknown:
        await anthropic_client.messages.create(
            model="no-such-model", max_tokens=4, messages=[{"role": "user", "content": "x"}]
        )
    assert MODEL in str(unknown.value)
    with pytest.raises(anthropic.BadRequestError) as refused:
        await anthropic_client.messages.create(
            model=MODEL, max_tokens=10**6, messages=[{"role": "user", "content": "x"}]
        )
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["message"]
