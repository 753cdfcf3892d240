"""What nats-py itself can't read: published by hand, since no client would send it."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

import nats
import nats.js.errors
import pytest

from broker import client, subjects
from broker.base import Message
from broker.config import BrokerConfig
from broker.messages import DeadLetter
from tests.waiting import until
from workers.runner import Worker

BAD_HEADERS = [b"XXXX\r\n\r\n", b"NATS/1.0 200 \xff\r\n\r\n", b"NATS/1.0\r\nPath: \xff\r\n\r\n"]


async def send(nats_url: str, *commands: bytes) -> None:
    """Raw protocol lines; returns when the server has read them all."""
    reader, writer = await asyncio.open_connection(urlsplit(nats_url).hostname, urlsplit(nats_url).port)
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n' + b"".join(commands) + b"PING\r\n")
    while not (line := await reader.readline()).startswith(b"PONG"):
        assert not line.startswith(b"-ERR"), line
    writer.close()
    await writer.wait_closed()


def hpub(subject: bytes, head: bytes, body: bytes = b"{}") -> bytes:
    sizes = b"%d %d" % (len(head), len(head) + len(body))
    return b"HPUB " + subject + b" " + sizes + b"\r\n" + head + body + b"\r\n"


@pytest.mark.parametrize("head", BAD_HEADERS)
async def test_unreadable_headers_reach_their_handler_without_them(nats_url: str, head: bytes) -> None:
    heard: list[Message] = []
    async with await client.connect(BrokerConfig(url=nats_url), "reader") as broker:
        await broker.subscribe("fleet.*", heard.append)
        await broker.last(subjects.REPLIES, "out.a.b.c")  # the server knows of the subscription
        await send(nats_url, hpub(b"fleet.x", head), b"PUB fleet.y 2\r\nok\r\n")
        await until(lambda: len(heard) == 2)
        assert [m.data for m in heard] == [b"{}", b"ok"]
        assert broker.connected


async def test_requests_nobody_can_read_end_in_the_dead_letters(nats_url: str, sim_worker: Worker) -> None:
    subject = b"req.sim.standard.acme.sim"
    odd = b"PUB req.sim.standard.\xff.sim 2\r\n{}\r\n"
    async with await client.connect(BrokerConfig(url=nats_url), "reader") as broker:
        await send(nats_url, odd, *(hpub(subject, head) for head in BAD_HEADERS))

        async def letters() -> list[DeadLetter]:
            records = await broker.read(subjects.DEAD, subjects.ALL_DEAD)
            return [DeadLetter.model_validate_json(record.data) for record in records]

        async def all_there() -> bool:
            return len(await letters()) == 4

        await until(all_there)
        assert {letter.reason for letter in await letters()} == {"malformed_message"}
        assert "\\udcff" in (await letters())[0].subject

        async def queue_empty() -> bool:
            return not await broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)

        await until(queue_empty)


async def test_a_consumer_that_was_deleted_is_made_again(nats_url: str, sim_worker: Worker) -> None:
    """By an operator's slip, say; and no pull is repeated thousands of times meanwhile."""
    async with await client.connect(BrokerConfig(url=nats_url), "slip") as broker:
        name = subjects.consumer("sim", "standard")
        operator = await nats.connect(nats_url)

        async def deleted() -> bool:
            with contextlib.suppress(nats.js.errors.NotFoundError):  # the worker has yet to make it
                return await operator.jetstream().delete_consumer(subjects.REQUESTS, name)
            return False

        await until(deleted)
        await operator.close()
        request = subjects.RequestSubject("sim", "standard", "acme", "sim")
        headers = {"Nats-Msg-Id": "acme:1", "Reply-To": "out.acme.box.1", "Path": "/v1/completions"}
        await (await broker.enqueue(str(request), b'{"model":"sim","prompt":"x"}', headers))

        async def answered() -> bool:
            record = await broker.last(subjects.REPLIES, "out.acme.box.1")
            return record is not None and b'"kind":"end"' in record.data

        await until(answered)


@pytest.mark.parametrize(
    ("subject", "reply_to"),
    [
        ("req.sim.standard.acme.sim", "out.acme.box." + "r" * 5000),
        ("req.sim.standard.acme." + "ü" * 1000, "out.acme.box.long"),
        ("req.sim.standard." + "ü" * 1000 + ".sim", "out.acme.box.long"),
    ],
)
async def test_names_too_long_for_a_line_are_dead_letters_and_the_worker_goes_on(
    nats_url: str, sim_worker: Worker, subject: str, reply_to: str
) -> None:
    """The server closes a connection that sends such a line, as an answer would."""
    body = b'{"model":"sim","prompt":"x","max_tokens":3}'
    async with await client.connect(BrokerConfig(url=nats_url), "publisher") as broker:
        for number, (to, reply) in enumerate(
            [(subject, reply_to), ("req.sim.standard.acme.sim", "out.acme.box.good")]
        ):
            headers = {"Nats-Msg-Id": f"acme:{number}", "Reply-To": reply, "Path": "/v1/completions"}
            await (await broker.enqueue(to, body, headers))

        async def answered() -> bool:
            record = await broker.last(subjects.REPLIES, "out.acme.box.good")
            return record is not None and b'"kind":"end"' in record.data

        await until(answered)
        (letter,) = await broker.read(subjects.DEAD, subjects.ALL_DEAD)
        assert DeadLetter.model_validate_json(letter.data).reason == "malformed_message"
        assert sim_worker._broker.connected
