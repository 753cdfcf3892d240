from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import orjson
import pytest

from broker import errors
from tests import asgi
from tests.waiting import LIMIT, until
from workers.config import HttpConfig, SimConfig
from workers.engines import http, sim
from workers.engines.base import Refused, Tap
from workers.engines.http_usage import MAX_KEPT, Meter

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2000, "stream": True}
MODELS = b'{"data":[{"id":"first"},{"id":"second","max_model_len":4096}]}'
Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(handler: Handler, asked: list[bytes] | None = None, port: int = 0) -> AsyncIterator[str]:
    """A server that lists two models and hands anything else, as raw bytes, to `handler`.

    The paths asked for are noted in `asked`.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if asked is not None:
                    asked.append(head.split(b" ")[1])
                if head.startswith(b"GET /v1/models"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(MODELS) + MODELS)
                else:
                    await handler(head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


@asynccontextmanager
async def engine(url: str, **changes: float) -> AsyncIterator[http.HttpEngine]:
    made = await http.start(HttpConfig.model_validate({"url": url} | changes))
    try:
        yield made
    finally:
        await made.close()


async def silent(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def test_the_cards_are_what_the_server_lists() -> None:
    async with server(silent) as url, engine(url) as made:
        cards = [(card.id, card.base, card.context_tokens) for card in made.models]
    assert cards == [("first", "first", 0), ("second", "first", 4096)]


async def test_without_a_server_the_start_says_which_setting_to_look_at() -> None:
    async with server(silent) as url:
        pass
    with pytest.raises(errors.Unavailable, match=r"\[http\] url = .*ConnectError"):
        await http.start(HttpConfig(url=url))


async def test_a_server_that_refuses_a_connection_gets_no_more_until_it_is_well() -> None:
    async def well(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with server(silent) as url:
        port = int(url.rpartition(":")[2])
        made = await http.start(HttpConfig(url=url, health_interval=0.02, health_failures=10_000))
    try:
        # The probe's connection may live on; the requests have a pool of their own.
        async with asgi.request(made.app, CHAT, BODY) as call:
            with pytest.raises(Refused):
                await call.ended()
            assert not call.parts
        assert (made.stats().running, made.stats().max_running) == (0, 0)
        changed = asyncio.Event()
        made.on_change = changed.set
        async with server(well, port=port), asyncio.timeout(LIMIT):
            await changed.wait()
        assert made.stats().max_running == made.config.concurrency
    finally:
        await made.close()


async def test_a_server_that_hangs_up_before_it_answers_is_a_502() -> None:
    async def hang_up(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ConnectionError

    async with server(hang_up) as url, engine(url) as made, asgi.request(made.app, CHAT, BODY) as call:
        answer = await call.json()
    assert (call.status, answer["error"]["code"]) == (502, "engine_failed")


async def test_a_server_that_dies_within_a_stream_fails_the_request() -> None:
    async def die(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(start + b"8\r\ndata: {}\r\n")
        await writer.drain()
        raise ConnectionError

    async with server(die) as url, engine(url) as made:
        async with asgi.request(made.app, CHAT, BODY) as call:
            with pytest.raises(errors.EngineFailed, match="within a response"):
                await call.ended()
        assert call.parts == [b"data: {}"]
        assert made.stats().running == 0


async def test_the_end_of_an_event_is_passed_on_whole() -> None:
    """Each body becomes a frame, and within frames the events are told apart by their ends."""
    parts = [b"data: 1\n", b"\ndata: 2", b"\n\nda", b"ta: 3\n\n", b"data: 4\n"]

    async def split(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)  # or one read would take two of them
        raise ConnectionError  # closes it

    async with server(split) as url, engine(url) as made, asgi.request(made.app, CHAT, BODY) as call:
        await call.ended()
    assert b"".join(call.parts) == b"".join(parts)
    assert not any(part.endswith(b"\n") and not part.endswith(b"\n\n") for part in call.parts[:-1])
    assert len(call.parts) > 2


async def test_a_disconnect_closes_the_connection_so_that_the_server_stops_too() -> None:
    closed = asyncio.Event()

    async def stream(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"POST" in head
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        while await reader.read(1000):
            pass
        closed.set()

    async with server(stream) as url, engine(url) as made:
        async with asgi.request(made.app, CHAT, BODY) as call:
            await anext(call.chunks())
            call.disconnect()
            await call.ended()
        async with asyncio.timeout(LIMIT):
            await closed.wait()


async def test_too_many_failed_health_checks_in_a_row_end_the_engine() -> None:
    async def sick(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert head.startswith(b"GET /health ")
        writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")

    async with server(sick) as url, engine(url, health_interval=0.01, health_failures=3) as made:
        async with asyncio.timeout(LIMIT):
            with pytest.raises(errors.EngineFailed, match=r"3 health checks in a row.*answers 500"):
                await made.died


async def test_a_server_without_a_health_path_is_asked_for_its_models() -> None:
    asked: list[bytes] = []

    async def no_health(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n")

    async with server(no_health, asked) as url, engine(url, health_interval=0.01, health_failures=1) as made:
        await until(lambda: len(asked) >= 4)
        assert not made.died.done()
    assert asked[:4] == [b"/v1/models", b"/health", b"/v1/models", b"/v1/models"]


async def test_the_whole_fleet_of_slots_serves_and_one_more_waits() -> None:
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    upstream = asyncio.create_task(sim.serve(SimConfig(beta0=1), "127.0.0.1", 0, stop, url.set_result))
    try:
        async with (
            engine(await url, concurrency=1) as made,
            asgi.request(made.app, CHAT, BODY) as first,
            asgi.request(made.app, CHAT, BODY) as second,
        ):
            await until(lambda: made.stats().waiting == 1)
            assert made.stats().running == 1
            first.disconnect()
            await first.ended()
            await anext(second.chunks())
            assert (made.stats().running, made.stats().waiting) == (1, 0)
    finally:
        stop.set()
        await upstream


# --- counting ---


def metered(parts: list[bytes], *, streamed: bool = True) -> Tap:
    tap = Tap()
    meter = Meter(tap, streamed=streamed)
    for part in parts:
        meter.feed(part)
    meter.end()
    return tap


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_counted_wherever_the_parts_are_cut(size: int) -> None:
    stream = b'data: {"a":"data: x"}\n\n' * 3 + b"data: [DONE]\n\n"
    parts = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert metered(parts).output_tokens == 3


@pytest.mark.parametrize(
    "last",
    [
        {
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 4},
            }
        },
        {
            "response": {
                "usage": {"input_tokens": 9, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4}}
            }
        },
        {"usage": {"input_tokens": 5, "output_tokens": 5, "cache_read_input_tokens": 4}},
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_the_usage_of_each_api_puts_the_counts_right(last: dict[str, object], streamed: bool) -> None:
    body = orjson.dumps(last)
    tap = metered([b"data: {}\n\n", b"data: " + body + b"\n\n"] if streamed else [body], streamed=streamed)
    assert (tap.prompt_tokens, tap.cached_tokens, tap.output_tokens) == (9, 4, 5)
    assert tap.first_token_at is not None


def test_what_was_cached_is_not_known_where_no_usage_says_so() -> None:
    body = b'data: {"usage":{"prompt_tokens":9,"completion_tokens":5}}\n\n'
    assert metered([b"data: {}\n\n", body]).cached_tokens is None


@pytest.mark.parametrize("usage", [b"null", b"[]", b'{"prompt_tokens":"many"}', b'{"prompt_tokens":1', b"{}"])
def test_a_usage_that_is_none_leaves_the_count_of_events(usage: bytes) -> None:
    assert metered([b'data: {"usage":' + usage + b"}\n\n"]).output_tokens == 1


def test_a_body_too_long_to_keep_is_passed_on_uncounted() -> None:
    tap = metered(
        [b"x" * MAX_KEPT, b"x", b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'], streamed=False
    )
    assert tap.output_tokens == 0
