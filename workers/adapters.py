"""The adapters of one worker, each version a state machine:

    absent -> fetching -> on_disk -> loading -> ready -> draining -> on_disk or absent

with `failed`, and its reason, from fetching and loading. A version is fetched into the worker's directory
(`disk`) and loaded into the engine before a request of it runs; the engine loads one at a time, and never
more than it keeps in memory: the least recently used idle one makes room. What fails is that version's
alone: its requests are told, and it is tried again after a pause, or when its catalogue entry changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from broker import base, entries, errors
from broker.messages import AdapterState
from workers.adapter import Adapter
from workers.engines.base import Engine, Refused
from workers.job import HandBack
from workers.loading import Loading

_log = logging.getLogger(__name__)

_TOLD = 64
"""Versions that only lie on disk, or failed, of which a heartbeat tells; and wants that wait their turn."""

_ANEW = 0.5
"""Seconds for which a request goes back whose adapter has other files now, while some run with the old."""


class Adapters:
    """See the module. Owned by the worker's event loop."""

    def __init__(self, broker: base.Broker, engine: Engine, loading: Loading) -> None:
        self._broker = broker
        self._engine = engine
        self.loading = loading
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted: dict[str, None] = {}  # in the order in which they are to be had beforehand
        self._put_off: dict[str, None] = {}  # loads that were told, and found no room
        self._prefetching: asyncio.Task[None] | None = None

    # What there is

    async def find(self, model: str) -> bool:
        """Whether `model`, `<name>@<version>`, is an adapter of this base. Raises errors.Unavailable.

        What our copy of the catalogue lacks is looked up: a request may be quicker than its model's news.
        """
        name, number = entries.split(model)
        if not number:
            return False
        if self.loading.version(model) is None:
            try:
                entry = await entries.read(self._broker, name)
            except errors.MalformedMessage:
                return False
            if entry is None:
                return False
            self.loading.catalogue.entries[name] = entry
        return self.loading.version(model) is not None

    def refusal(self, model: str) -> str:
        """See `Loading.refusal`."""
        return self.loading.refusal(model)

    def too_wide(self, model: str) -> bool:
        """Whether its rank is too large for this worker; another may take it."""
        version = self.loading.version(model)
        return version is not None and version.rank > self._engine.max_rank

    def here(self, model: str) -> bool:
        """Whether it is loaded, or about to be, and stays."""
        adapter = self.loading.all.get(model)
        return adapter is not None and not adapter.unload and adapter.state in ("loading", "ready")

    def states(self) -> tuple[AdapterState, ...]:
        """For the heartbeat: what takes the engine's memory or a request's time, and the latest others."""
        known = self.loading.all.values()
        rests = [a for a in known if a.state in ("on_disk", "failed") and not a.running and not a.waiting]
        left_out = set(sorted(rests, key=lambda a: a.used)[:-_TOLD])
        told = (adapter.told() for adapter in known if adapter not in left_out)
        return tuple(state for state in told if state is not None)

    # Requests

    async def fetched(self, model: str) -> None:
        """Until its files are here. Raises errors.AdapterFailed, errors.UnknownModel, Refused."""
        adapter = self.loading.of(model)
        while adapter.state in ("absent", "fetching", "failed"):
            await self._step(adapter, self.loading.fetch)

    async def hold(self, model: str) -> None:
        """Until it is loaded, which it stays until `release`. No more may be held at once than the engine has
        slots. Raises as `fetched`, and errors.EngineFailed, HandBack."""
        adapter = self.loading.of(model)
        adapter.running += 1
        try:
            while adapter.state != "ready" or self.loading.stale(adapter):
                if adapter.state == "ready":
                    adapter.unload = True  # once the last that runs with it has ended
                    raise HandBack("other files are to be loaded first", _ANEW)
                if adapter.state in ("absent", "fetching", "failed"):
                    await self._step(adapter, self.loading.fetch)
                else:
                    await self._step(adapter, self.loading.load)
        except BaseException:
            self._let_go(adapter)
            raise
        adapter.unload = False

    def release(self, model: str) -> None:
        adapter = self.loading.all[model]
        adapter.used = asyncio.get_running_loop().time()
        self._let_go(adapter)

    def wait(self, model: str, by: int) -> None:
        """Count requests that wait for it, or for a slot: `by` more."""
        self.loading.of(model).waiting += by

    def _let_go(self, adapter: Adapter) -> None:
        adapter.running -= 1
        if adapter.running:
            return
        if adapter.unload:
            self._spawn(self.loading.unload(adapter))
        if self._put_off:
            model = next(iter(self._put_off))
            del self._put_off[model]
            self._spawn(self._prefetch(model, evict=True))

    # Commands and news

    def want(self, model: str, evict: bool = False) -> bool:
        """Have it here before it is asked for: on disk, and loaded where there is room; with `evict` also in
        the place of one that is idle. False when it can't be, or too many are wanted."""
        if self.refusal(model) or (model not in self._wanted and len(self._wanted) >= _TOLD):
            return False
        self.loading.of(model).unload = False
        if evict:
            self._spawn(self._prefetch(model, evict))
            return True
        self._wanted[model] = None
        if self._prefetching is None:
            self._prefetching = self._spawn(self._prefetch_all())
        return True

    def unload(self, model: str) -> bool:
        """Have the engine lose it once its requests have ended. False when it is not loaded."""
        self._put_off.pop(model, None)
        adapter = self.loading.all.get(model)
        if adapter is None or adapter.state not in ("loading", "ready", "draining"):
            return False
        adapter.unload = True
        if adapter.state == "ready" and not adapter.running:
            self._spawn(self.loading.unload(adapter))
        return True

    def changed(self, name: str) -> None:
        """The catalogue's entry `name` is another: what failed may do now, what is gone from it goes."""
        for model, adapter in list(self.loading.all.items()):
            if entries.split(model)[0] != name:
                continue
            if self.loading.version(model) is None or (
                self.loading.stale(adapter) and adapter.state in ("on_disk", "ready")
            ):
                self.unload(model)
                self.loading.forget(adapter)
            elif adapter.state == "failed":
                adapter.state, adapter.fault, adapter.failures = "absent", None, 0

    async def close(self) -> None:
        """Leave what is under way, and the directory. Idempotent."""
        works = [adapter.work for adapter in self.loading.all.values() if adapter.work is not None]
        tasks = [*self._tasks, *works]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.loading.close()

    async def _step(self, adapter: Adapter, step: Callable[[Adapter], Awaitable[None]]) -> None:
        """One step for all who want it: join what is under way, else begin `step`."""
        if adapter.work is None:

            async def work() -> None:
                try:
                    await step(adapter)
                finally:
                    adapter.work = None

            adapter.work = asyncio.create_task(work())
            adapter.work.add_done_callback(_heard)
        await asyncio.shield(adapter.work)

    async def _prefetch_all(self) -> None:
        try:
            while self._wanted:
                model = next(iter(self._wanted))
                await self._prefetch(model, evict=False)
                self._wanted.pop(model, None)
        finally:
            self._prefetching = None

    async def _prefetch(self, model: str, evict: bool) -> None:
        adapter = self.loading.of(model)
        try:
            for _ in range(2):  # files that turn out to be gone, or another version's, are fetched anew
                while adapter.state in ("absent", "fetching"):
                    await self._step(adapter, self.loading.fetch)
                if adapter.state == "failed" and evict:
                    await self._step(adapter, self.loading.fetch)
                if adapter.state in ("on_disk", "loading"):
                    await self._step(adapter, lambda each: self.loading.load(each, evict))
                if adapter.state != "absent":
                    break
        except Refused as exc:
            _log.info("an adapter has to wait: %s", exc.message, extra={"model": model})
            if evict and len(self._put_off) < _TOLD:
                self._put_off[model] = None
        except errors.HeadraceError as exc:
            _log.info("an adapter is not here beforehand: %s", exc.message, extra={"model": model})

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_heard)
        return task


def _heard(task: asyncio.Task[None]) -> None:
    """Nobody may be left who waits for it: what it raised is no news then."""
    if not task.cancelled():
        task.exception()
