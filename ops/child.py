"""One child process that is kept alive."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from broker import processes
from ops.errors import StartFailed

logger = logging.getLogger(__name__)

Facts = dict[str, Any]
"""What a part says of itself when it is ready: `part`, `pid`, and its addresses."""

PROGRAM = ("-P", "-m", "ops")
"""What Python runs as a part; the benchmarks put another in its place."""
START_TRIES = 3
"""A part that has ended so often before the fleet was ready will not get ready."""
BACKOFF, BACKOFF_MOST = 0.5, 10.0
"""Seconds before the first restart, doubled each time; and the most."""
STEADY = 30.0
"""A process that lived so long is in order: the backoff starts anew."""


class Child:
    """`headrace <arguments>` as a child process, started again whenever it dies.

    The child leads a session of its own (Ctrl-C reaches it through us, in order) and is killed with us.

    Attributes:
        ready: done with the first ready line, when the part has been ready once; `on_ready` gets each.
        restarts: how often it has ended by itself.
        settled: set by the owner when the fleet is ready: from then on it is started again for ever.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        on_ready: Callable[[str, Facts], None] = lambda name, facts: None,
    ) -> None:
        self.name = name
        self.log = log
        self.ready: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self.restarts = 0
        self.settled = False
        self._arguments = arguments
        self._on_ready = on_ready
        self._process: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()
        self._grace = 0.0  # seconds that `stop` gives it

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def keep_alive(self) -> None:
        """Run it until `stop`. Raises StartFailed with the end of its log when it can't be started."""
        processes.rotate(self.log)
        delay = BACKOFF
        while not self._stop.is_set():
            began = time.monotonic()
            status = await self.run()
            if self._stop.is_set():
                return
            if time.monotonic() - began > STEADY:
                delay = BACKOFF
            self.restarts += 1
            if not self.settled and self.restarts == START_TRIES:
                raise StartFailed(
                    f"{self.name} ended {START_TRIES} times before the fleet was ready, last with status "
                    f"{status}. The end of {self.log}:\n{processes.tail(self.log)}"
                )
            logger.warning(
                "%s ended; starting it again",
                self.name,
                extra={"status": status, "wait_s": delay, "log": str(self.log)},
            )
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF_MOST)

    async def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds; it is not started again. Idempotent."""
        self._stop.set()
        self._grace = grace
        if self._process is not None and self._process.returncode is None:
            status = await processes.end(self._process, grace)
            logger.info("%s ended", self.name, extra={"status": status})

    async def run(self) -> int:
        """Run it once, to its end or until `stop`; its exit status."""
        read, write = os.pipe()
        with self.log.open("ab") as log, os.fdopen(write, "wb"):
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *PROGRAM,
                *self._arguments,
                "--ready-fd",
                str(write),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                start_new_session=True,
                preexec_fn=processes.bound_to_me(),
            )
        reading = asyncio.create_task(self._read_ready(read))
        try:
            if self._stop.is_set():  # meanwhile
                await processes.end(self._process, self._grace)
            return await self._process.wait()
        except BaseException:
            await processes.end(self._process, 0)
            raise
        finally:
            await reading

    async def _read_ready(self, read: int) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read, "rb")
        )
        try:
            line = await stream.readline()
        finally:
            transport.close()
        if line:
            facts: Facts = orjson.loads(line)
            self._on_ready(self.name, facts)
            if not self.ready.done():
                self.ready.set_result(facts)
