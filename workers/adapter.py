"""One version of an adapter in a worker: its state, and what is told of it."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Literal

from broker import entries, errors, subjects
from broker.messages import AdapterState

State = Literal["absent", "fetching", "on_disk", "loading", "ready", "draining", "failed"]

LOADED: frozenset[State] = frozenset({"loading", "ready", "draining"})
"""States in which the engine may have it."""


@dataclass(slots=True, eq=False)
class Adapter:
    """Written by `adapters` and `loading` alone.

    Attributes:
        fault: why it failed last, until it is ready.
        retry_at: loop time before which it is not tried again.
        running: requests that hold it; it stays loaded for them.
        waiting: requests that wait for it, or for a slot.
        used: loop time of its last request's end.
        key: the directory of its files, once that is known.
        work: the step that is under way, for all who wait for it.
        unload: it goes when its last request has ended.
    """

    model: str
    state: State = "absent"
    fault: errors.AdapterFailed | None = None
    failures: int = 0
    retry_at: float = 0.0
    running: int = 0
    waiting: int = 0
    used: float = 0.0
    size: int = 0
    key: str = ""
    work: asyncio.Task[None] | None = None
    unload: bool = False

    def told(self) -> AdapterState | None:
        """For the heartbeat; None where there is nothing to tell."""
        if self.state == "absent":
            return None
        return AdapterState(
            model=self.model,
            state="draining" if self.unload and self.state == "ready" else self.state,
            reason=self.fault.message if self.fault is not None and self.state == "failed" else "",
            running=self.running,
            waiting=self.waiting,
            size=self.size,
        )


def key_of(model: str, version: entries.Version) -> str:
    """Name of the directory of one version's files: others for other contents, even under the same name."""
    lines = [model, *sorted(f"{file.name} {file.digest}" for file in version.files)]
    unique = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{subjects.token(model)[:60]}-{unique[:32]}"
