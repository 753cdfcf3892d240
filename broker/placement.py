"""The desired state of the fleet: KV bucket `placement`, one entry a base, kept by who leads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker import base, subjects

_log = logging.getLogger(__name__)


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Assignment(_Kept):
    """Where one adapter version shall be loaded, and why."""

    model: str = Field(description="`<name>@<version>`")
    workers: tuple[str, ...] = ()
    reason: str = ""
    since_ms: int = Field(0, description="when the workers last changed")


class Placement(_Kept):
    """What one base's workers shall hold, and how many of them there shall be."""

    base: str
    assignments: tuple[Assignment, ...] = ()
    replicas: int = Field(0, description="workers that the load asks for")
    reason: str = Field("", description="why so many")
    made_ms: int = 0
    by: str = Field("", description="the scheduler that planned it")

    def workers(self, model: str) -> tuple[str, ...] | None:
        """Who shall hold an adapter version; None = nothing is planned of it."""
        if self._by_model[0] is not self.assignments:
            del self._by_model  # it came along with a copy
        return self._by_model[1].get(model)

    @functools.cached_property
    def _by_model(self) -> tuple[tuple[Assignment, ...], dict[str, tuple[str, ...]]]:
        """An index: workers ask for each request."""
        return self.assignments, {each.model: each.workers for each in self.assignments}


class Placements:
    """The bucket as of its last change. Owned by the process's event loop."""

    def __init__(self, broker: base.Broker) -> None:
        self._broker = broker
        self.bases: dict[str, Placement] = {}
        self.on_change: Callable[[str], None] = lambda name: None

    async def watch(self) -> base.Subscription:
        return await self._broker.watch(subjects.KV_PLACEMENT, self._changed)

    async def put(self, placement: Placement) -> None:
        """Raises errors.Unavailable."""
        value = placement.model_dump_json().encode()
        await self._broker.put(subjects.KV_PLACEMENT, subjects.token(placement.base), value)

    async def remove(self, base_model: str) -> None:
        await self._broker.remove(subjects.KV_PLACEMENT, subjects.token(base_model))

    def _changed(self, key: str, value: bytes | None) -> None:
        try:
            name = subjects.name(key)
            if value is None:
                self.bases.pop(name, None)
            else:
                self.bases[name] = Placement.model_validate_json(value)
        except (ValidationError, UnicodeDecodeError):
            _log.warning("the placement of %s is unreadable", key)
            return
        self.on_change(name)
