"""Shared fixtures. Async tests run on uvloop, as the services do (AnyIO's plugin, auto mode)."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.server import NatsServer


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


@pytest.fixture
def unused_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
