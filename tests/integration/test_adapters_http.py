"""Adapters over HTTP: by bare name and by version, rolled over with no restart; bad ones refused alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from broker import artifacts, base, client
from broker.config import BrokerConfig
from tests.integration.serving import ingress, ready, worker
from tests.pushing import files, push
from tests.waiting import LIMIT, until
from workers.engines import sim

pytestmark = pytest.mark.anyio


@dataclass
class Under:
    http: httpx.AsyncClient
    broker: base.Broker

    async def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "x", "max_tokens": 9}
        return await self.http.post("/v1/completions", json=body)

    async def says(self, model: str, version: str) -> bool:
        """Whether `version` is what answers to `model`."""
        response = await self.ask(model)
        expected = sim.text_of(sim.expected_tokens(sim.tokenize("x"), 9, adapter=version))
        return response.status_code == 200 and response.json()["choices"][0]["text"] == expected


@contextlib.asynccontextmanager
async def under(nats_url: str) -> AsyncIterator[Under]:
    config = BrokerConfig(url=nats_url)
    async with (
        worker(config, model="sim"),
        ingress(config) as url,
        await client.connect(config, "test") as broker,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=LIMIT) as http,
    ):
        await until(lambda: ready(http))
        yield Under(http, broker)


async def test_a_pushed_adapter_is_served_at_once_and_rolls_over(nats_url: str) -> None:
    async with under(nats_url) as made:
        await push(made.broker, "ada")
        await until(lambda: made.says("ada", "ada@1"))
        await push(made.broker, "ada", files(seed=2))
        await until(lambda: made.says("ada", "ada@2"))
        assert await made.says("ada@1", "ada@1")
        assert (await made.ask("ada@7")).json()["error"]["code"] == "model_not_found"


async def test_a_bad_adapter_is_422_and_its_base_is_served(nats_url: str) -> None:
    async with under(nats_url) as made:
        await push(made.broker, "bad", files() | {artifacts.WEIGHTS: b"xx"})

        async def refused() -> bool:
            return (await made.ask("bad")).status_code == 422

        await until(refused)
        assert (await made.ask("bad")).json()["error"]["code"] == "adapter_failed"
        assert await made.says("sim", "")
