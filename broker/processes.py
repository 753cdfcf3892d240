"""Child processes: bound to their parent's life, ended in time, and their logs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: the code between fork and exec must not allocate more than it needs to.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(sig: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send `sig` to this process when its parent ends, however it ends.

    `parent` is the pid that the parent had at the fork: where it is gone already, the signal comes
    now. Does nothing outside Linux. The kernel counts the *thread* that forked as the parent, so fork
    from one that lives as long as the process.
    """
    if _libc is None:
        return
    if _libc.prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), sig)


def bound_to_me() -> Callable[[], None]:
    """A `preexec_fn` under which the kernel kills the child as soon as this process ends."""
    parent = os.getpid()
    return lambda: die_with_parent(parent=parent)


async def end(process: asyncio.subprocess.Process, grace: float) -> int:
    """SIGTERM, then SIGKILL after `grace` seconds, or at once when cancelled; returns the exit status."""
    # Not asyncio.timeout: in a task that was cancelled before, Python 3.11.2 takes its end for the cancel.
    waiting = asyncio.ensure_future(process.wait())
    try:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        done, _ = await asyncio.wait({waiting}, timeout=grace)
        if not done:
            _kill(process)
        return await waiting
    except BaseException:
        _kill(process)
        raise
    finally:
        waiting.cancel()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def resident(pid: int) -> int:
    """Bytes of memory that a process and its descendants take; pages that they share count for each. What has
    ended counts nothing, and nothing does outside Linux."""
    total, pids = 0, [pid]
    for each in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{each}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return total


def rotate(log: Path) -> None:
    """Keep the last run's log as `<log>.1`, and none before it: logs don't grow for ever."""
    with contextlib.suppress(FileNotFoundError):
        log.replace(f"{log}.1")


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log file, indented, to show in an error."""
    try:
        text = log.read_text(errors="replace")
    except OSError as exc:
        return f"  (no log: {exc})"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])
