"""What tenants were served lately, kept for whoever leads next: one key of each base in the bucket `leases`.

Clocks of different machines are compared only to let what was served fade, which it does for all tenants
alike: the order of their turns does not depend on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Annotated

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker import base, subjects

MOST = 1024
"""Tenants of a class that are kept: those that were served most. The others begin with the least of these."""

INTERVAL = 1.0
"""Seconds from one entry to the next."""

Served = Mapping[str, Mapping[str, float]]
"""Tokens for its weight, of each tenant by class."""


Tokens = Annotated[float, Field(ge=1, le=1e15)]


class Entry(BaseModel):
    """`at_ms`: unix time in ms of the figures."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at_ms: int = 0
    served: dict[str, dict[str, Tokens]] = Field(default_factory=dict)

    def age(self, now_ms: float) -> float:
        """Seconds since."""
        return max(0.0, now_ms - self.at_ms) / 1000


async def write(broker: base.Broker, base_model: str, served: Served) -> None:
    """Raises errors.Unavailable."""
    most = {
        service_class: dict(heapq.nlargest(MOST, tenants.items(), key=lambda each: each[1]))
        for service_class, tenants in served.items()
    }
    entry = orjson.dumps({"at_ms": int(broker.now_ms()), "served": most})
    await broker.put(subjects.KV_LEASES, subjects.shares(base_model), entry)


async def read(broker: base.Broker, base_model: str) -> Entry:
    """An empty one where there is none that can be read. Raises errors.Unavailable."""
    data, _ = await broker.get(subjects.KV_LEASES, subjects.shares(base_model))
    try:
        return Entry.model_validate_json(data) if data else Entry()
    except ValidationError:
        return Entry()
