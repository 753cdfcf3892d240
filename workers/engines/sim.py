"""The simulated engine: an OpenAI server with an engine's timing, and tokens known beforehand.

No weights, no torch: it stands in for vLLM where load, faults and scheduling are tested. What it
answers is in `sim_tokens`, when in `sim_pace`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import uvicorn

from broker import errors
from broker.messages import ModelCard
from workers.config import SimConfig
from workers.engines import asgi, sim_adapter, sim_request
from workers.engines.base import ASGIApp, EngineStats, Receive, Scope, Send, Untold, current_tap
from workers.engines.sim_answer import Answer
from workers.engines.sim_formats import FORMATS, Format
from workers.engines.sim_pace import ClockPacer, Pacer, Reader, StepPacer
from workers.engines.sim_request import Refused, error_body
from workers.engines.sim_tokens import chat_prompt, expected_tokens, text_of, tokenize

__all__ = ["SimEngine", "chat_prompt", "expected_tokens", "serve", "start", "text_of", "tokenize"]

_SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


class SimEngine(Untold):
    """See `workers.engines.base.Engine`; make one with `start`."""

    name = "sim"
    continues = True

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.base = config.model
        self.adapter_slots = config.adapter_slots
        self.adapters_in_memory = max(config.adapter_slots, config.adapters_in_memory)
        self.max_rank = config.max_rank if config.adapter_slots else 0
        self.adapters: set[str] = set()
        self.app: ASGIApp = self._app
        paths = (*FORMATS, "/tokenize")
        self.models: tuple[ModelCard, ...] = (
            ModelCard(id=config.model, base=config.model, context_tokens=config.context_tokens, paths=paths),
        )
        self.on_change: Callable[[], None] | None = None
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        clocked = config.ttft_ms > 0 or config.itl_ms > 0
        self._pacer: Pacer = (ClockPacer if clocked else StepPacer)(config, self._changed)
        self._readers: set[Reader] = set()
        self._created = int(time.time())
        self._closed = False
        self.can_sleep = config.sleep
        self._asleep = False
        self._task = asyncio.create_task(self._pacer.run(), name="sim-engine")
        self._task.add_done_callback(self._ended)

    def stats(self) -> EngineStats:
        return self._pacer.stats()

    async def sleep(self) -> None:
        if not self.can_sleep:
            raise errors.EngineFailed("the simulated engine sleeps with sim.sleep = true only")
        self._asleep = True

    async def wake(self) -> None:
        await asyncio.sleep(self.config.wake_ms / 1000)
        self._asleep = False

    async def load_adapter(self, model: str, path: Path, rank: int) -> None:
        await sim_adapter.check(path, self.max_rank)
        if self.config.load_ms:
            await asyncio.sleep(self.config.load_ms / 1000)
        if len(self.adapters | {model}) > self.adapters_in_memory:
            raise errors.AdapterFailed(f"{self.adapters_in_memory} adapters are loaded: unload one")
        self.adapters.add(model)

    async def unload_adapter(self, model: str) -> None:
        self.adapters.discard(model)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _ended(self, task: asyncio.Task[None]) -> None:
        reason = "closed" if task.cancelled() else f"failed: {task.exception()!r}"
        error = errors.EngineFailed(f"the simulated engine has {reason}")
        self._closed = True
        for reader in self._readers:
            reader.close(error)
        if not task.cancelled():
            self.died.set_exception(error)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise errors.NotFound(f"only HTTP is served, not {scope['type']}")
        try:
            await self._route(scope["method"], scope["path"], receive, send)
        except asgi.BodyTooLong as exc:
            await asgi.respond(send, 413, error_body(str(exc), "BadRequestError", 413))
        except Refused as exc:
            body = exc.body()
            if scope["path"] == "/v1/messages":
                body = b'{"type":"error",' + body[1:]
            await asgi.respond(send, exc.status, body)

    async def _route(self, method: str, path: str, receive: Receive, send: Send) -> None:
        if method == "GET" and path == "/v1/models":
            await asgi.respond(send, 200, self._model_list())
        elif method == "GET" and path == "/health":
            await asgi.respond(send, 503 if self._closed else 200, b"")
        elif path not in FORMATS and path != "/tokenize":
            raise Refused("Not Found", status=404)
        elif method != "POST":
            await asgi.respond(send, 405, error_body("Method Not Allowed", "BadRequestError", 405))
        elif (raw := await asgi.read_body(receive)) is not None:
            body = sim_request.load(raw)
            self._check_model(body.get("model"))
            if path == "/tokenize":
                await asgi.respond(send, 200, self._tokenized(body))
            else:
                await self._generate(path, body, receive, send)

    async def _generate(self, path: str, body: dict[str, object], receive: Receive, send: Send) -> None:
        model = body.get("model") or self.base
        adapter = str(model) if model in self.adapters else ""
        generation = sim_request.read(path, body, self.config, adapter)
        if self._closed:
            raise errors.EngineFailed("the simulated engine has closed")
        if self._asleep:
            raise Refused("The engine sleeps.", status=503)
        reader = Reader(current_tap.get())
        answer = Answer(generation, self.config, self._pacer, reader)
        shape = FORMATS[path](adapter or self.base, generation, [choice.prompt for choice in answer.choices])
        self._readers.add(reader)
        watch = asyncio.create_task(_watch(receive, reader))
        try:
            if generation.stream:
                await _stream(answer, shape, send)
            else:
                await _whole(answer, shape, send)
        finally:
            watch.cancel()
            answer.close()
            self._readers.discard(reader)

    def _check_model(self, name: object) -> None:
        if name is None or name == self.config.model:
            return
        if not isinstance(name, str):
            raise Refused("`model` must be a string.", "model")
        if name in self.adapters:
            return
        raise Refused(f"The model `{name}` does not exist.", "model", status=404)

    def _model_list(self) -> bytes:
        card = {
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "max_model_len": self.config.context_tokens,
        }
        cards = [{"id": self.base} | card]
        cards += [{"id": model, "parent": self.base} | card for model in sorted(self.adapters)]
        return orjson.dumps({"object": "list", "data": cards})

    def _tokenized(self, body: dict[str, object]) -> bytes:
        ids = sim_request.tokenized(body)
        return orjson.dumps({"count": len(ids), "max_model_len": self.config.context_tokens, "tokens": ids})


async def _stream(answer: Answer, shape: Format, send: Send) -> None:
    """Each token is an event of its own; a slow reader gets several in one body."""
    await send({"type": "http.response.start", "status": 200, "headers": _SSE})
    events = [shape.opening()]
    while pieces := await answer.take():
        for piece in pieces:
            if piece.reason:
                events.append(shape.last(*piece))
            else:
                events.append(shape.token(piece.choice, piece.text, piece.ids))
        done = answer.done
        if done:
            events.append(shape.closing(answer.choices, answer.usage))
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": not done})
        if done:
            return
        events.clear()


async def _whole(answer: Answer, shape: Format, send: Send) -> None:
    while not answer.done:
        if not await answer.take():
            return
    await asgi.respond(send, 200, orjson.dumps(shape.whole(answer.choices, answer.usage)))


async def _watch(receive: Receive, reader: Reader) -> None:
    """End the request when its client goes away."""
    try:
        await asgi.disconnected(receive)
        reader.close()
    except Exception as exc:
        reader.close(exc)


async def start(config: SimConfig) -> SimEngine:
    return SimEngine(config)


class _Server(uvicorn.Server):
    """Signals are the caller's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    config: SimConfig, host: str, port: int, stop: asyncio.Event, ready: Callable[[str], None]
) -> None:
    """Serve the engine alone over HTTP until `stop`; `ready` gets the URL, port 0 takes a free one.

    Raises OSError when the address can't be had. What still runs at `stop` is cut off.
    """
    with socket.create_server((host, port), family=_family(host), backlog=2048) as listener:
        engine = await start(config)
        options = uvicorn.Config(
            engine.app,
            interface="asgi3",
            http="httptools",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,  # whoever composes the process has set logs up
        )
        server = _Server(options)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            # The socket listens already: a connection waits in its backlog till the server takes it.
            ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await engine.close()
            server.should_exit = True
            await serving


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
