"""Who hangs up stops the engine's work, wherever the request stands."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import MODEL, ROOT, SLOTS, Fleet
from tests.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]

CHAT = "/v1/chat/completions"
EXAMPLE = ROOT / "examples" / "publish_nats.py"


def endless(**more: Any) -> dict[str, Any]:
    """Over a minute of work for the engine."""
    messages = [{"role": "user", "content": "Tell me a story without an end."}]
    return {"model": MODEL, "messages": messages, "max_tokens": 1900, "ignore_eos": True} | more


class Caller:
    """A request under way in a task of its own, on a connection that `hang_up` closes."""

    def __init__(self, fleet: Fleet, **more: Any) -> None:
        self.id = uuid.uuid4().hex
        self.bytes = 0
        self._task = asyncio.create_task(self._run(fleet.url, endless(**more)))

    async def _run(self, url: str, body: dict[str, Any]) -> None:
        async with (
            httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http,
            http.stream("POST", CHAT, json=body, headers={"X-Request-Id": self.id}) as answer,
        ):
            async for part in answer.aiter_bytes():
                self.bytes += len(part)

    async def hang_up(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        assert self._task.cancelled()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_while_it_generates(fleet: Fleet, stream: bool) -> None:
    aborts = await fleet.sample("headrace_abort_seconds_count")
    caller = Caller(fleet, stream=stream)

    async def generating() -> bool:
        return caller.bytes > 1000 if stream else await fleet.running() == 1

    await until(generating)
    await caller.hang_up()
    left = time.monotonic()
    event = await fleet.usage(caller.id)
    await until(fleet.idle)
    assert time.monotonic() - left < 5  # the run itself would go on for a minute
    assert (event.outcome, event.status, event.code) == ("cancelled", 499, "cancelled")
    assert event.completion_tokens < 1900
    assert await fleet.sample("headrace_abort_seconds_count") == aborts + 1


async def test_a_disconnect_in_the_queue(fleet: Fleet) -> None:
    running = [Caller(fleet, stream=True) for _ in range(SLOTS)]

    async def full() -> bool:
        return await fleet.running() == SLOTS

    await until(full)
    queued = Caller(fleet, stream=True)

    async def waits() -> bool:
        return sum((await fleet.broker.counts("REQUESTS", "req.>")).values()) == SLOTS + 1

    await until(waits)
    await queued.hang_up()
    event = await fleet.usage(queued.id)
    assert event.outcome == "cancelled"
    assert event.prompt_tokens == event.completion_tokens == 0
    assert await fleet.running() == SLOTS  # the others never noticed
    for caller in running:
        await caller.hang_up()
    for caller in running:
        assert (await fleet.usage(caller.id)).completion_tokens > 0
    await until(fleet.idle)
    assert await fleet.broker.counts("REQUESTS", "req.>") == {}


async def example(fleet: Fleet, *arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", str(EXAMPLE), "Tell me of the mill.", "--nats", fleet.nats, "--model", MODEL),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def test_a_publisher_on_nats_streams_and_cancels(fleet: Fleet) -> None:
    status, text, noise = await example(fleet, "--max-tokens", "16")
    assert status == 0, noise
    assert text.strip()
    assert "completion_tokens" in noise
    status, text, noise = await example(fleet, "--max-tokens", "1800", "--cancel-after", "4")
    assert status == 0, noise
    assert text.strip()
    assert "499 cancelled" in noise
    await until(fleet.idle)
