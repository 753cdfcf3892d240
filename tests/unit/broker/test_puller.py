"""Standing pulls on a queue whose consumer is out of reach for a while."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from broker import client, errors
from broker.base import Message
from tests.waiting import LIMIT


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
    puller.outstanding = 3
    puller.on_message(Message("inbox", b"", {"Status": "409", "Description": "Leadership Change"}))
    await asyncio.wait_for(lapsed.wait(), LIMIT)
    assert puller.outstanding == 0
    assert next(tries, "none left") == "none left"
