"""Clients as they are out there: they stream, wait, leave, and come back to another ingress."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from enum import StrEnum

import httpx
import orjson

from tests.chaos.check import Ask, End, Tokens, Transcript

HUNG = 30.0
"""Seconds without a token, or without any answer, after which a client gives up on a request: more than
the ack wait and an election together."""
THINK = 1.0
"""Mean seconds between two requests of a client."""
_AGAIN = 0.25
_RETRY = (429, 502, 503)
_REFUSALS = ("unavailable", "unconfirmed", "overloaded")
_CLASSES = {"interactive": 46, "standard": 46, "batch": 8}
_TOKENS = {"interactive": (20, 60), "standard": (20, 60), "batch": (80, 240)}
_TENANTS = 4
_TIMEOUTS = 0, 0, 0, 60
"""Seconds, of which some are given: more than any request takes, and far less than clocks are wrong by."""
_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


class Manner(StrEnum):
    """What a client does with its request."""

    CHAT = "chat"
    COMPLETION = "completion"
    CHOICES = "several choices"
    WHOLE = "not streamed"
    DETACHED = "detached"  # leaves, and reads on at another ingress
    KEYED = "keyed"  # repeats the POST under its Idempotency-Key, should the connection break
    LEAVING = "leaving"  # leaves for good


_WEIGHTS = {
    Manner.CHAT: 35,
    Manner.COMPLETION: 20,
    Manner.CHOICES: 10,
    Manner.WHOLE: 10,
    Manner.DETACHED: 10,
    Manner.KEYED: 10,
    Manner.LEAVING: 5,
}


class Client:
    """One user with one request at a time. Its dice are its own, seeded: what it asks is repeatable.

    Args:
        ingresses: URLs of the ingresses there are now.
        done: called with each transcript as it ends.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        http: httpx.AsyncClient,
        ingresses: Callable[[], list[str]],
        done: Callable[[Manner, Transcript], None],
    ) -> None:
        self._number = number
        self._seed = seed
        self._dice = random.Random(f"{seed}/{number}")
        self._http = http
        self._ingresses = ingresses
        self._done = done

    async def run(self, stop: asyncio.Event) -> None:
        """Ask one thing after another until `stop`; what runs then is followed to its end."""
        count = 0
        while not stop.is_set():
            count += 1
            request = self._ask(f"c{self._seed}-{self._number}-{count}")
            await request.run()
            self._done(request.manner, request.seen)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._dice.expovariate(1 / THINK))

    def _ask(self, request_id: str) -> Request:
        dice = self._dice
        manner = dice.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        service_class = dice.choices(list(_CLASSES), list(_CLASSES.values()))[0]
        ask = Ask(
            request_id=request_id,
            path=_COMPLETION if manner is Manner.COMPLETION else dice.choice((_CHAT, _CHAT, _COMPLETION)),
            prompt=f"{request_id} " + "x" * dice.randrange(200),
            tokens=dice.randint(*_TOKENS[service_class]),
            choices=dice.randint(2, 3) if manner is Manner.CHOICES else 1,
            stream=manner is not Manner.WHOLE,
            service_class=service_class,
            tenant=f"t{self._number % _TENANTS}",
            timeout=dice.choice(_TIMEOUTS),
        )
        leaves = dice.randrange(1, ask.tokens) if manner in (Manner.DETACHED, Manner.LEAVING) else 0
        return Request(self._http, ask, manner, leaves, self._ingresses, dice)


class Request:
    """One request's way through broken connections and other ingresses to its end.

    Args:
        leaves: tokens after which the client closes the connection; 0 = never.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        ask: Ask,
        manner: Manner,
        leaves: int,
        ingresses: Callable[[], list[str]],
        dice: random.Random,
    ) -> None:
        self.manner = manner
        self.seen = Transcript(ask, time.monotonic())
        self._http = http
        self._ask = ask
        self._leaves = leaves
        self._ingresses = ingresses
        self._dice = dice
        self._last_id = ""
        self._asked = False  # it may have been accepted
        self._post = True
        self._pending = b""
        self._pause = 0.0  # seconds before the next connection
        self._limit: asyncio.Timeout | None = None

    async def run(self) -> None:
        seen = self.seen
        try:
            async with asyncio.timeout(HUNG) as self._limit:
                while seen.end is None:
                    await self._try()
                    await asyncio.sleep(self._pause)
        except TimeoutError:
            seen.end = End.HUNG
            seen.fault = seen.fault or f"nothing came for {HUNG:.0f} s"
        seen.ended = time.monotonic()

    async def _try(self) -> None:
        """One connection: to ask, or to read on."""
        url = self._url()
        self.seen.visits.append((time.monotonic(), url))
        self._pending, self._pause = b"", 0.0
        begun = False
        try:
            async with self._open(url) as response:
                begun = response.status_code == 200
                await self._answered(response)
        except (httpx.TransportError, AttributeError) as exc:
            # So anyio says that a connection broke before it was asked where it leads.
            if isinstance(exc, AttributeError) and exc.name != "getpeername":
                raise
            if self.seen.end is None:
                self.seen.breaks.append(time.monotonic())
                self.seen.cut += begun
                # A connection that was never made asked nothing.
                self._asked = self._asked or not isinstance(exc, httpx.ConnectError)
                self._post = not self._asked or self.manner is Manner.KEYED
                self._pause = _AGAIN

    def _url(self) -> str:
        """Another ingress than the last one, where there is one."""
        urls = self._ingresses()
        others = [url for url in urls if url != (self.seen.ingresses or [""])[-1]]
        return self._dice.choice(others or urls or ["http://127.0.0.1:9"])

    def _open(self, url: str) -> AbstractAsyncContextManager[httpx.Response]:
        headers = {
            "X-Request-Id": self._ask.request_id,
            "X-Headrace-Tenant": self._ask.tenant,
            "X-Priority": self._ask.service_class,
        }
        if self._ask.timeout:
            headers["X-Headrace-Timeout"] = str(self._ask.timeout)
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        if not self._post:
            return self._http.stream(
                "GET", f"{url}/v1/requests/{self._ask.request_id}/stream", headers=headers
            )
        if self.manner is Manner.DETACHED:
            headers["X-Detach"] = "true"
        if self.manner is Manner.KEYED:
            headers["Idempotency-Key"] = self._ask.request_id
        return self._http.stream("POST", url + self._ask.path, json=self._body(), headers=headers)

    def _body(self) -> dict[str, object]:
        ask = self._ask
        body: dict[str, object] = {"model": "sim", "max_tokens": ask.tokens, "n": ask.choices}
        body["return_token_ids"] = True
        if ask.path == _CHAT:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        if ask.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    # Answers

    async def _answered(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            self._asked = True
            self.seen.worker = self.seen.worker or response.headers.get("x-headrace-worker", "")
            if self._ask.stream:
                await self._follow(response.aiter_raw())
            else:
                self._whole(await response.aread())
            return
        code = _code(await response.aread())
        self._pause = _AGAIN
        if self._post and not self.seen.breaks and status in _RETRY:
            self._end(End.REFUSED, code)
        elif status == 404 and not self._post:
            # No worker has it yet, or it never came into the queue: asked again it is not run twice.
            self._post = not self.seen.tokens
        elif status == 409 and self._post and self.seen.breaks:
            self._post = False
        elif status not in _RETRY:
            self._end(End.INTERRUPTED, f"{status} {code}")

    def _end(self, end: End, fault: str = "") -> None:
        self.seen.end, self.seen.fault = end, fault

    async def _follow(self, parts: AsyncIterator[bytes]) -> None:
        async for part in parts:
            *events, self._pending = (self._pending + part).split(b"\n\n")
            for event in events:
                self._event(event)
            if self.seen.end is not None:
                return
            if self._leaves and len(self.seen.tokens) >= self._leaves:
                self._leave()
                return
        if self.seen.dones:
            self._end(End.COMPLETE)
        elif self.seen.end is None:
            self._end(End.INTERRUPTED, "the stream ended without [DONE]")

    def _leave(self) -> None:
        if self.manner is Manner.LEAVING:
            self._end(End.LEFT)
        self._leaves, self._post = 0, False
        self._pause = self._dice.uniform(0, 0.5)

    def _event(self, event: bytes) -> None:
        data = b""
        for line in event.split(b"\n"):
            name, _, value = line.partition(b": ")
            if name == b"data":
                data = value
            elif name == b"id":
                self._last_id = value.decode()
        if data == b"[DONE]":
            self.seen.dones += 1
        elif data:
            self._chunk(orjson.loads(data))

    def _chunk(self, chunk: dict[str, object]) -> None:
        fault = chunk.get("error")
        if isinstance(fault, dict):
            code = str(fault.get("code"))
            refused = not self.seen.tokens and not self.seen.breaks and code in _REFUSALS
            self._end(End.REFUSED if refused else End.INTERRUPTED, f"{code}: {fault.get('message')}")
            return
        self._choices(chunk)

    def _whole(self, body: bytes) -> None:
        self._choices(orjson.loads(body))
        self._end(End.COMPLETE)

    def _choices(self, chunk: dict[str, object]) -> None:
        now = time.monotonic()
        choices = chunk["choices"]
        assert isinstance(choices, list)
        for choice in choices:
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            ids = tuple(choice.get("token_ids") or ())
            text = said.get("content") or ""
            if ids or text:
                self.seen.tokens.append(Tokens(now, choice["index"], ids, text))
                self._came()
            if choice.get("finish_reason"):
                self.seen.finishes.append((choice["index"], choice["finish_reason"]))
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.seen.usages.append(usage)

    def _came(self) -> None:
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + HUNG)


def _code(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
