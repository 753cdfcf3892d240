"""Where vLLM's EngineCore process begins: bound to the worker's life before it loads anything.

Left to itself, EngineCore outlives a worker that is killed, and keeps the model in memory for nobody.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager

from broker import processes

# Here, because a spawned child imports this module before it imports vLLM, whose import logs before it
# has set up its logging; then vLLM sets the level that it was given.
logging.getLogger("vllm").setLevel(logging.ERROR)


def run(*args: object, **kwargs: object) -> None:
    """The target of the spawned process, in place of vLLM's."""
    parent = multiprocessing.parent_process()
    processes.die_with_parent(parent=parent.pid if parent else None)
    os.setsid()  # Ctrl-C in a terminal is for the worker, which drains; here it would cut running streams
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core(*args, **kwargs)


@contextmanager
def bound() -> Iterator[None]:
    """EngineCore processes started within it begin in `run`. For the spawn method: a fork would find
    `run` itself under the name that it calls."""
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(run)
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(original)
