"""A whole fleet with the real engine, as `headrace up` starts it, once for all acceptance tests."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import anthropic
import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker import base, client, processes
from broker.config import BrokerConfig
from broker.messages import UsageEvent
from ops import demo_model, ports
from tests.waiting import LIMIT, until

ROOT = Path(__file__).parents[2]
MODEL = demo_model.NAME
SLOTS = 4
ADAPTER_SLOTS = 2
START_LIMIT = 120.0


@dataclass(frozen=True)
class Fleet:
    """`process` is `headrace up`; `broker` is a connection of the tests' own."""

    url: str
    nats: str
    logs: Path
    metrics: str
    process: asyncio.subprocess.Process
    broker: base.Broker

    async def usage(self, request_id: str) -> UsageEvent:
        """The one usage event of a request, once it is there."""

        async def found() -> list[UsageEvent]:
            records = await self.broker.read("USAGE", "usage.>")
            events = [UsageEvent.model_validate_json(record.data) for record in records]
            return [event for event in events if event.request_id == request_id]

        await until(found)
        (event,) = await found()
        return event

    async def sample(self, name: str, **labels: str) -> float:
        """The sum of the worker's Prometheus samples under a name."""
        async with httpx.AsyncClient(trust_env=False) as http:
            text = (await http.get(self.metrics)).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def running(self) -> float:
        return await self.sample("headrace_engine", figure="running")

    async def idle(self) -> bool:
        """Nothing runs or waits in the engine, and all its KV blocks are free."""
        figures = {
            figure: await self.sample("headrace_engine", figure=figure)
            for figure in ("running", "waiting", "kv_tokens_free", "kv_tokens_total")
        }
        busy = figures["running"] or figures["waiting"]
        return not busy and figures["kv_tokens_free"] == figures["kv_tokens_total"] > 0


@pytest.fixture(scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    data = tmp_path_factory.mktemp("fleet")
    model = demo_model.ensure(ROOT / ".data", progress=True)
    metrics_port = ports.free("127.0.0.1", 0, "worker.metrics_port")
    command = [sys.executable, "-P", "-m", "ops", "up", "--engine", "vllm", "--port", "0", "--nats-port", "0"]
    command += ["--data", str(data), "--model", str(model)]
    settings = {
        "worker.metrics_port": metrics_port,
        "worker.adapter_turn": 0.5,
        "scheduler.lost_after": 1.0,  # busy processors may silence a healthy worker for some time
        "vllm.max_num_seqs": SLOTS,
        "vllm.adapter_slots": ADAPTER_SLOTS,
        "vllm.adapters_in_memory": ADAPTER_SLOTS + 1,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=processes.bound_to_me(),
    )
    try:
        url, nats = await _ready(process, data)
        async with await client.connect(BrokerConfig(url=nats), "acceptance") as broker:
            metrics = f"http://127.0.0.1:{metrics_port}/metrics"
            yield Fleet(url, nats, data / "logs", metrics, process, broker)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.communicate(), LIMIT)
        assert process.returncode == 0, errors.decode()
        assert not [member for member in family if _lives(member)]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _ready(process: asyncio.subprocess.Process, data: Path) -> tuple[str, str]:
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), START_LIMIT)).decode()
    found = re.match(r"ready  (http://\S+)  (nats://\S+)  model " + re.escape(MODEL), line)
    assert found, f"{line!r}\n{processes.tail(data / 'logs' / 'worker.log')}"
    return found[1], found[2]


def _lives(process: psutil.Process) -> bool:
    """An orphan may stay a zombie where no init reaps it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.fixture(scope="session")
async def openai_client(fleet: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as connected:
        yield connected


@pytest.fixture(scope="session")
async def anthropic_client(fleet: Fleet) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=fleet.url, api_key="none", max_retries=0, timeout=60
    ) as connected:
        yield connected


@pytest.fixture(scope="session")
async def http(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as connected:
        yield connected
