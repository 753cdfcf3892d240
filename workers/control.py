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
from workers import disk, peers
from workers.adapters import Adapters
from workers.config import WorkerConfig
from workers.engines.base import Engine
from workers.job import Job
from workers.loading import Loading
from workers.turns import FULL, Turns, before_stop

_log = logging.getLogger(__name__)

_SENT_ON = 2
"""Deliveries up to which a request goes back for a worker that shall have its adapter; then any loads it."""

_FEW = 3
"""Workers among which a request that is handed back soon finds the one it shall go to; seldom among more."""

_SOON, _LATE = 0.05, 0.5
"""Seconds for which a request goes back that another worker can serve: at first, and at most."""


class Control:
    """See the module. Owned by the worker's event loop. `drain` has the worker end, after its requests,
    `rest` takes the commands `sleep` and `wake`, and `preempt` gives a request back."""

    def __init__(
        self,
        name: str,
        config: WorkerConfig,
        broker: base.Broker,
        engine: Engine,
        drain: Callable[[], None],
        rest: Callable[[Command], Answer],
        preempt: Callable[[str], bool],
    ) -> None:
        self._name = name
        self._config = config
        self._broker = broker
        self._engine = engine
        self._drain = drain
        self._rest = rest
        self._preempt = preempt
        self._placements = placement.Placements(broker)
        self._catalogue = entries.Entries(broker)
        self._adapters = Adapters(broker, engine, Loading(broker, engine, self._catalogue, self._open_disk))
        self._turns = Turns(
            self._adapters, engine.adapter_slots, config.adapter_turn, lambda: engine.stats().max_running
        )
        self._peers = peers.Peers(broker, name, engine.base, config.heartbeat)
        self._stack = contextlib.AsyncExitStack()
        self._cache = contextlib.ExitStack()
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
        # What is still told must not begin anything that nobody ends.
        await self._stack.aclose()
        await self._peers.close()
        await self._adapters.close()
        self._cache.close()

    async def serves(self, job: Job) -> bool:
        """Whether it asks for an adapter of our base. Raises errors.Unavailable."""
        model = job.request.subject.model
        if not self._engine.adapter_slots or model == self._engine.base:
            return False
        return await self._adapters.find(model)

    async def elsewhere(self, job: Job) -> float | None:
        """Seconds after which another worker shall have it; None = this one answers it.

        It goes to the worker that shall have its adapter, where that is likely to get it; and from one that
        can't serve it, to any that can, for as long as one lives. Raises errors.Unavailable.
        """
        model, attempt = job.request.subject.model, job.delivery.attempt
        if model == self._engine.base or not entries.split(model)[1] or job.over:
            return None
        if self._engine.adapter_slots:
            await self._adapters.find(model)
        if not self._engine.adapter_slots or self._adapters.too_wide(model):
            # At first it isn't asked who can: to hear that takes longer than to find out.
            able = attempt <= _SENT_ON or await self._other_can(job)
            return min(_LATE, _SOON * 2 ** min(attempt - 1, 9)) if able else None
        if self._turns.full(model) and not self._adapters.here(model):
            return FULL
        if attempt <= _SENT_ON and self._named_elsewhere(model) and not self._adapters.here(model):
            return 0.0
        return None

    async def _other_can(self, job: Job) -> bool:
        """Whether another live worker can serve it; False too where it is stopped first."""
        asked = asyncio.ensure_future(self._others_serve(job.request.subject.model))
        return await before_stop(job, asked, "for a worker that serves its adapter") and asked.result()

    async def _others_serve(self, model: str) -> bool:
        """Raises errors.Unavailable."""
        widest = await self._peers.max_rank()
        if not widest:
            return False
        found = self._catalogue.adapter(model)
        if found is None:  # a worker without slots does not follow the catalogue
            name, number = entries.split(model)
            try:
                entry = await entries.read(self._broker, name)
            except errors.MalformedMessage:
                return False
            version = entry.version(number) if entry is not None and entry.base == self._engine.base else None
        else:
            version = found[1]
        return version is not None and version.rank <= widest

    def _named_elsewhere(self, model: str) -> bool:
        """Whether others shall have it, in a fleet so small that one of them is soon found."""
        planned = self._placements.bases.get(self._engine.base)
        named = self._planned(model)
        if planned is None or not named or self._name in named:
            return False
        workers = {self._name, *(worker for each in planned.assignments for worker in each.workers)}
        return max(len(workers), planned.replicas) <= _FEW

    def turn(self, job: Job) -> contextlib.AbstractAsyncContextManager[errors.HeadraceError | None]:
        """See `Turns.turn`."""
        return self._turns.turn(job)

    @property
    def waiting(self) -> int:
        """Requests that wait for their adapters, and have nothing of the engine."""
        return self._turns.waiting

    def on_wait(self, handler: Callable[[], None]) -> None:
        """Call `handler` as a request begins to wait."""
        self._turns.on_wait = handler

    def hand_back(self) -> None:
        """Requests that wait for their adapters go to other workers at once."""
        self._turns.hand_back()

    async def pause(self) -> None:
        """Leave the engine alone until `resume`: it is about to sleep."""
        await self._adapters.loading.pause()

    def resume(self) -> None:
        self._adapters.loading.resume()

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
        with contextlib.suppress(errors.HeadraceError):
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
                return Answer(ok=False, message=f"{model!r:.200} can't be loaded: {reason}")
            case "unload" if self._adapters.unload(model):
                return Answer(ok=True, message=f"{model} goes once its requests have ended")
            case "unload":
                return Answer(ok=True, message=f"{model!r:.200} is not loaded")
            case "sleep" | "wake":
                return self._rest(command)
            case "preempt":
                here = self._preempt(command.request)
                return Answer(ok=here, message="" if here else "it does not run here, or can't be continued")
            case _:
                return Answer(
                    ok=False,
                    message=f"no worker can {command.do}: it loads, unloads, drains, sleeps, wakes, preempts",
                )

    def _open_disk(self) -> disk.Disk:
        root = self._config.adapter_cache
        if not root:
            root = self._cache.enter_context(tempfile.TemporaryDirectory(prefix="headrace-adapters-"))
        return disk.Disk(Path(root), self._config.adapter_bytes)

    async def _listen(self, subscription: base.Subscription) -> None:
        self._stack.push_async_callback(subscription.close)
