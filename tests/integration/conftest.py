"""A nats-server and two ingresses for a whole module, which may put others in their place."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest

from broker import base, client
from broker.config import BrokerConfig
from broker.server import NatsServer
from tests.integration.reading import connected
from tests.integration.serving import ingress, ready, worker
from tests.waiting import until


@pytest.fixture(scope="module")
async def config(
    anyio_backend: object, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[BrokerConfig]:
    async with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield BrokerConfig(url=server.url)


@pytest.fixture(scope="module")
async def broker(config: BrokerConfig) -> AsyncIterator[base.Broker]:
    async with await client.connect(config, "test") as connection:
        yield connection


@pytest.fixture(scope="module")
async def https(config: BrokerConfig, broker: base.Broker) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client for each of two ingresses before one worker."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(worker(config, model="sim", itl_ms=10))
        urls = [await stack.enter_async_context(ingress(config, keepalive=0.05)) for _ in range(2)]
        found = [await stack.enter_async_context(connected(url)) for url in urls]
        for http in found:
            await until(lambda http=http: ready(http))  # type: ignore[misc]
        yield found
