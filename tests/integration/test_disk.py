"""No room in the queue, the storage, or on the disk: told clearly, nothing lost, well again by itself."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest

from broker import base, client, errors, subjects
from broker.config import BrokerConfig
from broker.server import NatsServer
from tests.integration.serving import ingress, ready, worker
from tests.integration.test_up import complete, running, wait
from tests.waiting import LIMIT, until

CHAT = "/v1/chat/completions"
SMALL = {
    "max_queued_bytes": 4 * 2**20,
    "payload_bytes": 2**20,
    "artifact_bytes": 2**20,
    "usage_bytes": 2**20,
    "dead_bytes": 2**20,
}
LATER = "req.later.standard.acme.later"


class Bounded(NatsServer):
    """A nats-server that may keep `storage` bytes on disk."""

    storage = 2**40

    def _config(self) -> str:
        config = json.loads(super()._config())
        config["jetstream"]["max_file_store"] = self.storage
        return json.dumps(config)


def chat(size: int = 2, model: str = "sim") -> dict[str, Any]:
    return {"model": model, "max_tokens": 3, "messages": [{"role": "user", "content": "x" * size}]}


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert (response.status_code, response.headers["retry-after"]) == (status, "1")
    error = response.json()["error"]
    assert error["code"] == code
    return str(error["message"])


def http(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False)


async def keep(broker: base.Broker, data: bytes) -> None:
    """A request that is accepted, for workers who come later."""
    await (await broker.enqueue(LATER, data))


async def kept(broker: base.Broker) -> list[bytes]:
    return [record.data for record in await broker.read(subjects.REQUESTS, LATER)]


async def test_a_queue_full_by_bytes_is_429_until_there_is_room(nats_server: NatsServer) -> None:
    config = BrokerConfig(url=nats_server.url, **SMALL)
    async with (
        await client.connect(config, "test") as broker,
        worker(config, model="sim"),
        ingress(config) as url,
        http(url) as asking,
    ):
        await until(lambda: ready(asking))
        for _ in range(3):
            await keep(broker, bytes(2**20))
        response = await asking.post(CHAT, json=chat(2**20))
        assert "queue is full" in refused(response, 429, "overloaded")
        assert len(await kept(broker)) == 3
        assert await broker.delete(subjects.REQUESTS, 1)
        assert (await asking.post(CHAT, json=chat(1000))).status_code == 200


async def test_storage_that_others_use_up_is_503_until_there_is_room(tmp_path: Path) -> None:
    server = Bounded(tmp_path)
    server.storage = 16 * 2**20
    async with server:
        config = BrokerConfig(url=server.url, **SMALL)
        async with (
            await client.connect(config, "test") as broker,
            worker(config, model="sim"),
            ingress(config) as url,
            http(url) as asking,
        ):
            await until(lambda: ready(asking))
            await keep(broker, b"kept")
            neighbour = await nats.connect(server.url)
            stream = neighbour.jetstream(timeout=LIMIT)
            await stream.add_stream(name="OTHERS", subjects=["others"])
            with suppress(nats.js.errors.APIError):
                for _ in range(20):
                    await stream.publish("others", bytes(2**20))
            response = await asking.post(CHAT, json=chat())
            assert "storage is full" in refused(response, 503, "unavailable")
            await stream.purge_stream("OTHERS")
            assert (await asking.post(CHAT, json=chat())).status_code == 200
            assert await kept(broker) == [b"kept"]
            await neighbour.close()


async def test_a_server_without_room_for_the_streams_says_so(tmp_path: Path) -> None:
    server = Bounded(tmp_path)
    server.storage = 16 * 2**20
    async with server:
        with pytest.raises(
            errors.Unavailable, match=r"no room for the 8,589,934,592 bytes of stream REQUESTS"
        ):
            await client.connect(BrokerConfig(url=server.url), "test")


async def test_a_restart_with_less_room_keeps_the_streams_that_are(tmp_path: Path) -> None:
    """JetStream gives itself three quarters of what is free when it starts."""
    server = Bounded(tmp_path)
    async with server:
        config = BrokerConfig(url=server.url)
        async with await client.connect(config, "test") as broker:
            await keep(broker, b"first")
            await server.stop()
            server.storage = 16 * 2**20
            await server.start()
            async with worker(config, model="sim"), ingress(config) as url, http(url) as asking:
                await until(lambda: ready(asking))
                assert (await asking.post(CHAT, json=chat())).status_code == 200
            await until(lambda: broker.connected)
            await keep(broker, b"second")
            assert await kept(broker) == [b"first", b"second"]


async def test_a_server_with_room_is_not_full(nats_server: NatsServer) -> None:
    assert not await nats_server.full()
    async with await client.connect(BrokerConfig(url=nats_server.url), "test"):
        assert not await nats_server.full()
        await nats_server.stop()
        assert not await nats_server.full()


# A disk of its own


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB in memory."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a disk to fill")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all there is."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def ask(url: str, size: int) -> tuple[int, str | None, dict[str, Any]]:
    request = urllib.request.Request(
        f"{url}{CHAT}", json.dumps(chat(size)).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as response:
            return response.status, None, json.load(response)
    except urllib.error.HTTPError as exc:
        return exc.code, exc.headers["Retry-After"], json.load(exc)


async def test_a_full_disk_is_503_and_the_fleet_is_well_again_with_room(disk: Path) -> None:
    settings = [f"broker.{name}={value}" for name, value in SMALL.items()] + ["scheduler.orphan_after=3600"]
    flags = [part for setting in settings for part in ("--set", setting)]
    with running(disk / "data", *flags) as up:
        config = BrokerConfig(url=up.nats, **SMALL)
        async with await client.connect(config, "test", make_streams=False) as broker:
            await keep(broker, b"kept")
        assert complete(up.urls[0], up.model)["usage"]["completion_tokens"] == 3
        filler = fill(disk)
        status, again, body = ask(up.urls[0], 500_000)
        assert (status, again, body["error"]["code"]) == (503, "1", "unavailable")
        wait(lambda: "the disk is full" in (disk / "data" / "stderr").read_text())
        async with await client.connect(config, "test", make_streams=False) as broker:
            with pytest.raises(errors.Unavailable, match="no space left"):
                await broker.delete(subjects.REQUESTS, 1)
        assert ask(up.urls[0], 10)[0] == 503
        filler.unlink()
        wait(lambda: ask(up.urls[0], 10)[0] == 200)
        async with await client.connect(config, "test", make_streams=False) as broker:
            assert await kept(broker) == [b"kept"]
