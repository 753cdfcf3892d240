"""A watch of a bucket over the real client: which of two states of a key is the last that is told."""

from __future__ import annotations

import pytest

from broker import base, client
from broker.config import BrokerConfig
from tests.waiting import until

KEY = "$KV.placement.sim"


class Store(client.NatsBroker):
    """A stream in which lies what the test puts there; `reads` of it were made."""

    def __init__(self) -> None:
        super().__init__(BrokerConfig(), "test")
        self.stored: list[bytes] = []
        self.reads = 0

    async def read(self, stream: str, subject: str, start: int = 1, limit: int = 1000) -> list[base.Record]:
        self.reads += 1
        return [base.Record(seq, KEY, data, {}, 0.0) for seq, data in enumerate(self.stored, 1)]


@pytest.fixture
async def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(client, "_STORED_BY", 0.0)
    return Store()


async def test_what_was_heard_is_not_followed_by_what_was_before(store: Store) -> None:
    """A stream stores behind its subscribers' backs, and the second read may come in between."""
    told: list[tuple[str, bytes | None]] = []
    watch = client._Watch(store, "placement", lambda key, value: told.append((key, value)))
    store.stored = [b"old"]
    await watch.replay()
    watch.on_message(base.Message(KEY, b"new"))
    await until(lambda: store.reads == 2)
    assert told == [("sim", b"old"), ("sim", b"new")]
    await watch.close()


async def test_what_was_missed_is_told_by_the_second_read_and_after_an_outage(store: Store) -> None:
    told: list[bytes | None] = []
    watch = client._Watch(store, "placement", lambda key, value: told.append(value))
    await watch.replay()
    store.stored = [b"stored late"]
    await until(lambda: told == [b"stored late"])
    watch.on_message(base.Message(KEY, b"heard"))
    store.stored = [b"set while we were cut off"]
    await watch.replay()
    assert told[1:] == [b"heard", b"set while we were cut off"]
    await watch.close()
