"""The steps of adapters: files onto the disk, from there into the engine, and out again.

The engine has one turn: it loads or unloads one adapter at a time, and never has more than it can hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from broker import artifacts, base, entries, errors
from workers import disk, metrics
from workers.adapter import LOADED, Adapter, key_of
from workers.engines.base import Engine, Refused

_log = logging.getLogger(__name__)

FIRST, MOST = 2.0, 60.0
"""Seconds until a version that failed is tried again, doubled with each failure; and the most."""

IDLE = 2.0
"""Seconds without a request after which an adapter makes room for one that is only expected."""


_FETCHES = 2
"""Versions that are fetched at once: more would come no sooner, each later."""

_MAX_TOLD = 500
"""Characters of why one failed: it goes into every heartbeat, and may quote what others wrote."""


class Loading:
    """Owned by the worker's event loop. No two steps of one adapter run at once: `adapters` sees to that.

    Attributes:
        catalogue: what there is; the worker watches it.
        all: every version that anything was done with, by `<name>@<version>`.
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
        self.all: dict[str, Adapter] = {}
        self.on_unload: Callable[[str], None] = lambda model: None
        self._broker = broker
        self._engine = engine
        self._open_disk = open_disk
        self._opened: disk.Disk | None = None
        self._checked: set[str] = set()  # keys whose files were written or verified in this life
        self._turn = asyncio.Lock()
        self._fetches = asyncio.Semaphore(_FETCHES)

    async def pause(self) -> None:
        """Have the engine neither load nor unload anything until `resume`; what is under way ends first."""
        await self._turn.acquire()

    def resume(self) -> None:
        self._turn.release()

    def version(self, model: str) -> entries.Version | None:
        found = self.catalogue.adapter(model) if entries.split(model)[1] else None
        return found[1] if found is not None and found[0].base == self._engine.base else None

    def stale(self, adapter: Adapter) -> bool:
        """Whether its version has other files now: its entry was removed and made anew."""
        version = self.version(adapter.model)
        return version is not None and bool(adapter.key) and adapter.key != key_of(adapter.model, version)

    def refusal(self, model: str) -> str:
        """Why this worker can't serve `model`, as far as the catalogue tells; "" = it can."""
        version = self.version(model)
        if version is None:
            return f"it is no adapter version of {self._engine.base!r}"
        if version.rank > self._engine.max_rank:
            return f"its rank is {version.rank}, and this worker takes {self._engine.max_rank} at most"
        return ""

    def of(self, model: str) -> Adapter:
        return self.all.setdefault(model, Adapter(model))

    async def fetch(self, adapter: Adapter) -> None:
        if adapter.fault is not None and asyncio.get_running_loop().time() < adapter.retry_at:
            raise errors.AdapterFailed(adapter.fault.message)
        version = self.version(adapter.model)
        if version is None:
            raise errors.UnknownModel(f"the adapter {adapter.model!r} has been removed")
        if reason := self.refusal(adapter.model):
            # Nothing of it has failed: its state stays what it was, or who plans would give it up everywhere.
            raise errors.AdapterFailed(f"the adapter {adapter.model!r} can't be served: {reason}")
        adapter.state = "fetching"
        try:
            with metrics.ADAPTER_SECONDS.labels("fetch").time():
                await self._bring(adapter, version)
        except errors.AdapterFailed as exc:
            raise self._failed(adapter, exc) from exc
        except (errors.Unavailable, OSError, disk.Full) as exc:
            # Not the adapter's fault: another worker may have what this one lacks.
            raise Refused(f"the adapter {adapter.model!r} can't be fetched now: {exc}") from exc
        except Exception as exc:
            raise self._broke(adapter, exc) from exc
        finally:
            if adapter.state == "fetching":
                adapter.state = "absent"

    async def _bring(self, adapter: Adapter, version: entries.Version) -> None:
        """Its files onto the disk, where they are not there, whole."""
        cache = self._disk()
        adapter.key, adapter.size = key_of(adapter.model, version), artifacts.size(version)
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
        adapter.state = "on_disk"

    async def _add(self, cache: disk.Disk, adapter: Adapter, version: entries.Version) -> None:
        while True:
            kept = {
                other.key
                for other in self.all.values()
                if other.running or other.state in ("fetching", "loading", "ready", "draining")
            }
            try:
                await cache.add(adapter.key, adapter.size, lambda into: self._write(version, into), kept)
                return
            except disk.Full:
                async with self._turn:
                    idle = self._idle(0.0)
                    if idle is None:
                        raise
                    await self._evict(idle)

    async def _write(self, version: entries.Version, into: Path) -> None:
        async with self._fetches:
            await artifacts.fetch(self._broker, version, into)

    def _gone(self, key: str) -> None:
        """Its files had to make room for others."""
        for adapter in self.all.values():
            if adapter.key == key and adapter.state == "on_disk":
                adapter.state = "absent"

    async def load(self, adapter: Adapter, evict: bool = True) -> None:
        """On disk -> ready. Without `evict` only where there is room, or one rests that was long idle."""
        async with self._turn:
            self.forget(adapter)
            if adapter.state != "on_disk":
                return  # meanwhile it was loaded, or its files had to go
            while sum(each.state in LOADED for each in self.all.values()) >= self._engine.adapters_in_memory:
                idle = self._idle(0.0 if evict else IDLE)
                if idle is None and evict:
                    raise Refused("all the adapters that the engine holds are in use")
                if idle is None:
                    return
                await self._evict(idle)
            version = self.version(adapter.model)
            if version is None:
                raise errors.UnknownModel(f"the adapter {adapter.model!r} has been removed")
            try:
                path = self._disk().path(adapter.key)
            except (OSError, KeyError) as exc:
                _log.warning("an adapter's files are gone: %s", exc, extra={"model": adapter.model})
                self._disk().remove(adapter.key)
                adapter.state = "absent"  # whoever waits for it has it fetched anew
                return
            adapter.state = "loading"
            try:
                with metrics.ADAPTER_SECONDS.labels("load").time():
                    await self._engine.load_adapter(adapter.model, path, version.rank)
            except errors.AdapterFailed as exc:
                raise self._failed(adapter, exc) from exc
            except (errors.HeadraceError, asyncio.CancelledError):
                adapter.state = "on_disk"
                raise
            except Exception as exc:
                raise self._broke(adapter, exc) from exc
            adapter.fault, adapter.failures = None, 0
            adapter.used = asyncio.get_running_loop().time()
            metrics.ADAPTER_LOADS.labels("loaded").inc()
            adapter.state = "ready"
            if adapter.unload and not adapter.running:
                await self._evict(adapter)

    async def unload(self, adapter: Adapter) -> None:
        async with self._turn:
            if adapter.unload and adapter.state == "ready" and not adapter.running:
                await self._evict(adapter)

    async def _evict(self, adapter: Adapter) -> None:
        """Ready -> draining -> on disk, with the engine's turn in hand. No request holds it."""
        adapter.state = "draining"
        try:
            await self._engine.unload_adapter(adapter.model)
        finally:
            adapter.unload = False
            metrics.ADAPTER_LOADS.labels("unloaded").inc()
            self.on_unload(adapter.model)
            adapter.state = "on_disk"
            self.forget(adapter)

    def forget(self, adapter: Adapter) -> None:
        """Drop what is gone from the catalogue, and files that are another version's, once they rest."""
        if adapter.state == "on_disk" and self.stale(adapter):
            self._disk().remove(adapter.key)
            self._checked.discard(adapter.key)
            adapter.state, adapter.key = "absent", ""
        if self.version(adapter.model) is None and adapter.state in ("absent", "on_disk", "failed"):
            if self._opened is not None and adapter.work is None:
                self._opened.remove(adapter.key)
                adapter.state = "absent"
            if not adapter.running and not adapter.waiting and adapter.work is None:
                self.all.pop(adapter.model, None)

    def _idle(self, seconds: float) -> Adapter | None:
        """The one used least recently, before so many seconds; one for which none waits, if there is."""
        before = asyncio.get_running_loop().time() - seconds
        idle = [
            adapter
            for adapter in self.all.values()
            if adapter.state == "ready" and not adapter.running and adapter.used <= before
        ]
        return min(idle, key=lambda adapter: (adapter.waiting > 0, adapter.used), default=None)

    def _broke(self, adapter: Adapter, exc: Exception) -> errors.AdapterFailed:
        """What nobody foresaw: one adapter's end, not that of the requests which wait for it."""
        _log.error("an adapter broke the worker's own code", exc_info=exc, extra={"model": adapter.model})
        return self._failed(adapter, errors.AdapterFailed(f"{type(exc).__name__}: {exc}"))

    def _failed(self, adapter: Adapter, exc: errors.AdapterFailed) -> errors.AdapterFailed:
        pause = min(FIRST * 2**adapter.failures, MOST)
        adapter.failures += 1
        adapter.retry_at = asyncio.get_running_loop().time() + pause
        message = exc.message if len(exc.message) <= _MAX_TOLD else f"{exc.message[:_MAX_TOLD]}…"
        adapter.fault = fault = errors.AdapterFailed(
            f"the adapter {adapter.model!r} can't be served: {message}"
        )
        loaded, adapter.state = adapter.state == "loading", "failed"
        if self._opened is not None and loaded:
            self._opened.remove(adapter.key)  # fetched anew at the next try
            self._checked.discard(adapter.key)
        metrics.ADAPTER_LOADS.labels("failed").inc()
        _log.error("an adapter failed: %s", message, extra={"model": adapter.model})
        return fault

    def _disk(self) -> disk.Disk:
        """Raises OSError."""
        if self._opened is None:
            self._opened = self._open_disk()
            self._opened.on_gone = self._gone
        return self._opened

    def close(self) -> None:
        """Give the directory up. Idempotent."""
        if self._opened is not None:
            self._opened.close()
