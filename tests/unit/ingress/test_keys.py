"""Claiming a key: what the queue and the journal say, and what is made of their silence."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import base, errors, replies, subjects
from broker.memory import MemoryBroker
from broker.messages import Request
from ingress import keys

CHAT = "/v1/chat/completions"


def asked(body: bytes = b"{}", path: str = CHAT, key: bytes = b"k", tenant: str = "t") -> Request:
    request_id = keys.request_id(tenant, key)
    reply_to = subjects.reply(tenant, keys.fingerprint(path, body), request_id)
    subject = subjects.RequestSubject("m", "standard", tenant, "m")
    return Request(subject, request_id, reply_to, path, body)


async def claim(broker: base.Broker, request: Request, **more: Any) -> keys.Claim:
    return await keys.claim(broker, request, **{"timeout": 5.0, "read_on": False, **more})


async def count(broker: base.Broker) -> int:
    return sum((await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)).values())


class Losing(MemoryBroker):
    """Acknowledgements are lost, or hang, as often as `lost` says; the messages are stored."""

    def __init__(self, *lost: str) -> None:
        super().__init__()
        self.lost = list(lost)

    async def enqueue(
        self, subject: str, data: bytes, headers: dict[str, str] | None = None
    ) -> asyncio.Future[base.Stored]:
        ack = await super().enqueue(subject, data, headers)
        if not self.lost:
            return ack
        await ack
        broken: asyncio.Future[base.Stored] = asyncio.get_running_loop().create_future()
        if self.lost.pop(0) == "lost":
            broken.set_exception(errors.Unconfirmed("the connection broke"))
        return broken


def test_ids_differ_by_tenant_and_key_and_fingerprints_by_path_and_body() -> None:
    assert keys.request_id("t", b"k") == keys.request_id("t", b"k")
    assert len({keys.request_id(*who) for who in (("t", b"k"), ("u", b"k"), ("t", b"l"), ("tk", b""))}) == 4
    assert len({keys.fingerprint(*what) for what in (("/a", b"b"), ("/ab", b""), ("/a", b"c"))}) == 3
    assert subjects.token(keys.request_id("t", b"k")) == keys.request_id("t", b"k")


async def test_the_first_has_it_and_the_next_follows() -> None:
    broker = MemoryBroker()
    assert await claim(broker, asked()) == keys.Claim(1, True)
    assert not (await claim(broker, asked())).ours
    assert await count(broker) == 1


async def test_a_lost_acknowledgement_is_asked_for_again_and_the_request_queued_once() -> None:
    broker = Losing("lost", "lost")
    assert await claim(broker, asked()) == keys.Claim(1, False)
    assert await count(broker) == 1


async def test_what_stays_unconfirmed_is_left_to_the_clients_next_try() -> None:
    broker = Losing("hangs", "hangs")  # a timer may fire a little early, and it is tried once more
    cancels: list[base.Message] = []
    await broker.subscribe(subjects.ALL_CANCELS, cancels.append)
    with pytest.raises(errors.Unconfirmed):
        await claim(broker, asked(), timeout=0.01)
    broker.lost.clear()
    assert await claim(broker, asked()) == keys.Claim(1, False)
    assert await count(broker) == 1
    assert not cancels


async def test_nothing_is_queued_without_a_broker() -> None:
    broker = MemoryBroker()
    broker.disconnect()
    with pytest.raises(errors.Unavailable) as caught:
        await claim(broker, asked())
    assert caught.value.code == "unavailable"
    broker.reconnect()
    assert await count(broker) == 0


async def test_another_request_under_the_key_is_refused_while_nothing_is_journaled_yet() -> None:
    broker = MemoryBroker()
    first = asked()
    await (await broker.enqueue(str(first.subject), first.body, first.headers()))
    for other in (asked(b"[]"), asked(path="/v1/completions")):
        with pytest.raises(errors.KeyReused):
            await claim(broker, other)
    assert not (await claim(broker, first)).ours
    assert (await claim(broker, asked(key=b"l"))).ours


async def test_a_request_that_has_just_left_the_queue_is_found_in_the_journal() -> None:
    """The acknowledgement says that it was there; its frames are stored a moment later."""
    broker = MemoryBroker()
    first = asked()
    stored = await (await broker.enqueue(str(first.subject), first.body, first.headers()))
    await broker.delete(subjects.REQUESTS, stored.seq)
    claiming = asyncio.gather(claim(broker, asked()), claim(broker, asked(b"[]")), return_exceptions=True)
    await asyncio.sleep(0)  # both have asked the queue
    await replies.Writer(broker, first.reply_to, 1).end({})
    same, other = await claiming
    assert same == keys.Claim(0, False)
    assert isinstance(other, errors.KeyReused)


async def test_a_request_of_which_nothing_is_left_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_SETTLE", 0.0)
    broker = MemoryBroker()
    stored = await (await broker.enqueue(str(asked().subject), b"{}", asked().headers()))
    await broker.delete(subjects.REQUESTS, stored.seq)
    with pytest.raises(errors.FramesLost):
        await claim(broker, asked())


async def test_the_rest_of_what_is_gone_is_not_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_SETTLE", 0.0)
    broker = MemoryBroker()
    with pytest.raises(errors.NotFound):
        await claim(broker, asked(), read_on=True)
    assert await count(broker) == 0
