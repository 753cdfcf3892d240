"""Shared fixtures. Async tests run on uvloop, as the services do (AnyIO's plugin, auto mode)."""

from __future__ import annotations

import asyncio
import logging
import socket
import socketserver
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker import client
from broker.config import BrokerConfig
from broker.server import NatsServer
from workers.config import SimConfig, WorkerConfig
from workers.engines import sim
from workers.runner import Worker


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def nats_server(anyio_backend: object, tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A nats-server of the test's own, with JetStream on disk and nothing in it."""
    async with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def nats_url(anyio_backend: object, nats_server: NatsServer) -> str:
    return nats_server.url


@pytest.fixture(autouse=True)
def prompt_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metrics server looks every 0.5 s whether to stop; the tests stop hundreds."""
    monkeypatch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.005,))


@pytest.fixture(autouse=True)
def broker_logs() -> Iterator[None]:
    """A command that ran in the test's own process has had the broker's warnings held back."""
    yield
    logging.getLogger("broker").setLevel(logging.NOTSET)


@pytest.fixture
def unused_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
async def sim_worker(nats_url: str) -> AsyncIterator[Worker]:
    """A worker with a quick simulated engine, model `sim`, serving from the test's nats-server."""
    stop = asyncio.Event()
    async with await client.connect(BrokerConfig(url=nats_url), "worker") as broker:
        engine = await sim.start(SimConfig(ttft_ms=2, itl_ms=1))
        worker = Worker(WorkerConfig(name="w1", drain_timeout=1), broker, engine)
        serving = asyncio.create_task(worker.run(stop))
        try:
            yield worker
        finally:
            stop.set()
            await serving
            await engine.close()
