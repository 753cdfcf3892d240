"""The lead moves from a scheduler that falls silent, by default settings and a clock of the test's own."""

from __future__ import annotations

import asyncio
import time
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from broker import errors
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.virtual_time import virtual_time

WITHIN = 1.0
"""Seconds in which a standby leads; clients hear of at most two."""
_STEP = 0.001


@settings(max_examples=30, deadline=None)
@given(
    silent_at=st.floats(0.0, 1.0),
    standbys=st.integers(1, 3),
    how=st.sampled_from(["cut off", "unanswered", "told to stop"]),
)
def test_a_standby_leads_in_time(silent_at: float, standbys: int, how: str) -> None:
    web = mock.Mock(server_port=1), None
    with virtual_time() as loop, mock.patch("scheduler.service.start_http_server", return_value=web):
        took = loop.run_until_complete(_took(silent_at, standbys, how))
    assert took <= WITHIN


async def _took(silent_at: float, standbys: int, how: str) -> float:
    """Seconds from the silence of the one that leads to another's lead. Raises when two lead at once."""
    broker = MemoryBroker(BrokerConfig(), time.time)
    candidates = []
    for number in range(standbys + 1):
        client, stop = broker.client(), asyncio.Event()
        scheduler = Scheduler(SchedulerConfig(name=f"s{number}"), client)
        candidates.append((scheduler, client, stop, asyncio.create_task(scheduler.run(stop))))

    async def leading() -> int:
        for _ in range(round(10 / _STEP)):
            leads = [n for n, (scheduler, *_) in enumerate(candidates) if scheduler.leads]
            assert len(leads) <= 1
            if leads and leads[0] != silent:
                return leads[0]
            await asyncio.sleep(_STEP)
        raise AssertionError("nobody leads")

    silent = -1
    first = await leading()
    await asyncio.sleep(silent_at)
    silent = first
    since = time.monotonic()
    _, client, stop, _ = candidates[first]
    if how == "cut off":
        client.disconnect()
    elif how == "unanswered":
        client.__dict__["swap"] = _unanswered
    else:
        stop.set()
    await leading()
    return time.monotonic() - since


async def _unanswered(*_: object) -> None:
    await asyncio.sleep(5.0)
    raise errors.Unavailable("no answer in time")
