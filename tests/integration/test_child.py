"""A part as a child process: kept alive, given up, stopped, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from ops.child import Child
from ops.errors import StartFailed
from tests.waiting import LIMIT, until


def sim(log: Path) -> Child:
    return Child("sim-engine", ["sim-engine", "--port", "0"], log)


async def test_is_started_again_when_it_dies_and_ends_when_stopped(tmp_path: Path) -> None:
    child = sim(tmp_path / "log")
    keeper = asyncio.create_task(child.keep_alive())
    async with asyncio.timeout(LIMIT):
        assert (await child.ready)["url"].startswith("http://127.0.0.1:")
        child.settled = True
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while child.pid == first:  # noqa: ASYNC110  # the state is another process's
            await asyncio.sleep(0.01)
        second = psutil.Process(child.pid)
        assert child.restarts == 1
        await child.stop(grace=30)
        await keeper
    assert not second.is_running()


async def test_one_that_never_gets_ready_is_given_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = Child("worker", ["worker", "--set", "worker.colour=red"], tmp_path / "log")
    async with asyncio.timeout(LIMIT):
        with pytest.raises(
            StartFailed, match=r"worker ended 3 times.*status 2(.|\n)*worker\.colour = \"red\""
        ):
            await child.keep_alive()


async def test_one_that_is_stopped_while_it_starts_has_its_grace_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop finds no process yet, and the process ignores SIGTERM."""
    deaf = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    monkeypatch.setattr("ops.child.PROGRAM", ("-c", deaf))
    child = sim(tmp_path / "log")
    create = asyncio.create_subprocess_exec

    async def slow(*arguments: Any, **more: Any) -> asyncio.subprocess.Process:
        process = await create(*arguments, **more)
        await until(lambda: "deaf" in child.log.read_text())
        await child.stop(grace=0.1)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
    async with asyncio.timeout(LIMIT):
        await child.keep_alive()
    assert child.pid is not None
    assert not psutil.pid_exists(child.pid)


async def test_leaves_no_process_when_cancelled(tmp_path: Path) -> None:
    child = sim(tmp_path / "log")
    keeper = asyncio.create_task(child.keep_alive())
    async with asyncio.timeout(LIMIT):
        await child.ready
        process = psutil.Process(child.pid)
        keeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeper
    assert not process.is_running()
