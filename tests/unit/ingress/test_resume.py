"""Which reply a client that comes back is given."""

from __future__ import annotations

import asyncio

import pytest

from broker import base, errors, subjects
from broker.memory import MemoryBroker
from ingress import resume

SUBJECT = subjects.reply("acme", "mailbox", "one")


async def test_a_reply_is_found_by_tenant_and_request() -> None:
    broker = MemoryBroker()
    await broker.publish(SUBJECT, b"frame")
    assert await resume.find(broker, "acme", "one") == SUBJECT
    with pytest.raises(errors.NotFound, match="nothing is known of request 'one'"):
        await resume.find(broker, "other", "one")


async def test_a_copy_that_lags_behind_hides_no_reply() -> None:
    class Lagging(MemoryBroker):
        async def last(self, stream: str, subject: str, *, leader: bool = False) -> base.Record | None:
            return await super().last(stream, subject, leader=True) if leader else None

    broker = Lagging()
    await broker.publish(SUBJECT, b"frame")
    assert await resume.find(broker, "acme", "one") == SUBJECT


async def test_who_read_of_a_reply_waits_until_the_journal_has_it() -> None:
    """Frames reach who reads live before they are stored."""
    broker = MemoryBroker()
    finding = asyncio.create_task(resume.find(broker, "acme", "one", known=True))
    stranger = asyncio.create_task(resume.find(broker, "acme", "one"))
    with pytest.raises(errors.NotFound):
        await stranger
    assert not finding.done()
    await broker.publish(SUBJECT, b"frame")
    assert await finding == SUBJECT


async def test_a_reply_that_never_comes_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resume, "_SETTLE", 0.1)
    with pytest.raises(errors.NotFound):
        await resume.find(MemoryBroker(), "acme", "one", known=True)
