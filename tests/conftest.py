"""Shared fixtures. Async tests run on uvloop, as the services do (AnyIO's plugin, auto mode)."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import socket
import socketserver
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from broker import client
from broker.config import BrokerConfig
from broker.server import NatsServer
from workers.config import SimConfig, WorkerConfig
from workers.engines import sim
from workers.runner import Worker

# The same examples each time, however busy the machine: what new ones find is for who looks for it, with
# --hypothesis-profile=default, not for who changes something else.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

ENGINE = re.compile(
    r"tests/(acceptance|contract/test_(adapter_engines|continuing|engines|forcing|vllm_engine))\b"
)
"""Files with tests of the real engine."""


# vLLM's threads wait for each other after each layer, and for long where a test beside it has their cores.
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one runs a whole file, whose servers are then started once, and one runs all files
    with the real engine, which take longest and come first."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "engine" if ENGINE.match(path) else path

    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a real engine says, and when, varies with what else its cores do: it is asked twice. The summary
    names who was ("RERUN"), and what is wrong stays wrong."""
    items.sort(key=lambda item: item.get_closest_marker("chaos") is not None)
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=[".*"]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Faults have the machine to themselves: they come by the clock, whether the last one is over or not."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    here = Path(__file__).parent
    with (here / "conftest.py").open() as door, (here / "chaos/test_chaos.py").open() as machine:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits for the machine lets nobody pass
        fcntl.flock(machine, fcntl.LOCK_EX if item.get_closest_marker("chaos") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


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
