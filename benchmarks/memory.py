"""Resident memory with 1,000 streams open and idle: each has its first token and waits for the second."""

from __future__ import annotations

import resource
import selectors
import socket
import time
from typing import Any, cast
from urllib.parse import urlsplit

from benchmarks import fleet, results
from benchmarks.load import Load, request_bytes

STREAMS = 1000
SETTLE = 2.0
"""Seconds of idleness before the reading."""
LIMIT = 60.0
"""Seconds for all streams to get their first token."""


def run(quick: bool) -> dict[str, Any]:
    streams = 100 if quick else STREAMS
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * STREAMS), hard))
    with fleet.up("sim", sim__ttft_ms=20, sim__itl_ms=600_000, sim__max_num_seqs=2 * STREAMS) as up:
        parts = {name: up.part(name) for name in ("ingress", "worker", "scheduler", "nats-server")}
        before = {name: round(fleet.rss_mib(part), 1) for name, part in parts.items()}
        sockets = _open(Load(up.url, "sim", streams, streams, max_tokens=10))
        time.sleep(SETTLE)
        during = {name: round(fleet.rss_mib(part), 1) for name, part in parts.items()}
        for connection in sockets:
            connection.close()
    results.say(f"  {streams} idle streams: {during}")
    return {"streams": streams, "rss_mib_before": before, "rss_mib": during}


def _open(load: Load) -> list[socket.socket]:
    """Connections whose streams have all shown a first token."""
    target = urlsplit(load.url)
    waiting = selectors.DefaultSelector()
    sockets: list[socket.socket] = []
    for number in range(load.requests):
        connection = socket.create_connection((target.hostname or "127.0.0.1", target.port or 80))
        connection.sendall(request_bytes(load, number))
        waiting.register(connection, selectors.EVENT_READ, data=bytearray())
        sockets.append(connection)
    until = time.monotonic() + LIMIT
    while waiting.get_map():
        for key, _ in waiting.select(timeout=max(0.0, until - time.monotonic())):
            got: bytearray = key.data
            piece = cast("socket.socket", key.fileobj).recv(65536)
            got += piece
            if got.count(b"data: ") >= 2:  # the role's chunk, and a token
                waiting.unregister(key.fileobj)
            elif not piece:
                raise RuntimeError(f"a stream ended early: {bytes(got[-300:])!r}")
        if time.monotonic() > until:
            raise RuntimeError(f"{len(waiting.get_map())} streams without a token after {LIMIT} s")
    return sockets


if __name__ == "__main__":
    results.main("memory", run)
