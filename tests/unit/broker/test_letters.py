"""What can not be run is kept among the dead letters."""

from __future__ import annotations

from typing import Any

import pytest

from broker import bodies, errors, letters, objects, replies, subjects
from broker.memory import MemoryBroker
from broker.messages import Attempt, DeadLetter, FrameKind, parse_request

SUBJECT = "out.acme.box.r1"


async def kept(broker: MemoryBroker) -> list[DeadLetter]:
    records = await broker.read(subjects.DEAD, subjects.ALL_DEAD)
    return [DeadLetter.model_validate_json(record.data) for record in records]


FAULT = errors.MalformedMessage("no path")


async def test_a_dead_letter_keeps_the_message_and_answers_it(anyio_backend: object) -> None:
    broker = MemoryBroker()
    headers = {"Reply-To": SUBJECT, "Odd": "one"}
    history = (Attempt(epoch=1, worker="w1", at_ms=1, what="worker lost"),)
    await letters.dead_letter(broker, "req.llama.standard.acme.llama", headers, b"\xff", FAULT, 2, history)
    (letter,) = await kept(broker)
    assert letter.history == history
    assert (letter.reason, letter.message, letter.headers) == ("malformed_message", "no path", headers)
    assert letter.body == "/w=="
    frame = await replies.last_frame(broker, SUBJECT, 0)
    assert frame is not None
    assert (frame.epoch, frame.kind, frame.extra["status"]) == (2, FrameKind.ERROR, 400)


@pytest.mark.parametrize(
    ("subject", "reply_to"),
    [
        ("req.llama.standard.acme.llama", ""),
        ("req.llama.standard.acme.llama", "out.acme.*.r1"),
        ("req.llama.standard.acme.llama", "req.llama.standard.acme.llama"),
        ("req.llama.standard.mallory.llama", SUBJECT),
        ("req.x", SUBJECT),
    ],
)
async def test_nobody_is_answered_whom_the_sender_may_not_write_to(
    anyio_backend: object, subject: str, reply_to: str
) -> None:
    broker = MemoryBroker()
    await letters.dead_letter(broker, subject, {"Reply-To": reply_to}, b"", FAULT)
    assert len(await kept(broker)) == 1
    assert await broker.counts(subjects.REPLIES, subjects.ALL_REPLIES) == {}


async def test_what_is_no_request_and_too_large_for_its_dead_letter_leaves_its_body_behind(
    anyio_backend: object,
) -> None:
    broker = MemoryBroker()
    await letters.dead_letter(broker, "req.llama.standard.acme.llama", {}, bytes(2**20), FAULT)
    (letter,) = await kept(broker)
    assert letter.body == ""
    assert letter.message == "no path (headers and body, 1048576 bytes, were too large to keep)"


REQUEST = {"Reply-To": SUBJECT, "Path": "/v1/completions", "Nats-Msg-Id": "acme:r1"}


async def test_a_request_too_large_for_its_dead_letter_has_its_body_in_the_store(
    anyio_backend: object,
) -> None:
    broker, body = MemoryBroker(), bytes(range(256)) * 4000
    await letters.bury(broker, "req.llama.standard.acme.llama", REQUEST, body, FAULT)
    (letter,) = await kept(broker)
    assert (letter.body, letter.message) == ("", "no path")
    request = parse_request(letter.subject, letter.headers, b"")
    assert (await bodies.load(broker, request)).body == body


async def stored(broker: MemoryBroker) -> int:
    return sum((await broker.counts("OBJ_payloads", "$O.payloads.M.>")).values())


async def test_what_is_kept_once_has_one_body_in_the_store(anyio_backend: object) -> None:
    broker = MemoryBroker()
    for _ in range(2):
        await letters.bury(broker, "req.llama.standard.acme.llama", REQUEST, bytes(2**20), FAULT, seq=7)
    assert len(await kept(broker)) == await stored(broker) == 1


async def test_a_letter_that_is_refused_leaves_no_body_behind(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = MemoryBroker()
    enqueue = broker.enqueue

    async def full(subject: str, *more: Any) -> Any:
        if subject.startswith("dead."):
            raise errors.Overloaded("full")
        return await enqueue(subject, *more)

    monkeypatch.setattr(broker, "enqueue", full)
    with pytest.raises(errors.Overloaded):
        await letters.bury(broker, "req.llama.standard.acme.llama", REQUEST, bytes(2**20), FAULT)
    assert await stored(broker) == 0


@pytest.mark.parametrize(
    ("more", "body"),
    [
        ({"Odd": '"' * 2**19}, b"x"),
        ({"Odd": "x" * 2**20}, b"x"),
        ({"Odd": "x" * 2**20, "Body-Object": "acme.b1"}, b""),
    ],
)
async def test_a_request_whose_headers_are_too_large_leaves_them_behind(
    anyio_backend: object, more: dict[str, str], body: bytes
) -> None:
    broker = MemoryBroker()
    await letters.bury(broker, "req.llama.standard.acme.llama", REQUEST | more, body, FAULT)
    (letter,) = await kept(broker)
    assert (letter.headers, letter.body) == ({}, "")
    assert "were too large to keep" in letter.message
    assert await stored(broker) == 0


async def test_a_full_store_leaves_the_body_of_a_dead_letter_behind(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise errors.Overloaded("full")

    broker = MemoryBroker()
    monkeypatch.setattr(objects, "put", full)
    await letters.bury(broker, "req.llama.standard.acme.llama", REQUEST, bytes(2**20), FAULT)
    (letter,) = await kept(broker)
    assert (letter.headers, letter.body) == ({}, "")
    assert letter.message.startswith(
        "no path (headers and body, 1048576 bytes, were too large to keep; the store"
    )
