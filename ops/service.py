"""Run one service as a process: event loop, signals, the ready line, the exit status."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable

import orjson
import uvloop

from broker import errors
from ops import logs
from ops.settings import Settings

logger = logging.getLogger(__name__)

_GC_THRESHOLDS = (10_000, 20, 100)

Ready = Callable[[dict[str, object]], None]
Serve = Callable[[Settings, asyncio.Event, Ready], Awaitable[None]]


def run(part: str, settings: Settings, serve: Serve, ready_fd: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then drain; the exit status.

    Until it is ready a service holds nobody's work: a signal ends it at once. After, the first signal
    sets `stop`, and the second ends it at once. `ready_fd` gets one JSON line when it is ready.
    """
    logs.configure(settings.log_level, part=part, pid=os.getpid())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(part, settings, serve, ready_fd))
    except errors.HeadraceError as exc:
        logger.error("%s failed: %s", part, exc, extra={"code": exc.code})
        return 1
    except Exception:
        logger.exception("%s failed", part)
        return 1
    return 0


async def _serve(part: str, settings: Settings, serve: Serve, ready_fd: int | None) -> None:
    stop = asyncio.Event()

    def ready(facts: dict[str, object]) -> None:
        drain_on_signals(stop)
        # A full collection walks all that the imports left, 20 ms in which no stream moves.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        logger.info("%s is ready", part, extra=facts)
        if ready_fd is not None:
            os.write(ready_fd, orjson.dumps({"part": part, "pid": os.getpid(), **facts}) + b"\n")

    await serve(settings, stop, ready)


def drain_on_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT sets `stop`; the next one ends the process."""

    def on_signal(sig: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + sig)  # children are bound to this process and go with it
        logger.info("draining; a second signal ends it at once", extra={"signal": sig.name})
        stop.set()

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal, sig)
