"""An engine that is some OpenAI-compatible server: SGLang, TensorRT-LLM, llama.cpp, another vLLM.

Requests and responses pass through as bytes. The server's inside is unknown, so the credit is a number
of requests in flight, and tokens are counted from the stream: one an SSE event, put right by the
`usage` that the server reports, where it does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import orjson

from broker import errors
from broker.messages import PATHS, ModelCard
from workers.config import HttpConfig
from workers.engines import asgi
from workers.engines.base import (
    ASGIApp,
    EngineStats,
    NoAdapters,
    NoSleep,
    Receive,
    Refused,
    Scope,
    Send,
    Tap,
    Untold,
    current_tap,
)
from workers.engines.http_usage import Meter

STEP_TOKENS = 1 << 20
"""The server's token budget is unknown: the concurrency alone bounds what it is given."""
_TO_SERVER = (b"content-type", b"accept", b"authorization")
_FROM_SERVER = ("content-type", "retry-after", "x-request-id")


class HttpEngine(NoAdapters, NoSleep, Untold):
    """See `workers.engines.base.Engine`; make one with `start`.

    A server that refuses a connection is given nothing more until it passes a health check.
    """

    name = "http"
    continues = False  # what tokens an answer is made of stays in the server

    def __init__(
        self, config: HttpConfig, client: httpx.AsyncClient, probe: httpx.AsyncClient, cards: list[ModelCard]
    ) -> None:
        self.config = config
        self.base = cards[0].base
        self.app: ASGIApp = self._app
        self.models: tuple[ModelCard, ...] = tuple(cards)
        self.on_change: Callable[[], None] | None = None
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client, self._probe = client, probe
        self._slots = asyncio.Semaphore(config.concurrency)
        self._running = self._waiting = 0
        self._refusing = False
        self._watcher = asyncio.create_task(self._watch_health(), name="http-engine-health")

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            waiting=self._waiting,
            max_running=0 if self._refusing else self.config.concurrency,
            step_tokens=STEP_TOKENS,
            kv_tokens_total=0,
            kv_tokens_free=0,
        )

    async def close(self) -> None:
        self._watcher.cancel()
        await asyncio.wait({self._watcher})
        await self._client.aclose()
        await self._probe.aclose()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asgi.read_body(receive)
        except asgi.BodyTooLong as exc:
            await asgi.respond(send, 413, errors.TooLarge(str(exc)).body())
            return
        if body is None:
            return
        # Whichever ends first ends the other: cancelling the forwarding closes its connection.
        forward = asyncio.create_task(self._forward(scope, body, send))
        gone = asyncio.create_task(asgi.disconnected(receive))
        try:
            await asyncio.wait({forward, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not forward.done():
                forward.cancel()
            await asyncio.wait({forward, gone})
        if not forward.cancelled():
            forward.result()

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        self._changed()
        try:
            await self._exchange(scope, body, send, current_tap.get() or Tap())
        finally:
            self._running -= 1
            self._slots.release()
            self._changed()

    async def _exchange(self, scope: Scope, body: bytes, send: Send, tap: Tap) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name in _TO_SERVER]
        request = self._client.build_request(
            scope["method"],
            scope["path"],
            headers=[*headers, (b"accept-encoding", b"identity")],
            content=body,
        )
        tap.scheduled_at = time.monotonic()
        try:
            response = await self._client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            self._refusing = True
            raise Refused(f"the engine's server refuses connections: {exc}") from exc
        except httpx.TransportError as exc:
            await asgi.respond(
                send, 502, errors.EngineFailed(f"the engine's server broke off: {exc!r}").body()
            )
            return
        try:
            await _pass_on(response, send, tap)
        except httpx.TransportError as exc:
            raise errors.EngineFailed(f"the engine's server broke off within a response: {exc!r}") from exc
        finally:
            await response.aclose()

    async def _watch_health(self) -> None:
        """Ends, and with it the engine, when the server has failed too many checks in a row."""
        path, failures = "/health", 0
        while True:
            await asyncio.sleep(self.config.health_interval)
            try:
                status = (await self._probe.get(path)).status_code
                reason = f"GET {path} answers {status}"
            except httpx.TransportError as exc:
                status, reason = 599, f"GET {path}: {exc!r}"
            if status == 404 and path == "/health":
                path = "/v1/models"
                continue
            failures = failures + 1 if status >= 500 else 0
            if self._refusing and not failures:
                self._refusing = False
                self._changed()
            if failures == self.config.health_failures:
                text = f"{self.config.url} failed {failures} health checks in a row; the last: {reason}"
                self.died.set_exception(errors.EngineFailed(text))
                return


async def start(config: HttpConfig) -> HttpEngine:
    """Raises errors.Unavailable when no OpenAI-compatible server answers at `config.url`."""
    timeout = httpx.Timeout(config.read_timeout, connect=config.connect_timeout)
    limits = httpx.Limits(
        max_connections=config.concurrency, max_keepalive_connections=config.concurrency, keepalive_expiry=60
    )
    url = config.url.rstrip("/")
    client = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False)
    # Of its own, so that a full pool never looks like a dead server.
    probe = httpx.AsyncClient(base_url=url, timeout=config.connect_timeout, trust_env=False)
    try:
        return HttpEngine(config, client, probe, await _cards(config, probe))
    except BaseException:
        await client.aclose()
        await probe.aclose()
        raise


async def _cards(config: HttpConfig, probe: httpx.AsyncClient) -> list[ModelCard]:
    """What the server says it serves; the first is the base of all others."""
    try:
        response = await probe.get("/v1/models")
        response.raise_for_status()
        listed = [
            (str(item["id"]), int(item.get("max_model_len") or 0))
            for item in orjson.loads(response.content)["data"]
        ]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise errors.Unavailable(
            f"no OpenAI-compatible server answers at [http] url = {config.url!r}: {exc!r}"
        ) from exc
    if not listed:
        raise errors.Unavailable(f"the server at [http] url = {config.url!r} lists no model")
    base = config.base or listed[0][0]
    # A path that the server lacks is answered by its own 404.
    return [ModelCard(id=name, base=base, context_tokens=context, paths=PATHS) for name, context in listed]


async def _pass_on(response: httpx.Response, send: Send, tap: Tap) -> None:
    headers = [
        (name.encode(), value.encode()) for name, value in response.headers.items() if name in _FROM_SERVER
    ]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    streamed = response.headers.get("content-type", "").startswith("text/event-stream")
    meter = Meter(tap, streamed=streamed)
    held = b""
    async for chunk in response.aiter_raw():
        meter.feed(chunk)
        body, held = held + chunk, b""
        if streamed and body.endswith(b"\n") and not body.endswith(b"\n\n"):
            # Half of an event's end: in two frames nobody would know it as one.
            body, held = body[:-1], b"\n"
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})
    meter.end()
    await send({"type": "http.response.body", "body": held, "more_body": False})
