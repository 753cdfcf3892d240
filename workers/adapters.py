"""The adapters of one worker, each version a state machine:

    absent -> fetching -> on_disk -> loading -> ready -> draining -> on_disk or absent

with `failed`, and its reason, from fetching and loading. A version is fetched into the worker's directory
(`disk`) and loaded into the engine before a request of it runs; the engine loads one at a time, and never
more than it keeps in memory: the least recently used idle one makes room. What fails is that version's
alone: its requests are told, and it is tried again after a pause, or when its catalogue entry changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from broker import artifacts, base, entries, errors, subjects
from broker.messages import AdapterState
from workers import disk, metrics
from workers.engines.base import Engine, Refused

_log = logging.getLogger(__name__)

FIRST, MOST = 2.0, 60.0
"""Seconds until a version that failed is tried again, doubled with each failure; and the most."""

IDLE = 2.0
"""Seconds without a request after which an adapter makes room for one that is only expected."""

_TOLD = 64
"""Versions that only lie on disk, or failed, of which a heartbeat tells; and wants that wait their turn."""

State = Literal["absent", "fetching", "on_disk", "loading", "ready", "draining", "failed"]


@dataclass(slots=True, eq=False)
class _Adapter:
    """One version here. Written by `Adapters` alone.

    Attributes:
        running: requests that hold it; it stays loaded for them.
        waiting: requests that wait for it, or for a slot.
        used: loop time of its last request's end.
        work: the step that is under way, for all who wait for it.
        unload: it goes when its last request has ended.
    """

    model: str
    state: State = "absent"
    fault: errors.HeadraceError | None = None
    failures: int = 0
    retry_at: float = 0.0
    running: int = 0
    waiting: int = 0
    used: float = 0.0
    size: int = 0
    key: str = ""
    work: asyncio.Task[None] | None = None
    unload: bool = False


class Adapters:
    """See the module. Owned by the worker's event loop.

    Attributes:
        catalogue: what there is; the worker watches it.
        on_change: called when an adapter came to another state.
        on_unload: called with each version that the engine has no more.
    """

    def __init__(
        self,
        broker: base.Broker,
        engine: Engine,
        catalogue: entries.Entries,
        open_disk: Callable[[], disk.Disk],
    ) -> None:
        self.catalogue = catalogue
        self.on_change: Callable[[], None] = lambda: None
        self.on_unload: Callable[[str], None] = lambda model: None
        self._broker = broker
        self._engine = engine
        self._open_disk = open_disk
        self._opened: disk.Disk | None = None
        self._checked: set[str] = set()  # keys whose files were written or verified in this life
        self._adapters: dict[str, _Adapter] = {}
        self._engine_turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted: dict[str, None] = {}  # in the order in which they are to be had beforehand
        self._prefetching: asyncio.Task[None] | None = None

    # What there is

    async def find(self, model: str) -> bool:
        """Whether `model`, `<name>@<version>`, is an adapter of this base. Raises errors.Unavailable.

        What our copy of the catalogue lacks is looked up: a request may be quicker than its model's news.
        """
        name, number = entries.split(model)
        if not number:
            return False
        if self._version(model) is None:
            try:
                entry = await entries.read(self._broker, name)
            except errors.MalformedMessage:
                return False
            if entry is None:
                return False
            self.catalogue.entries[name] = entry
        return self._version(model) is not None

    def _version(self, model: str) -> entries.Version | None:
        found = self.catalogue.adapter(model) if entries.split(model)[1] else None
        return found[1] if found is not None and found[0].base == self._engine.base else None

    def here(self, model: str) -> bool:
        """Whether it is loaded, or about to be, and stays."""
        adapter = self._adapters.get(model)
        return adapter is not None and not adapter.unload and adapter.state in ("loading", "ready")

    def states(self) -> tuple[AdapterState, ...]:
        """For the heartbeat: what takes the engine's memory or a request's time, and the latest others."""
        known = [adapter for adapter in self._adapters.values() if adapter.state != "absent"]
        rests = [a for a in known if a.state in ("on_disk", "failed") and not a.running and not a.waiting]
        left_out = set(sorted(rests, key=lambda a: a.used)[:-_TOLD])
        return tuple(_told(adapter) for adapter in known if adapter not in left_out)

    # Requests

    async def fetched(self, model: str) -> None:
        """Until its files are here. Raises errors.AdapterFailed, errors.UnknownModel, Refused."""
        adapter = self._of(model)
        while adapter.state in ("absent", "fetching", "failed"):
            await self._step(adapter, self._fetch)

    async def hold(self, model: str) -> None:
        """Until it is loaded, which it stays until `release`. No more may be held at once than the engine has
        slots. Raises as `fetched`, and errors.EngineFailed."""
        adapter = self._of(model)
        adapter.running += 1
        try:
            while adapter.state != "ready":
                if adapter.state in ("absent", "fetching", "failed"):
                    await self._step(adapter, self._fetch)
                else:
                    await self._step(adapter, self._load)
        except BaseException:
            self._let_go(adapter)
            raise
        adapter.unload = False

    def release(self, model: str) -> None:
        adapter = self._adapters[model]
        adapter.used = asyncio.get_running_loop().time()
        self._let_go(adapter)

    def wait(self, model: str, by: int) -> None:
        """Count requests that wait for it, or for a slot: `by` more."""
        self._of(model).waiting += by

    def _let_go(self, adapter: _Adapter) -> None:
        adapter.running -= 1
        if adapter.unload and not adapter.running:
            self._spawn(self._unload(adapter))

    # Commands and news

    def want(self, model: str, evict: bool = False) -> bool:
        """Have it here before it is asked for: on disk, and loaded where there is room; with `evict` also in
        the place of one that is idle. False when it is no adapter of this base, or too many are wanted."""
        if self._version(model) is None or (model not in self._wanted and len(self._wanted) >= _TOLD):
            return False
        self._of(model).unload = False
        if evict:
            self._spawn(self._prefetch(model, evict))
            return True
        self._wanted[model] = None
        if self._prefetching is None:
            self._prefetching = self._spawn(self._prefetch_all())
        return True

    def unload(self, model: str) -> bool:
        """Have the engine lose it once its requests have ended. False when it is not loaded."""
        adapter = self._adapters.get(model)
        if adapter is None or adapter.state not in ("loading", "ready", "draining"):
            return False
        adapter.unload = True
        if adapter.state == "ready" and not adapter.running:
            self._spawn(self._unload(adapter))
        return True

    def changed(self, name: str) -> None:
        """The catalogue's entry `name` is another: what failed may do now, what is gone from it goes."""
        for model, adapter in list(self._adapters.items()):
            if entries.split(model)[0] != name:
                continue
            if self._version(model) is None:
                self.unload(model)
                self._forget(adapter)
            elif adapter.state == "failed":
                adapter.state, adapter.fault, adapter.failures = "absent", None, 0
        self.on_change()

    async def close(self) -> None:
        """Leave what is under way, and the directory. Idempotent."""
        works = [adapter.work for adapter in self._adapters.values() if adapter.work is not None]
        tasks = [*self._tasks, *works]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._opened is not None:
            self._opened.close()

    # The steps

    async def _step(self, adapter: _Adapter, step: Callable[[_Adapter], Awaitable[None]]) -> None:
        """One step for all who want it: join what is under way, else begin `step`."""
        if adapter.work is None:

            async def work() -> None:
                try:
                    await step(adapter)
                finally:
                    adapter.work = None
                    self.on_change()

            adapter.work = asyncio.create_task(work())
            adapter.work.add_done_callback(_heard)
        await asyncio.shield(adapter.work)

    async def _fetch(self, adapter: _Adapter) -> None:
        if adapter.fault is not None and asyncio.get_running_loop().time() < adapter.retry_at:
            raise errors.AdapterFailed(adapter.fault.message)
        version = self._version(adapter.model)
        if version is None:
            raise errors.UnknownModel(f"the adapter {adapter.model!r} has been removed")
        self._to(adapter, "fetching")
        try:
            with metrics.ADAPTER_SECONDS.labels("fetch").time():
                await self._bring(adapter, version)
        except errors.AdapterFailed as exc:
            raise self._failed(adapter, exc) from exc
        except (errors.Unavailable, OSError, disk.Full) as exc:
            # Not the adapter's fault: another worker may have what this one lacks.
            raise Refused(f"the adapter {adapter.model!r} can't be fetched now: {exc}") from exc
        finally:
            if adapter.state == "fetching":
                self._to(adapter, "absent")

    async def _bring(self, adapter: _Adapter, version: entries.Version) -> None:
        """Its files onto the disk, where they are not there, whole."""
        if version.rank > self._engine.max_rank:
            raise errors.AdapterFailed(
                f"its rank is {version.rank}, and this worker takes {self._engine.max_rank} at most"
            )
        cache = self._disk()
        adapter.key, adapter.size = _key(adapter.model, version), sum(file.size for file in version.files)
        if adapter.key in cache and adapter.key not in self._checked:
            files = {file.name: (file.size, file.digest) for file in version.files}
            if not await disk.verify(cache.path(adapter.key), files, artifacts.digest):
                cache.remove(adapter.key)
        if adapter.key not in cache:
            if adapter.size > cache.limit:
                raise errors.AdapterFailed(
                    f"it has {adapter.size:,} bytes, more than worker.adapter_bytes = {cache.limit:,} holds"
                )
            await self._add(cache, adapter, version)
        self._checked.add(adapter.key)
        self._to(adapter, "on_disk")

    async def _add(self, cache: disk.Disk, adapter: _Adapter, version: entries.Version) -> None:
        while True:
            kept = {
                other.key
                for other in self._adapters.values()
                if other.running or other.state in ("fetching", "loading", "ready", "draining")
            }
            try:
                await cache.add(
                    adapter.key, adapter.size, lambda into: artifacts.fetch(self._broker, version, into), kept
                )
                return
            except disk.Full:
                async with self._engine_turn:
                    idle = self._idle(0.0)
                    if idle is None:
                        raise
                    await self._evict(idle)

    def _gone(self, key: str) -> None:
        """Its files had to make room for others."""
        for adapter in self._adapters.values():
            if adapter.key == key:
                self._to(adapter, "absent")

    async def _load(self, adapter: _Adapter, evict: bool = True) -> None:
        """On disk -> ready. Without `evict` only where there is room, or one rests that was long idle."""
        async with self._engine_turn:
            if adapter.state != "on_disk":
                return  # meanwhile it was loaded, or its files had to go
            while self._loaded >= self._engine.adapters_in_memory:
                idle = self._idle(0.0 if evict else IDLE)
                if idle is None and evict:
                    raise Refused("all the adapters that the engine holds are in use")
                if idle is None:
                    return
                await self._evict(idle)
            version = self._version(adapter.model)
            if version is None:
                raise errors.UnknownModel(f"the adapter {adapter.model!r} has been removed")
            self._to(adapter, "loading")
            try:
                path = self._path(adapter)
                with metrics.ADAPTER_SECONDS.labels("load").time():
                    await self._engine.load_adapter(adapter.model, path, version.rank)
            except errors.AdapterFailed as exc:
                raise self._failed(adapter, exc) from exc
            except BaseException:
                self._to(adapter, "on_disk")
                raise
            adapter.fault, adapter.failures = None, 0
            adapter.used = asyncio.get_running_loop().time()
            metrics.ADAPTER_LOADS.labels("loaded").inc()
            self._to(adapter, "ready")
        if adapter.unload and not adapter.running:
            self._spawn(self._unload(adapter))

    def _path(self, adapter: _Adapter) -> Path:
        assert self._opened is not None
        return self._opened.path(adapter.key)

    @property
    def _loaded(self) -> int:
        return sum(a.state in ("loading", "ready", "draining") for a in self._adapters.values())

    def _idle(self, seconds: float) -> _Adapter | None:
        """The one used least recently, before so many seconds; one for which none waits, if there is."""
        before = asyncio.get_running_loop().time() - seconds
        idle = [
            adapter
            for adapter in self._adapters.values()
            if adapter.state == "ready" and not adapter.running and adapter.used <= before
        ]
        return min(idle, key=lambda adapter: (adapter.waiting > 0, adapter.used), default=None)

    async def _unload(self, adapter: _Adapter) -> None:
        async with self._engine_turn:
            if adapter.unload and adapter.state == "ready" and not adapter.running:
                await self._evict(adapter)

    async def _evict(self, adapter: _Adapter) -> None:
        """Ready -> draining -> on disk, with the engine's turn in hand. No request holds it."""
        self._to(adapter, "draining")
        try:
            await self._engine.unload_adapter(adapter.model)
        finally:
            adapter.unload = False
            metrics.ADAPTER_LOADS.labels("unloaded").inc()
            self.on_unload(adapter.model)
            self._to(adapter, "on_disk")
            self._forget(adapter)

    def _forget(self, adapter: _Adapter) -> None:
        """Drop what is gone from the catalogue, once it rests."""
        if self._version(adapter.model) is None and adapter.state in ("absent", "on_disk", "failed"):
            if self._opened is not None and adapter.work is None:
                self._opened.remove(adapter.key)
                self._to(adapter, "absent")
            if not adapter.running and not adapter.waiting and adapter.work is None:
                self._adapters.pop(adapter.model, None)

    def _failed(self, adapter: _Adapter, exc: errors.AdapterFailed) -> errors.AdapterFailed:
        pause = min(FIRST * 2**adapter.failures, MOST)
        adapter.failures += 1
        adapter.retry_at = asyncio.get_running_loop().time() + pause
        adapter.fault = fault = errors.AdapterFailed(
            f"the adapter {adapter.model!r} can't be served: {exc.message}"
        )
        if self._opened is not None and adapter.state == "loading":
            self._opened.remove(adapter.key)  # fetched anew at the next try
            self._checked.discard(adapter.key)
        metrics.ADAPTER_LOADS.labels("failed").inc()
        _log.error("an adapter failed: %s", exc.message, extra={"model": adapter.model})
        self._to(adapter, "failed")
        return fault

    # Beforehand

    async def _prefetch_all(self) -> None:
        try:
            while self._wanted:
                model = next(iter(self._wanted))
                await self._prefetch(model, evict=False)
                self._wanted.pop(model, None)
        finally:
            self._prefetching = None

    async def _prefetch(self, model: str, evict: bool) -> None:
        adapter = self._of(model)
        try:
            while adapter.state in ("absent", "fetching"):
                await self._step(adapter, self._fetch)
            if adapter.state == "failed" and evict:
                await self._step(adapter, self._fetch)
            if adapter.state in ("on_disk", "loading"):
                await self._step(adapter, lambda each: self._load(each, evict))
        except errors.HeadraceError as exc:
            _log.info("an adapter is not here beforehand: %s", exc.message, extra={"model": model})

    def _of(self, model: str) -> _Adapter:
        return self._adapters.setdefault(model, _Adapter(model))

    def _to(self, adapter: _Adapter, state: State) -> None:
        adapter.state = state

    def _disk(self) -> disk.Disk:
        """Raises OSError."""
        if self._opened is None:
            self._opened = self._open_disk()
            self._opened.on_gone = self._gone
        return self._opened

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_heard)
        return task


def _key(model: str, version: entries.Version) -> str:
    """Name of the directory of one version's files: others for other contents, even under the same name."""
    lines = [model, *sorted(f"{file.name} {file.digest}" for file in version.files)]
    unique = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{subjects.token(model)[:60]}-{unique[:32]}"


def _told(adapter: _Adapter) -> AdapterState:
    leaving = adapter.unload and adapter.state == "ready"
    return AdapterState(
        model=adapter.model,
        state="draining" if leaving else adapter.state,
        reason=adapter.fault.message if adapter.fault is not None and adapter.state == "failed" else "",
        running=adapter.running,
        waiting=adapter.waiting,
        size=adapter.size,
    )


def _heard(task: asyncio.Task[None]) -> None:
    """Nobody may be left who waits for it: what it raised is no news then."""
    if not task.cancelled():
        task.exception()
