"""What the fleet tells a worker: commands, adapters that are wanted, the catalogue, the placement. And so
which adapter's request it runs, and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from broker import base, entries, errors, placement, subjects
from broker.messages import AdapterState, Answer, Command
from workers import disk
from workers.adapters import Adapters
from workers.config import WorkerConfig
from workers.engines.base import Engine
from workers.job import Job
from workers.loading import Loading
from workers.turns import Turns

_log = logging.getLogger(__name__)

_SENT_ON = 2
"""Deliveries up to which a request goes back for a worker that shall have its adapter; then any loads it."""

_CANNOT = 8
"""Likewise at a worker that can't serve it, where another of the base may; then its caller is told."""


class Control:
    """See the module. Owned by the worker's event loop. `drain` has the worker end, after its requests."""

    def __init__(
        self, name: str, config: WorkerConfig, broker: base.Broker, engine: Engine, drain: Callable[[], None]
    ) -> None:
        self._name = name
        self._config = config
        self._broker = broker
        self._engine = engine
        self._drain = drain
        self._placements = placement.Placements(broker)
        self._catalogue = entries.Entries(broker)
        self._adapters = Adapters(broker, engine, Loading(broker, engine, self._catalogue, self._open_disk))
        self._turns = Turns(self._adapters, engine.adapter_slots, config.adapter_turn)
        self._stack = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises errors.Unavailable."""
        await self._listen(await self._broker.subscribe(subjects.ctl(self._name), self._on_command))
        if self._engine.adapter_slots:
            self._catalogue.on_change = self._adapters.changed
            await self._listen(await self._catalogue.watch())
            await self._listen(await self._placements.watch())
            wants = subjects.wants(self._engine.base)
            await self._listen(await self._broker.subscribe(wants, self._on_want))

    async def close(self) -> None:
        await self._adapters.close()
        await self._stack.aclose()

    async def serves(self, job: Job) -> bool:
        """Whether it asks for an adapter of our base. Raises errors.Unavailable."""
        model = job.request.subject.model
        if not self._engine.adapter_slots or model == self._engine.base:
            return False
        return await self._adapters.find(model)

    def elsewhere(self, job: Job) -> bool:
        """Whether another worker shall have its adapter, or may be able to serve it, and may get it yet."""
        model, attempt = job.request.subject.model, job.delivery.attempt
        if model == self._engine.base or not entries.split(model)[1] or attempt > _CANNOT:
            return False
        if not self._engine.adapter_slots or self._adapters.too_wide(model):
            return True
        planned = self._planned(model)
        return (
            attempt <= _SENT_ON
            and bool(planned)
            and self._name not in planned
            and not self._adapters.here(model)
        )

    def turn(self, job: Job) -> contextlib.AbstractAsyncContextManager[errors.HeadraceError | None]:
        """See `Turns.turn`."""
        return self._turns.turn(job)

    def hand_back(self) -> None:
        """Requests that wait for their adapters go to other workers at once."""
        self._turns.hand_back()

    def states(self) -> tuple[AdapterState, ...]:
        return self._adapters.states()

    def _planned(self, model: str) -> tuple[str, ...]:
        """Workers that shall have an adapter version; () = nothing is planned of it."""
        planned = self._placements.bases.get(self._engine.base)
        return () if planned is None else planned.workers(model) or ()

    def _on_want(self, message: base.Message) -> None:
        """`want.<base>.<model>`: a request was queued. Its adapter is fetched while it waits for a worker."""
        try:
            model = subjects.name(message.subject.split(".")[2])
        except (ValueError, IndexError):
            return
        planned = self._planned(model)
        if not planned or self._name in planned:
            self._adapters.want(model)

    def _on_command(self, message: base.Message) -> None:
        answer = self._obey(message.data)
        _log.info("a command: %s", answer.message, extra={"worker": self._name, "ok": answer.ok})
        if message.reply:
            task = asyncio.create_task(self._answer(message.reply, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, reply: str, answer: Answer) -> None:
        with contextlib.suppress(errors.Unavailable):
            await self._broker.publish(reply, answer.model_dump_json().encode())

    def _obey(self, data: bytes) -> Answer:
        try:
            command = Command.model_validate_json(data)
        except ValidationError as exc:
            return Answer(ok=False, message=f"not a command: {exc.errors()[0]['msg']}")
        model = command.model
        match command.do:
            case "drain":
                self._drain()
                return Answer(ok=True, message="draining")
            case "load" if self._adapters.want(model, evict=True):
                return Answer(ok=True, message=f"{model} is being loaded")
            case "load":
                reason = self._adapters.refusal(model) or "too many are wanted"
                return Answer(ok=False, message=f"{model!r} can't be loaded: {reason}")
            case "unload" if self._adapters.unload(model):
                return Answer(ok=True, message=f"{model} goes once its requests have ended")
            case "unload":
                return Answer(ok=True, message=f"{model!r} is not loaded")
            case _:
                return Answer(ok=False, message=f"a worker can't {command.do}: it loads, unloads and drains")

    def _open_disk(self) -> disk.Disk:
        root = self._config.adapter_cache
        if not root:
            root = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-adapters-"))
        return disk.Disk(Path(root), self._config.adapter_bytes)

    async def _listen(self, subscription: base.Subscription) -> None:
        self._stack.push_async_callback(subscription.close)
