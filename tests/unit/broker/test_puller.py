"""Standing pulls on a queue whose consumer is out of reach for a while."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from broker import client, errors
from broker.base import Message
from tests.waiting import LIMIT, until


async def test_a_pull_that_ended_is_asked_for_anew_once_the_consumer_is_there(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_RECOVER_AFTER", 0.001)
    lapsed = asyncio.Event()
    tries = iter([errors.Unavailable("no leader"), errors.Unavailable("no leader"), None])

    async def ensure() -> None:
        if (fault := next(tries)) is not None:
            raise fault

    puller = client._Puller(
        cast(Any, SimpleNamespace(connected=True)), "inbox", "c", lambda _: None, lapsed.set, ensure
    )
    puller._asked.append((math.inf, 3))
    assert puller.outstanding == 3
    puller.on_message(Message("inbox", b"", {"Status": "409", "Description": "Leadership Change"}))
    await asyncio.wait_for(lapsed.wait(), LIMIT)
    assert puller.outstanding == 0
    assert next(tries, "none left") == "none left"


async def test_a_pull_is_over_in_its_time_though_the_server_says_nothing(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends one without a word whose bytes are used up to the last."""
    monkeypatch.setattr(client, "_PULL_EXPIRES", 0.01)
    monkeypatch.setattr(client, "_PULL_OVER", 0.01)
    pulls: list[dict[str, int]] = []

    async def publish(subject: str, data: bytes, reply: str) -> None:
        pulls.append(orjson.loads(data))

    server: Any = SimpleNamespace(connected=True, publish=publish, max_payload=2**20, _at_once=2**24)
    puller = client._Puller(server, "inbox", "c", lambda _: None, lambda: None, lambda: asyncio.sleep(0))
    await puller.ask(2)
    await puller.ask(4096)
    assert "max_bytes" not in pulls[0]  # they have room
    assert 2**24 - 2**16 < pulls[1]["max_bytes"] <= 2**24
    await until(lambda: puller.outstanding == 0)
