"""Two real bases on the CPU that take turns in the memory for one."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httpx
import pytest

from broker import base, client, subjects
from broker.config import BrokerConfig
from broker.messages import PoolBeat, UsageEvent
from ops import demo_model
from tests.integration.fleet import Fleet
from tests.integration.serving import ready
from tests.waiting import until

ROOT = Path(__file__).parents[2]
KV = 128 * 2**20
LIMIT = 240.0
CHAT = "/v1/chat/completions"


def pool_of_two(directory: Path) -> Path:
    """The demo model and a second copy of it under another name; `memory` holds one and a half."""
    model = demo_model.ensure(ROOT / ".data", progress=True)
    second = directory / "Second-135M"
    second.symlink_to(model)
    settings = f'settings = {{ "vllm.kv_cache_bytes" = {KV}, "vllm.max_num_seqs" = 4 }}'
    file = directory / "pool.toml"
    file.write_text(
        f"""
        [pool]
        name = "p"
        memory = "700MiB"
        linger = 0.5
        turn_factor = 0.5
        starve_after = 5
        idle_least = 600
        [[base]]
        name = "{demo_model.NAME}"
        model = "{model}"
        {settings}
        [[base]]
        name = "{second.name}"
        model = "{second}"
        {settings}
        """
    )
    return file


@pytest.mark.vllm
@pytest.mark.timeout(400)
async def test_two_bases_swap_in_memory_for_one_and_every_request_is_answered(tmp_path: Path) -> None:
    file = pool_of_two(tmp_path)
    names = (demo_model.NAME, "Second-135M")
    beats: list[PoolBeat] = []
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(Fleet(tmp_path / "fleet"))
        await fleet.start("scheduler")
        ingress = await fleet.start("ingress")
        await fleet.start("worker", pool=file, worker__engine="vllm")
        broker = await stack.enter_async_context(
            await client.connect(BrokerConfig(url=fleet.nats.url), "test")
        )
        await broker.subscribe(
            subjects.ALL_POOLS, lambda message: beats.append(PoolBeat.model_validate_json(message.data))
        )
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=ingress.url, timeout=LIMIT, trust_env=False)
        )
        await until(lambda: ready(http))

        async def ask(model: str, request_id: str) -> str:
            body = {
                "model": model,
                "temperature": 0,
                "max_tokens": 16,
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
            }
            response = await http.post(CHAT, json=body, headers={"X-Request-Id": request_id})
            assert response.status_code == 200, response.text
            found = response.json()
            assert found["model"] == model
            return str(found["choices"][0]["message"]["content"])

        # Both at once while neither serves: one starts, and the other's wait until it is their turn.
        asks = (ask(names[n % 2], f"r{n}") for n in range(8))
        texts = await asyncio.gather(*asks)
        assert all(texts), texts
        for n in (8, 9):  # one of them is gone by now
            assert await ask(names[n % 2], f"r{n}")
        told = await until(lambda: served(broker, 10))
        assert told == {f"r{n}": names[n % 2] for n in range(10)}
        hot = [tuple(each.base for each in beat.instances if each.memory) for beat in beats]
        assert {len(names) for names in hot} <= {0, 1}, "the memory holds one"
        assert all(beat.used <= beat.memory for beat in beats)
        turns = [names for n, names in enumerate(hot) if names and (n == 0 or hot[n - 1] != names)]
        assert len(turns) >= 3, turns
        resident = max(each.resident for beat in beats for each in beat.instances)
        print(f"an engine took {resident / 2**20:.0f} MiB of the machine's memory")  # noqa: T201


async def served(broker: base.Broker, n: int) -> dict[str, str] | None:
    """What served each of the finished requests, once there are `n`."""
    records = await broker.read(subjects.USAGE, subjects.ALL_USAGE)
    events = [UsageEvent.model_validate_json(record.data) for record in records]
    found = {event.request_id: event.model for event in events if event.outcome == "finished"}
    return found if len(found) >= n else None
