"""Start what is measured as processes of its own, find their parts, and always stop them."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson
import psutil

from broker import processes

START = 180.0
"""Seconds until ready: vLLM on a slow machine."""
STOP = 60.0
"""Seconds until what was told to stop is killed; it drains within less."""


@dataclass(frozen=True, slots=True)
class Running:
    """A started command: where it serves, and itself with its children as processes."""

    url: str
    nats: str
    root: psutil.Process

    def part(self, name: str) -> psutil.Process:
        """The one process of a part of `up`: `ingress`, `worker`, `scheduler` or `nats-server`."""
        (found,) = (child for child in self.root.children() if _is(name, child.cmdline()))
        return found


def _is(name: str, command: list[str]) -> bool:
    return bool(command) and (Path(command[0]).name == name or name in command[:6])


def pin(process: psutil.Process, core: int) -> None:
    """Keep a process on one core. psutil would set its main thread's affinity only."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, {core})


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def rss_mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


@contextlib.contextmanager
def joined(name: str, nats: str, **settings: object) -> Iterator[str]:
    """`headrace <name>` on a queue that is there, once it is ready; its URL where it has one."""
    own = ["--port", "0"] if name == "ingress" else []
    settings = {"broker__url": nats, **settings}
    with _process([name, *own, "--ready-fd", "1", *_flags(settings)]) as (_, out):
        yield orjson.loads(_line(out, lambda line: line.startswith(b'{"part"'))).get("url", "")


@contextlib.contextmanager
def sim_engine(**settings: object) -> Iterator[Running]:
    """`headrace sim-engine`: the sim's app alone over HTTP. Settings as `sim__itl_ms=20`."""
    command = ["sim-engine", "--port", "0", "--ready-fd", "1", *_flags(settings)]
    with _process(command) as (process, out):
        facts = orjson.loads(_line(out, lambda line: line.startswith(b'{"part"')))
        yield Running(facts["url"], "", psutil.Process(process.pid))


def up(engine: str, workers: int = 1, **settings: object) -> contextlib.AbstractContextManager[Running]:
    """`headrace up` on free ports, with a data directory of its own."""
    return up_by(["ops"], engine, settings, workers)


@contextlib.contextmanager
def up_by(
    program: Sequence[str], engine: str, settings: Mapping[str, object], workers: int = 1
) -> Iterator[Running]:
    """`up` as another `program` makes it: a module that takes headrace's arguments after its own."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as scratch:
        command = [
            "up",
            "--with-parent",
            "--engine",
            engine,
            "--workers",
            str(workers),
            "--port",
            "0",
            "--nats-port",
            "0",
            "--data",
            scratch,
        ]
        with _process([*command, *_flags(settings)], program) as (process, out):
            _, url, nats, *_ = _line(out, lambda line: line.startswith(b"ready ")).decode().split()
            yield Running(url, nats, psutil.Process(process.pid))


@contextlib.contextmanager
def worker(nats: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """`headrace worker` on a queue that is there, from the moment it is started: it serves later."""
    with _process(["worker", "--nats", nats, *_flags(settings)]) as (process, _):
        yield process


@contextlib.contextmanager
def part(name: str, nats: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """`headrace <part>`, once it is ready."""
    with _process([name, "--nats", nats, "--ready-fd", "1", *_flags(settings)]) as (process, out):
        _line(out, lambda line: line.startswith(b'{"part"'))
        yield process


def _flags(settings: Mapping[str, object]) -> list[str]:
    return [
        part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")
    ]


@contextlib.contextmanager
def _process(
    arguments: list[str], program: Sequence[str] = ("ops",)
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """`headrace <arguments>`; its log is shown when anything goes wrong. Stopped on the way out."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            # `up` sees to its own end, and that of its parts, when its parent is gone.
            preexec_fn=None if arguments[0] == "up" else processes.bound_to_me(),
        )
        assert process.stdout is not None
        try:
            yield process, process.stdout
        except BaseException:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-4000:])
            raise
        finally:
            stop(process)
            process.stdout.close()


def _line(out: IO[bytes], wanted: Callable[[bytes], bool]) -> bytes:
    """The first line that is `wanted`. Raises RuntimeError when the process ends or START passes."""
    limit, text = time.monotonic() + START, b""
    while True:
        *lines, text = text.split(b"\n")
        for line in lines:
            if wanted(line):
                return line
        readable, _, _ = select.select([out], [], [], max(0.0, limit - time.monotonic()))
        piece = out.read(65536) if readable else b""
        if not piece:
            raise RuntimeError("it did not get ready")
        text += piece


@contextlib.contextmanager
def helper(command: list[str]) -> Iterator[None]:
    """A process of the benchmark itself, once it has printed `ready`. Stopped on the way out."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=processes.bound_to_me())
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"it did not start: {' '.join(command)}")
        yield
    finally:
        stop(process)
        process.stdout.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM and, if that is not enough in time, SIGKILL; the parts die with their parent."""
    process.terminate()
    try:
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
