"""A fleet of several processes: each part by its own command, on one nats-server or a cluster of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any, Self

import orjson

from broker import processes
from broker.server import NatsServer
from tests.integration.cluster import NatsCluster
from tests.waiting import LIMIT

_SKEWED = str(Path(__file__).parents[1] / "chaos" / "skewed.py")


class Part:
    """One `headrace <part>` process that has said it is ready; `facts` is what it said."""

    def __init__(self, process: asyncio.subprocess.Process, facts: dict[str, Any], log: Path) -> None:
        self.process = process
        self.facts = facts
        self.log = log

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def term(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Hang it, until `resume`."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def ended(self) -> int:
        """Its exit status; a negative one names the signal."""
        async with asyncio.timeout(LIMIT):
            return await self.process.wait()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()


class Fleet:
    """Starts parts on free ports with files under `data`, and ends by pid whatever still runs.

    A part that is not ready within `start_limit` seconds fails the test.
    """

    def __init__(self, data: Path, cluster: NatsCluster | None = None, start_limit: float = LIMIT) -> None:
        self.nats = NatsServer(data / "nats")
        self.parts: list[Part] = []
        self._cluster = cluster
        self._data = data
        self._start_limit = start_limit

    async def start(self, part: str, **settings: object) -> Part:
        """A part, once it is ready. Settings as `sim__itl_ms=20`; its clock is `ahead` seconds ahead."""
        log = self._data / f"{part}-{len(os.listdir(self._data))}.log"
        program = [_SKEWED, str(settings.pop("ahead"))] if "ahead" in settings else ["-m", "ops"]
        command = [sys.executable, "-P", *program, part]
        if part != "sim-engine":
            settings = {"broker__url": (self._cluster or self.nats).url} | settings
        if part in ("ingress", "sim-engine"):
            command += ["--port", "0"]
        elif part == "worker":
            command += ["--data", str(self._data)]
            settings = {"worker__engine": "sim"} | settings
        if self._cluster is not None and part != "sim-engine":
            settings = {"broker__replicas": len(self._cluster.nodes)} | settings
        if "pool" in settings:
            command += ["--pool", str(settings["pool"])]
        for key, value in settings.items():
            if key == "pool":
                continue
            command += ["--set", f"{key.replace('__', '.')}={value}"]
        read, write = os.pipe()
        with log.open("xb") as output, os.fdopen(write, "wb"):
            process = await asyncio.create_subprocess_exec(
                *[*command, "--ready-fd", str(write)],
                stdout=output,
                stderr=output,
                pass_fds=[write],
                preexec_fn=processes.bound_to_me(),
            )
        started = Part(process, {}, log)
        self.parts.append(started)
        started.facts = await self._facts(read, log)
        return started

    async def _facts(self, read: int, log: Path) -> dict[str, Any]:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read, "rb")
        )
        try:
            async with asyncio.timeout(self._start_limit):
                line = await stream.readline()
        finally:
            transport.close()
        assert line, f"never ready:\n{processes.tail(log)}"
        facts: dict[str, Any] = orjson.loads(line)
        return facts

    async def kill(self) -> None:
        """SIGKILL to every part and to the nats-server: the machine lost its power."""
        if self.nats.pid is not None:
            os.kill(self.nats.pid, signal.SIGKILL)
        await asyncio.gather(*(part.kill() for part in self.parts))
        self.parts.clear()
        await self.nats.stop()

    async def __aenter__(self) -> Self:
        self._data.mkdir(parents=True, exist_ok=True)
        await (self._cluster or self.nats).start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(part.kill() for part in self.parts))
        await (self._cluster or self.nats).stop()
