"""Frames into one HTTP answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from broker import errors
from broker.messages import Frame, FrameKind
from ingress import errors as wording
from ingress import sse
from ingress.relay import Relay

SSE = {"status": 200, "worker": "w", "headers": {"content-type": "text/event-stream; charset=utf-8"}}
JSON = {"status": 200, "worker": "w", "headers": {"content-type": "application/json"}}


class Client:
    """A relay, and what its client gets."""

    def __init__(self, path: str = "/v1/chat/completions", streaming: bool = True) -> None:
        self.sent: list[Any] = []
        self.relay = Relay(self._send, path, "id-1", streaming)

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]

    @property
    def complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", False)


def frame(kind: str, payload: bytes = b"", **extra: Any) -> Frame:
    return Frame(1, 0, FrameKind(kind), payload=payload, extra=extra)


def event(number: int) -> bytes:
    """As the client gets it, from a frame of `frame`."""
    return b"data: %d\nid: 1-0-0\n\n" % number


def error(fault: errors.HeadraceError, **extra: Any) -> Frame:
    return frame("error", fault.body(), status=fault.status, code=fault.code, **extra)


async def test_frames_that_wait_together_go_out_together() -> None:
    client = Client()
    assert not await client.relay.frames(
        [frame("head", b"data: 1\n\n", **SSE), frame("data", b"data: 2\n\n")]
    )
    assert client.bodies == [event(1) + event(2)]
    assert client.headers["x-request-id"] == "id-1"
    assert client.headers["x-headrace-worker"] == "w"
    assert await client.relay.frames(
        [frame("data", b"data: 3\n\n"), frame("data", b"data: 4\n\n"), frame("end")]
    )
    assert client.bodies[1:] == [event(3) + event(4), b""]
    assert client.complete


async def test_anything_else_goes_out_whole() -> None:
    client = Client(streaming=False)
    assert not await client.relay.frames([frame("beat", worker="w"), frame("head", b'{"a"', **JSON)])
    assert not await client.relay.frames([frame("data", b":1}")])
    assert not client.sent
    assert await client.relay.frames([frame("end")])
    assert client.bodies == [b'{"a":1}']
    assert client.headers["content-length"] == "7"
    assert client.headers["content-type"] == "application/json"
    assert client.headers["x-headrace-worker"] == "w"


async def test_a_late_error_of_a_whole_answer_keeps_its_status() -> None:
    client = Client(streaming=False)
    await client.relay.frames([frame("head", b'{"half', **JSON)])
    assert await client.relay.frames([error(errors.WorkerLost("lost"))])
    assert (client.status, client.relay.status) == (500, 500)
    assert orjson.loads(client.bodies[0])["error"]["code"] == "worker_lost"


async def test_an_error_in_a_stream_is_its_last_event() -> None:
    client = Client()
    await client.relay.frames([frame("head", b"data: 1\n\n", **SSE)])
    assert await client.relay.frames([frame("data", b"data: 2\n\n"), error(errors.WorkerLost("lost"))])
    assert client.status == 200
    assert client.relay.status == 500
    *_, passed_on, last = client.bodies
    assert passed_on == event(2)
    assert orjson.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_lost"
    assert client.complete


async def test_an_event_cut_in_two_is_closed_before_the_error() -> None:
    client = Client()
    await client.relay.frames([frame("head", b'data: {"half', **SSE)])
    await client.relay.fail(errors.FramesLost("lost"))
    assert client.bodies[-1].startswith(b"\n\ndata: {")


@pytest.mark.parametrize(
    ("path", "start"), [("/v1/messages", b"event: error\n"), ("/v1/responses", b"event: error\n")]
)
async def test_each_api_words_it_its_own_way(path: str, start: bytes) -> None:
    client = Client(path)
    await client.relay.keepalive()
    await client.relay.fail(errors.DeadlineExceeded("late"))
    assert client.bodies[-1].startswith(start)
    assert orjson.loads(client.bodies[-1].partition(b"data: ")[2])["type"] == "error"


async def test_comments_say_whether_it_still_waits() -> None:
    client = Client()
    await client.relay.keepalive()
    assert client.status == 200
    await client.relay.frames([frame("head", b"data: 1\n\n", **SSE)])
    await client.relay.keepalive()
    await client.relay.keepalive()
    await client.relay.frames([frame("data", b'data: {"half')])
    await client.relay.keepalive()  # a comment here would end up inside the event
    assert client.bodies == [b": queued\n\n", event(1), *[b": keep-alive\n"] * 2, b'data: {"half']


async def test_a_comment_says_that_no_worker_serves_the_model_until_one_has_it() -> None:
    client = Client()
    await client.relay.keepalive("a\n\nb")
    await client.relay.frames([frame("beat", worker="w")])
    await client.relay.keepalive("m")
    assert client.bodies == [b": queued, no worker serves a b now\n\n", b": queued\n\n"]


async def test_the_engines_own_retry_after_is_passed_on() -> None:
    client = Client(streaming=False)
    busy = {
        "status": 429,
        "worker": "w",
        "headers": {"content-type": "application/json", "Retry-After": "17"},
    }
    await client.relay.frames([frame("head", b"{}", **busy), frame("end")])
    assert (client.status, client.headers["retry-after"]) == (429, "17")


async def test_a_whole_answer_gets_no_comments() -> None:
    client = Client(streaming=False)
    await client.relay.keepalive()
    assert not client.sent
    refused = Client()
    await refused.relay.frames([frame("head", b"{", **(JSON | {"status": 400}))])
    await refused.relay.keepalive()
    assert not refused.sent


async def test_an_event_that_the_reply_does_not_have_is_no_place_to_go_on_from() -> None:
    client = Client()
    client.relay.after = sse.Position(2, 3, 0)
    with pytest.raises(errors.FramesLost, match="from the beginning"):
        await client.relay.frames([frame("head", b"data: 1\n\n", **SSE), frame("end")])
    assert b"".join(client.bodies) == b""
    client.relay.after = sse.Position(1, 0, 0)
    assert await client.relay.frames([frame("head", b"data: 1\n\n", **SSE), frame("end")])


async def test_an_engines_refusal_after_a_comment_is_an_event() -> None:
    client = Client()
    await client.relay.keepalive()
    refusal = errors.InvalidRequest("no").body()
    assert await client.relay.frames([frame("head", refusal, **(JSON | {"status": 400})), frame("end")])
    assert client.bodies[-1] == b"data: " + refusal + b"\n\n"
    assert client.relay.status == 400


@pytest.mark.parametrize(
    ("fault", "after"),
    [
        (errors.Overloaded("full", retry_after=2.2), "3"),
        (errors.Unavailable("away"), "1"),
        (errors.DeadlineExceeded("late"), None),
        (errors.EngineFailed("broken"), None),
    ],
)
async def test_a_refusal_says_when_to_try_again(fault: errors.HeadraceError, after: str | None) -> None:
    client = Client()
    await client.relay.fail(fault)
    assert client.status == fault.status
    assert client.headers.get("retry-after") == after
    assert dict(wording.headers(fault, "id-1")).get(b"retry-after") == (after and after.encode())
    assert client.headers["x-request-id"] == "id-1"
    assert client.relay.fault is fault
