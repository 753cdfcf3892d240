"""Three clustered nats-servers of which one dies: no stream breaks, and what needs an election waits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker import base, client, errors, subjects
from broker.client import NatsBroker
from broker.config import BrokerConfig
from broker.messages import ServiceClass
from broker.server import NatsServer
from tests.chaos.check import Ask, Transcript, check
from tests.chaos.clients import Manner, Request
from tests.integration import serving
from tests.integration.cluster import NatsCluster
from tests.integration.fleet import Fleet
from tests.waiting import LIMIT, until

# nats-py leaves the socket of a server that dies while it greets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function StreamWriter:pytest.PytestUnraisableExceptionWarning"
)

STREAMS = 20
TOKENS = 150
PACE = 0.02

SILENCE = 2.0
"""Seconds that a stream may be silent when a node dies: the promise itself, which no other test holds. It
needs no headroom: 0.06 s are usual, 0.3 s with the cores overbooked threefold."""


@pytest.fixture
async def cluster(anyio_backend: object, tmp_path: Path) -> AsyncIterator[NatsCluster]:
    async with NatsCluster(tmp_path / "nats") as started:
        yield started


@contextlib.asynccontextmanager
async def fleet(config: BrokerConfig) -> AsyncIterator[list[str]]:
    """URLs of two ingresses, with two workers behind them."""
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(await client.connect(config, "under test"))
        beats: set[str] = set()
        await broker.subscribe(subjects.ALL_HEARTBEATS, lambda message: beats.add(message.subject))
        for n in range(2):
            settings = {"name": f"w{n}", "itl_ms": PACE * 1000}
            await stack.enter_async_context(serving.worker(config, **settings))
        await until(lambda: len(beats) == 2)
        urls = [await stack.enter_async_context(serving.ingress(config)) for _ in range(2)]
        async with httpx.AsyncClient(trust_env=False) as http:
            for url in urls:
                await until(lambda url=url: ready(http, url))  # type: ignore[misc]
        yield urls


async def ready(http: httpx.AsyncClient, url: str) -> bool:
    return (await http.get(f"{url}/health/ready")).status_code == 200


class Asked:
    def __init__(self, http: httpx.AsyncClient, urls: list[str], count: int, manner: Manner) -> None:
        stream = manner is not Manner.WHOLE
        name = f"{time.monotonic_ns()}-{{}}".format
        asks = [Ask(name(n), "/v1/chat/completions", f"stream {n}", TOKENS, 1, stream) for n in range(count)]
        requests = [
            Request(http, ask, manner, 0, lambda: urls, random.Random(n)) for n, ask in enumerate(asks)
        ]
        self.seen = [request.seen for request in requests]
        self._running = [asyncio.create_task(request.run()) for request in requests]

    async def ended(self) -> list[Transcript]:
        await asyncio.gather(*self._running)
        return self.seen


async def asked(http: httpx.AsyncClient, urls: list[str], count: int, manner: Manner = Manner.CHAT) -> Asked:
    """Requests under way, each at its tenth event of tokens if it streams."""
    asked = Asked(http, urls, count, manner)
    if manner is not Manner.WHOLE:
        await until(lambda: all(len(seen.tokens) > 10 for seen in asked.seen))
    return asked


def longest_silence(seen: list[Transcript]) -> float:
    """Between two tokens of a stream, or from its last one to its end."""
    times = ([*(part.at for part in one.tokens), one.ended] for one in seen)
    return max(later - sooner for one in times for sooner, later in itertools.pairwise(one))


@pytest.fixture
async def http(anyio_backend: object) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=LIMIT, trust_env=False) as opened:
        yield opened


@pytest.mark.chaos
async def test_no_stream_breaks_when_a_node_dies(
    cluster: NatsCluster, http: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each node in its turn, so that it was everything once: leader of the queue, leader of the journal,
    follower, and what an ingress or a worker is connected to."""
    async with fleet(cluster.config) as urls:
        for number in range(3):
            leads = [s for s in (subjects.REQUESTS, subjects.REPLIES) if await cluster.leader(s) == number]
            streams = await asked(http, urls, STREAMS)
            await cluster.kill(number)
            seen = await streams.ended()
            silence = longest_silence(seen)
            with capsys.disabled():
                role = f"leader of {' and '.join(leads)}" if leads else "a follower"
                sys.stdout.write(f"\n{role} killed: longest silence of a stream {silence:.3f} s ")
            assert [problem for one in seen for problem in check(one)] == []
            assert silence < SILENCE
            await cluster.nodes[number].start()
            await until(lambda: cluster.healthy())


async def test_a_worker_that_dies_while_the_journal_has_no_leader_takes_nothing_with_it(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """What it said meanwhile is in no journal: who reads the streams has it, and tells."""
    cluster = NatsCluster(tmp_path / "nats")
    async with Fleet(tmp_path, cluster) as processes:
        await processes.start("scheduler")
        pace = {"sim__ttft_ms": 2, "sim__itl_ms": PACE * 1000}
        dying, _ = [await processes.start("worker", worker__name=f"w{n}", **pace) for n in range(2)]
        urls = [(await processes.start("ingress")).url]
        await until(lambda: ready(http, urls[0]))
        streams = await asked(http, urls, STREAMS)
        leader = await cluster.leader(subjects.REPLIES)
        assert leader is not None
        await cluster.kill(leader)
        before = [len(seen.tokens) for seen in streams.seen]
        await until(lambda: all(len(s.tokens) > n + 5 for s, n in zip(streams.seen, before, strict=True)))
        await dying.kill()
        seen = await streams.ended()
        assert "w0" in {one.worker for one in seen}
        assert [problem for one in seen for problem in check(one)] == []


async def test_with_no_node_left_the_ingress_says_so_and_recovers_by_itself(
    cluster: NatsCluster, http: httpx.AsyncClient
) -> None:
    async with fleet(cluster.config) as urls:
        for number in range(3):
            await cluster.kill(number)
        refused = await http.post(f"{urls[0]}/v1/chat/completions", json=chat("lost"))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] in ("unavailable", "unconfirmed")
        assert int(refused.headers["retry-after"]) >= 1
        await cluster.start()

        async def answers() -> str | None:
            response = await http.post(f"{urls[0]}/v1/chat/completions", json=chat("found"))
            if response.status_code == 503:
                return None
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["message"]["content"])

        assert await until(answers) == serving.answer("found", 5)


def chat(content: str) -> dict[str, Any]:
    return {"model": "sim", "max_tokens": 5, "messages": [{"role": "user", "content": content}]}


class Box:
    """Deliveries, acknowledged as they come."""

    def __init__(self) -> None:
        self.got: list[base.Delivery] = []
        self._acks: set[asyncio.Task[None]] = set()

    def __call__(self, delivery: base.Delivery) -> None:
        self.got.append(delivery)
        self._acks.add(asyncio.create_task(delivery.ack()))


async def test_a_pull_outlives_the_leader_of_its_consumer(cluster: NatsCluster) -> None:
    """Only that leader knew of it; the connection that asked stays as it is."""
    config = cluster.config
    async with await client.connect(config, "publisher") as publisher:
        box = Box()
        async with await client.connect(config, "puller") as broker:
            asks: list[asyncio.Task[None]] = []
            puller = await broker.pull(
                "m", ServiceClass.BATCH, box, lambda: asks.append(asyncio.create_task(puller.ask(1)))
            )
            await puller.ask(1)
            leader = await consumer_leader(broker, cluster)
            connected = f"nats://{broker._nc.connected_url.netloc}"  # type: ignore[union-attr]
            if cluster.nodes[leader].url == connected:
                await broker._api(f"CONSUMER.LEADER.STEPDOWN.{subjects.REQUESTS}.m_batch", {})
                (leader,) = await until(lambda: another_leader(broker, cluster, leader))
            await cluster.kill(leader)
            await until(lambda: stored(publisher))
            await until(lambda: box.got)
            assert broker._nc.stats["reconnects"] == 0


async def consumer_leader(broker: NatsBroker, cluster: NatsCluster) -> int:
    info = await broker._api(f"CONSUMER.INFO.{subjects.REQUESTS}.m_batch", {})
    return cluster.number(info["cluster"]["leader"])


async def another_leader(broker: NatsBroker, cluster: NatsCluster, than: int) -> list[int]:
    with contextlib.suppress(errors.Unavailable, KeyError):
        number = await consumer_leader(broker, cluster)
        return [] if number == than else [number]
    return []


async def stored(broker: NatsBroker) -> bool:
    try:
        await (await broker.enqueue("req.m.batch.a.m", b"{}"))
    except errors.Unavailable:
        return False
    return True


class TestASingleServer:
    async def test_restarted_under_load_loses_nothing_accepted(
        self, nats_server: NatsServer, http: httpx.AsyncClient
    ) -> None:
        async with fleet(BrokerConfig(url=nats_server.url, ack_wait=2)) as urls:
            whole = await asked(http, urls, STREAMS, Manner.WHOLE)
            streams = await asked(http, urls, STREAMS)
            await nats_server.stop()
            await nats_server.start()
            for seen in await whole.ended():
                assert check(seen) == []
            # The journal went with the server: what was on the wire is published again.
            for seen in await streams.ended():
                assert check(seen) == []

    async def test_a_journal_lost_is_noticed(
        self, nats_server: NatsServer, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Frames that die in the server's socket, and that no writer has either, are never skipped."""
        monkeypatch.setattr(client, "_TAIL_BYTES", 0)
        async with fleet(BrokerConfig(url=nats_server.url)) as urls:
            streams = await asked(http, urls, STREAMS)
            assert nats_server.pid is not None
            os.kill(nats_server.pid, signal.SIGSTOP)
            reached = [len(seen.tokens) for seen in streams.seen]
            await asked_anew_in_vain(http, urls)  # it takes as long as many tokens
            os.kill(nats_server.pid, signal.SIGKILL)
            await nats_server.stop()
            await nats_server.start()
            for seen, count in zip(await streams.ended(), reached, strict=True):
                assert seen.fault.startswith("frames_lost")
                assert count <= len(seen.tokens) < TOKENS
                assert holds_together(seen)


async def asked_anew_in_vain(http: httpx.AsyncClient, urls: list[str]) -> None:
    response = await http.post(f"{urls[0]}/v1/chat/completions", json=chat("in vain"))
    assert response.status_code == 503


def holds_together(seen: Transcript) -> bool:
    """Whether what came is a beginning of the answer without a hole."""
    return {problem.kind for problem in check(seen)} == {"interrupted"}


async def test_a_process_that_ends_while_the_journal_has_no_leader_leaves_it_its_frames(
    cluster: NatsCluster,
) -> None:
    subject = subjects.reply("acme", "box", "last words")
    async with await client.connect(cluster.config, "reader") as reader:
        async with await client.connect(cluster.config, "worker") as worker:
            leader = await cluster.leader(subjects.REPLIES)
            assert leader is not None
            await cluster.kill(leader)
            await until(lambda: worker.connected and reader.connected)
            await worker.publish(subject, b"the end")

        async def kept() -> bool:
            with contextlib.suppress(errors.Unavailable):
                return b"the end" in {r.data for r in await reader.read(subjects.REPLIES, subject)}
            return False

        await until(kept)


async def test_a_worker_that_starts_while_the_queue_has_no_leader_waits_for_one(cluster: NatsCluster) -> None:
    async with await client.connect(cluster.config, "worker") as worker:
        leader = await cluster.leader(subjects.REQUESTS)
        assert leader is not None
        await cluster.kill(leader)
        await until(lambda: worker.connected)
        queue = await worker.pull("late", ServiceClass.STANDARD, lambda delivery: None, lambda: None)
        await queue.close()
