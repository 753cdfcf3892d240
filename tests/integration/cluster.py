"""Three clustered nats-servers, so that one may die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Self

from broker import client, errors, subjects
from broker.config import BrokerConfig
from broker.server import NatsServer, Node
from tests.waiting import until

_STREAMS = (subjects.REQUESTS, subjects.REPLIES, subjects.USAGE, subjects.DEAD)
READY = 60.0
"""Seconds for the nodes to find each other, elect a leader, and have every stream."""


class NatsCluster:
    """Nodes on ports of their own, each with its files under `data`; an async context manager.

    A node that was killed is started again on the same ports and files.
    """

    def __init__(self, data: Path, size: int = 3) -> None:
        routes = _free_ports(size)
        urls = tuple(f"nats://127.0.0.1:{port}" for port in routes)
        self.nodes = [
            # Three copies stand in for a sync of each message.
            NatsServer(data / name, sync_always=False, node=Node("headrace", name, port, urls))
            for name, port in ((f"n{n}", port) for n, port in enumerate(routes))
        ]

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    @property
    def config(self) -> BrokerConfig:
        return BrokerConfig(url=self.url, replicas=len(self.nodes))

    async def start(self) -> None:
        """Start every node and wait until all streams have their copies."""
        await asyncio.gather(*(node.start() for node in self.nodes))
        await until(self.healthy, READY)

    async def leader(self, stream: str) -> int | None:
        """Number of the node that leads `stream`; None while there is none."""
        async with await client.connect(self.config, "who leads") as broker:
            info = await broker._api(f"STREAM.INFO.{stream}", {})
        name = (info.get("cluster") or {}).get("leader")
        return None if name is None else self.number(name)

    def number(self, name: str) -> int:
        """Of the node of that name."""
        return [node.node and node.node.name for node in self.nodes].index(name)

    async def healthy(self) -> bool:
        """Whether every stream has a leader and all its copies are up to date."""
        with contextlib.suppress(errors.Unavailable):
            async with await client.connect(self.config, "health") as broker:
                for stream in _STREAMS:
                    info = (await broker._api(f"STREAM.INFO.{stream}", {}))["cluster"]
                    copies = info.get("replicas", [])
                    if not info.get("leader") or len(copies) + 1 < len(self.nodes):
                        return False
                    if any(copy.get("offline") or not copy.get("current") for copy in copies):
                        return False
                return True
        return False

    async def kill(self, number: int) -> None:
        """SIGKILL to one node."""
        node = self.nodes[number]
        if node.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.pid, signal.SIGKILL)
        await node.stop()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def stop(self) -> None:
        # All at once, by SIGKILL: a node told to stop would first hand its streams to the others.
        await asyncio.gather(*(self.kill(number) for number in range(len(self.nodes))))

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]
