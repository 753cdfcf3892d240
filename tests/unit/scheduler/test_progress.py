"""How far a request has come is what its reader has, however many attempts told it."""

from __future__ import annotations

import pytest

from broker import errors, replies
from broker.memory import MemoryBroker
from broker.messages import QUEUED_EPOCH
from scheduler import progress
from scheduler.progress import Progress

REPLY = "out.acme.box.r1"


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker()


async def said(broker: MemoryBroker, epoch: int = 1) -> replies.Writer:
    """A head with two tokens, and data with three."""
    writer = replies.Writer(broker, REPLY, epoch, 7)
    await writer.head(200, {}, "w1", b"data: a\n\n", [(0, [1, 2])])
    await writer.data(b"data: b\n\n", [(0, [3, 4, 5]), (1, [6])])
    return writer


async def of(broker: MemoryBroker) -> Progress:
    await broker.sync()
    return await progress.of(broker, REPLY, 0.0)


async def test_what_nobody_had_has_not_begun(broker: MemoryBroker) -> None:
    assert await of(broker) == (False, 0)
    await replies.Writer(broker, REPLY, QUEUED_EPOCH, 7).beat("")
    assert await of(broker) == (False, 0)
    await replies.Writer(broker, REPLY, 1, 7).beat("w1", left="passed on")
    assert await of(broker) == (False, 0)


async def test_what_was_said_counts(broker: MemoryBroker) -> None:
    await said(broker)
    assert await of(broker) == (True, 5)


async def test_a_worker_that_gave_it_back_says_it_once_more(broker: MemoryBroker) -> None:
    writer = await said(broker)
    await writer.beat("w1", left="preempted")
    assert await of(broker) == (True, 5)


async def test_one_that_took_it_over_and_died_has_not_said_it(broker: MemoryBroker) -> None:
    await said(broker)
    await replies.Writer(broker, REPLY, 2, 7).beat("w2")
    assert await of(broker) == (True, 5)


async def test_an_answer_that_has_ended_had_begun(broker: MemoryBroker) -> None:
    await replies.Writer(broker, REPLY, 1, 7).error(errors.Cancelled("the caller went away"))
    assert await of(broker) == (True, 0)


async def test_what_is_older_than_the_request_is_anothers(broker: MemoryBroker) -> None:
    await said(broker)
    await broker.sync()
    assert await progress.of(broker, REPLY, broker.now_ms() + 60_000) == (False, 0)
