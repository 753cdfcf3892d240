"""The HTTP face: routing, the life of one request from its first byte to its metrics, the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

import orjson
import uvicorn

from broker import addresses, base, bodies, errors, replies, subjects, usage
from broker.messages import PATHS, Request
from ingress import admit, keys, metrics, pages, prompt, resume, sse, steering
from ingress import errors as wording
from ingress.catalogue import Catalogue
from ingress.config import IngressConfig
from ingress.exchange import Exchange, stopped
from ingress.http import ClientGone, Receive, Scope, Send, Turn, answer, read_body
from ingress.protocol import Protocol, was_cut
from ingress.relay import Relay

_log = logging.getLogger(__name__)

_LAST_WORD = 5.0
"""Seconds past the drain timeout in which callers are told; those who read nothing are not waited for."""


class _Admitted(NamedTuple):
    """A request, whether it is to stream, and what its answer's head says of the model that was chosen."""

    request: Request
    streaming: bool
    told: list[tuple[bytes, bytes]]


class Ingress:
    """The ASGI app. `mailbox` and `catalogue` are open while it serves."""

    def __init__(
        self, config: IngressConfig, broker: base.Broker, mailbox: replies.Mailbox, catalogue: Catalogue
    ) -> None:
        self._config = config
        self._broker = broker
        self._mailbox = mailbox
        self._catalogue = catalogue
        self._tenants = admit.Tenants(config)
        self._steering = steering.Steering(config, catalogue)
        self._pages = pages.app(broker, catalogue, self._tenants)
        self._large = asyncio.Semaphore(config.max_large)
        self._afterwards: set[asyncio.Task[None]] = set()
        self._readers = 0  # those that read on, and those with a key: their streams are in no mailbox

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        resumed = resume.requested(scope["path"])
        if resumed is not None and scope["method"] == "GET":
            await self._resume(resumed, scope, receive, send)
        elif scope["path"] == steering.DRY_RUN and scope["method"] == "POST":
            await self._dry_run(scope, receive, send)
        elif scope["path"] not in (*PATHS, steering.DRY_RUN):
            await self._pages(scope, receive, send)
        elif scope["method"] != "POST":
            await self._refuse(scope, send)
        else:
            await self._infer(scope, receive, send)

    async def _refuse(self, scope: Scope, send: Send) -> None:
        path: str = scope["path"]
        fault = errors.MethodNotAllowed(f"{scope['method']} {path} is not served here: use POST")
        head = wording.headers(fault, admit.request_id(dict(scope["headers"])))
        await answer(send, fault.status, [*head, (b"allow", b"POST")], wording.body(fault.body(), path))

    async def _resume(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET /v1/requests/<id>/stream`: a reply to this tenant, on from where its reader was."""
        headers = dict(scope["headers"])
        # Whether it is a stream shows when it begins.
        relay = Relay(send, scope["path"], request_id, streaming=False)
        status = 499
        try:
            tenant = self._tenants.of(headers)
            self._check_room()
            relay.after = sse.last_event(headers)
            with self._reader():
                subject = await resume.find(self._broker, tenant, request_id, relay.after is not None)
                async with replies.following(self._broker, subject, self._config.max_unread) as stream:
                    status = await self._read_on(stream, relay, receive)
        except asyncio.CancelledError:
            status = await self._stopped(relay, request_id)
        except errors.HeadraceError as exc:
            await relay.fail(exc)
            status = exc.status
        finally:
            metrics.REQUESTS.labels(resume.PATH, str(status)).inc()

    async def _read_on(self, stream: replies.Stream, relay: Relay, receive: Receive, seq: int = 0) -> int:
        """Follow what is another's to end; the status that the caller was told."""
        metrics.STREAMS.inc()
        try:
            keepalive = self._config.keepalive
            here = await resume.follow(self._broker, stream, relay, receive, keepalive, seq)
            return relay.status if here else 499
        except errors.HeadraceError as exc:
            fault = exc
        except Exception:
            _log.exception("a reply could not be read on")
            fault = errors.HeadraceError("the ingress failed on this request")
        finally:
            metrics.STREAMS.dec()
        await relay.fail(fault)
        return relay.status

    async def _stopped(self, relay: Relay, request_id: str) -> int:
        """Tell a reader that it is to read on elsewhere; the status that it was told."""
        _uncancelled()
        await relay.fail(stopped(request_id))
        return relay.status

    @contextlib.contextmanager
    def _reader(self) -> Iterator[None]:
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1

    def _check_room(self) -> None:
        if len(self._mailbox) + self._readers >= self._config.max_streams:
            most = self._config.max_streams
            raise errors.Overloaded(f"this ingress has its {most} streams open", retry_after=1)

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        path: str = scope["path"]
        headers = dict(scope["headers"])
        request_id = admit.request_id(headers)
        status = 499
        try:
            detached = admit.detached(headers)
            key = keys.given(headers)
            after = sse.last_event(headers) if key is not None else None
            request, streaming, told = await self._take_in(path, headers, request_id, key, receive)
            request_id = request.request_id
            relay = Relay(send, path, request_id, streaming)
            relay.told = told
            relay.after, relay.cut = after, functools.partial(was_cut, scope)
            if key is None:
                stream = await self._open(request)
                status = await self._exchange(request, stream, relay, receive, started, detached)
            else:
                status = await self._once(request, relay, receive, started, detached)
        except ClientGone:
            return
        except errors.HeadraceError as exc:
            status = exc.status
            await answer(send, status, wording.headers(exc, request_id), wording.body(exc.body(), path))
        finally:
            metrics.REQUESTS.labels(path, str(status)).inc()

    async def _once(
        self, request: Request, relay: Relay, receive: Receive, started: float, detached: bool
    ) -> int:
        """A request with a key: queued if its key is new, and in any case followed."""
        with self._reader():
            async with replies.following(self._broker, request.reply_to, self._config.max_unread) as stream:
                claim = await self._claim(request, relay.after is not None)
                if not claim.ours:
                    relay.told = []  # the first one's choice stands, whatever it was
                    try:
                        return await self._read_on(stream, relay, receive, claim.seq)
                    except asyncio.CancelledError:
                        return await self._stopped(relay, request.request_id)
                stored = base.Stored(claim.seq, False)
                return await self._exchange(request, stream, relay, receive, started, detached, stored)

    async def _claim(self, request: Request, read_on: bool) -> keys.Claim:
        """Raises what keys.claim does. The body stays where a message of this call is, or may be, queued."""
        needed = False
        try:
            claim = await keys.claim(self._broker, request, self._config.publish_timeout, read_on)
            needed = claim.ours
            return claim
        except errors.Unconfirmed:
            needed = True
            raise
        except asyncio.CancelledError as exc:
            needed = True
            _uncancelled()
            raise errors.Unconfirmed("this ingress stops: repeat the request under its key") from exc
        finally:
            if not needed:
                self._after(bodies.discard(self._broker, request))

    async def _exchange(
        self,
        request: Request,
        stream: replies.Stream,
        relay: Relay,
        receive: Receive,
        started: float,
        detached: bool,
        stored: base.Stored | None = None,
    ) -> int:
        """Through the queue, unless it is `stored` there, and back; the status that the caller was told."""
        exchange = Exchange(self._config, self._broker, request, stream, relay, self._catalogue.served)
        fault: errors.HeadraceError | None = errors.Cancelled("this ingress stopped")
        metrics.STREAMS.inc()
        try:
            fault = await self._publish_and_follow(request, exchange, relay, receive, started, stored)
            self._observe(request, relay, fault, started)
        finally:
            metrics.STREAMS.dec()
            # What is lost on its reader here may be whole to the next; who reads slowly is told to read on.
            left_alone = isinstance(fault, errors.ReaderTooSlow | errors.IngressStopped) or (
                detached and isinstance(fault, errors.Cancelled | errors.FramesLost)
            )
            if fault is not None and exchange.cancellable and not left_alone:
                self._after(self._cancel(exchange, stream, fault))
            else:
                stream.close()
            if not exchange.cancellable:  # no queued message names its body
                self._after(bodies.discard(self._broker, request))
        unread = isinstance(fault, errors.Cancelled | errors.ReaderTooSlow)
        return fault.status if fault is not None and unread else relay.status

    async def _publish_and_follow(
        self,
        request: Request,
        exchange: Exchange,
        relay: Relay,
        receive: Receive,
        started: float,
        stored: base.Stored | None,
    ) -> errors.HeadraceError | None:
        """Whatever goes wrong is told to the caller, and returned."""
        try:
            if stored is None:
                await exchange.publish()
            else:
                exchange.accepted(stored)
            await self._want(request.subject)
            metrics.ADMIT.observe(time.monotonic() - started)
            return await exchange.follow(receive)
        except asyncio.CancelledError:
            _uncancelled()
            fault = await exchange.leave()
        except errors.HeadraceError as exc:
            fault = exc
        except Exception:
            _log.exception("a request broke in the ingress")
            fault = errors.HeadraceError("the ingress failed on this request")
        await relay.fail(fault)
        return fault

    async def _take_in(
        self, path: str, headers: dict[bytes, bytes], request_id: str, key: bytes | None, receive: Receive
    ) -> _Admitted:
        """The request, its body stored where it is too large for a message."""
        turn = Turn(self._large, bodies.room(self._broker))
        try:
            admitted = await self._admit(path, headers, request_id, key, receive, turn)
            return admitted._replace(request=await bodies.stow(self._broker, admitted.request))
        except asyncio.CancelledError as exc:
            _uncancelled()
            raise errors.Unavailable("this ingress stopped before it had queued the request") from exc
        finally:
            turn.end()

    async def _open(self, request: Request) -> replies.Stream:
        try:
            return self._mailbox.open(request.subject.tenant, request.request_id)
        except errors.DuplicateRequest:
            await bodies.discard(self._broker, request)
            raise

    async def _admit(
        self,
        path: str,
        headers: dict[bytes, bytes],
        request_id: str,
        key: bytes | None,
        receive: Receive,
        turn: Turn,
    ) -> _Admitted:
        """Everything that can be refused before the broker is touched."""
        config = self._config
        tenant, body = await self._read(headers, receive, turn)
        asked = _asked(headers, body)
        choice = self._steering.choose(path, asked, len(body), headers, tenant)
        service_class = steering.service_class(asked, choice)
        mailbox = self._mailbox.name
        if key is not None:
            request_id, mailbox = keys.request_id(tenant, key), keys.fingerprint(path, body)
        told = steering.told(asked.model, choice)
        if told:
            metrics.ROUTED.labels(asked.model, choice.model).inc()
        request = Request(
            subject=subjects.RequestSubject(choice.base, service_class, tenant, choice.model),
            request_id=request_id,
            reply_to=subjects.reply(tenant, mailbox, request_id),
            path=path,
            body=body,
            deadline_ms=int(self._broker.now_ms() + admit.timeout(headers, service_class, config) * 1000),
            traceparent=admit.traceparent(headers),
            asked="" if asked.model == choice.model else asked.model,
            prefix=prompt.hashes(asked.body, len(body), choice.model),
            budget=prompt.budget(asked.body),
        )
        return _Admitted(request, asked.stream, told)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, turn: Turn) -> tuple[str, bytes]:
        """Tenant and body. Who may not ask, or asks too much, is told before a body is held for them."""
        config = self._config
        tenant = self._tenants.of(headers)
        admit.check_request_id(headers)
        self._check_room()
        return tenant, await read_body(headers, receive, config.max_body, config.body_timeout, turn)

    async def _dry_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/route`: which model would serve this body, and why."""
        headers = dict(scope["headers"])
        request_id = admit.request_id(headers)
        turn = Turn(self._large, bodies.room(self._broker))
        try:
            path = steering.dry_path(scope["query_string"])
            tenant, body = await self._read(headers, receive, turn)
            found = self._steering.explain(path, _asked(headers, body), len(body), headers, tenant)
            head = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
            status = 200
            await answer(send, status, head, orjson.dumps(found))
        except ClientGone:
            return
        except errors.HeadraceError as exc:
            status = exc.status
            await answer(send, status, wording.headers(exc, request_id), exc.body())
        finally:
            turn.end()
        metrics.REQUESTS.labels(steering.DRY_RUN, str(status)).inc()

    async def _want(self, subject: subjects.RequestSubject) -> None:
        """Tell workers that an adapter is asked for: they fetch it while its request waits."""
        if subject.model != subject.base:
            with contextlib.suppress(errors.Unavailable):
                await self._broker.publish(subjects.want(subject.base, subject.model))

    async def _cancel(self, exchange: Exchange, stream: replies.Stream, fault: errors.HeadraceError) -> None:
        try:
            await exchange.cancel(fault)
        finally:
            stream.close()

    def _after(self, work: Coroutine[Any, Any, None]) -> None:
        """In the background: the client is gone or answered, and the connection is free again."""
        task = asyncio.create_task(work)
        self._afterwards.add(task)
        task.add_done_callback(self._afterwards.discard)

    async def drain(self) -> None:
        """Wait for the cancels and the clearing up under way; each is bounded in time."""
        while self._afterwards:
            await asyncio.wait(self._afterwards)

    def _observe(
        self, request: Request, relay: Relay, fault: errors.HeadraceError | None, started: float
    ) -> None:
        labels = request.subject.model, request.subject.service_class
        now = time.monotonic()
        if relay.first_payload_at is not None:
            metrics.TTFT.labels(*labels).observe(relay.first_payload_at - started)
        metrics.TOTAL.labels(*labels, usage.outcome(fault, relay.status)).observe(now - started)
        if fault is not None and not isinstance(fault, errors.Cancelled):
            _log.warning(
                "a request failed: %s",
                fault.message,
                extra={
                    "request_id": request.request_id,
                    "model": request.subject.model,
                    "worker": relay.worker,
                    "code": fault.code,
                },
            )


def _asked(headers: dict[bytes, bytes], body: bytes) -> admit.Asked:
    priority = headers.get(b"x-priority")
    return admit.read_body(body, None if priority is None else priority.decode("latin-1"))


def _uncancelled() -> None:
    """Go on, to tell the caller: it is uvicorn that cancels what is open past the drain timeout."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


class _Server(uvicorn.Server):
    """uvicorn that tells when it accepts, and leaves signals to whoever composes the process."""

    def __init__(self, config: uvicorn.Config, accepting: Callable[[], None]) -> None:
        super().__init__(config)
        self._accepting = accepting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._accepting()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    config: IngressConfig,
    broker: base.Broker,
    stop: asyncio.Event,
    ready: Callable[[str], None],
) -> None:
    """Serve HTTP until `stop`; then finish the open streams, bounded by `drain_timeout`. Those left are
    told to read on elsewhere, and their requests go on.

    `ready` gets the address once connections are accepted. Raises OSError when the port is taken.
    """
    address = config.host, config.port
    listener = socket.create_server(address, family=addresses.family(config.host), backlog=2048)
    name = config.name or f"ingress-{int(broker.now_ms()):x}-{listener.getsockname()[1]}"
    async with replies.Mailbox(broker, name, config.max_unread) as mailbox, Catalogue(broker) as catalogue:
        ingress = Ingress(config, broker, mailbox, catalogue)
        server = _Server(
            uvicorn.Config(
                ingress,
                http=functools.partial(Protocol, write_timeout=config.write_timeout),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=2048,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=math.ceil(config.drain_timeout),
            ),
            lambda: ready(addresses.url("http", *listener.getsockname()[:2])),
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await serving
            if cut := server.server_state.tasks:
                await asyncio.wait(cut, timeout=_LAST_WORD)
            await ingress.drain()
        finally:
            stopping.cancel()
