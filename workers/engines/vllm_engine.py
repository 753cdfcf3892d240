"""vLLM as an `Engine`: what it shows of itself beside the bytes of its application.

Written against vLLM 0.32. Import it through `vllm.start` only, which sets the stage.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import fastapi
import orjson
from starlette.exceptions import HTTPException
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError

from broker import errors
from broker.messages import PATHS, ModelCard
from kvstate.blocks import Blocks
from workers.engines import vllm_core, vllm_replay
from workers.engines.base import ASGIApp, ASGIMessage, EngineStats, Receive, Scope, Send
from workers.engines.vllm_adapters import Loras
from workers.engines.vllm_events import Events
from workers.engines.vllm_tap import Steps, TappedLLM

_log = logging.getLogger(__name__)

LOOKS = 8
"""Times that it is looked whether vLLM hangs, in as long as it takes to be sure."""

Options = Mapping[str, str | int | float | bool]


async def start(options: Options, required: set[str], tells: bool, hang_after: float) -> VllmEngine:
    """Start vLLM with these command-line options. See `vllm.start`. `tells`: what it caches."""
    steps = Steps()
    blocks = Blocks() if tells else None
    events = Events(blocks) if blocks is not None else None
    if events is not None:
        options = {**options, "kv-events-config": events.option()}
    try:
        args = _parse(options, required)
        _adopt_logs()
        engine_args = AsyncEngineArgs.from_cli_args(args)
        config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        force = vllm_replay.prepare(config)
        with vllm_core.bound():
            llm = TappedLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[lambda _config, _index: steps],
                enable_log_requests=engine_args.enable_log_requests,
                disable_log_stats=engine_args.disable_log_stats,
            )
        vllm_replay.attach(llm, force)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as exc:
        if events is not None:
            events.close()
        raise errors.EngineFailed(f"vLLM did not start: {exc}") from exc
    finally:
        _adopt_logs()
    try:
        tasks = await llm.get_supported_tasks()
        app = build_app(args, tasks, llm.model_config)
        await init_app_state(llm, app.state, args, tasks)
        # vLLM gives its shape of an error to FastAPI's exceptions; an unknown path is Starlette's.
        app.exception_handler(HTTPException)(app.exception_handlers[fastapi.HTTPException])
        app.middleware_stack = app.build_middleware_stack()  # it was built before its handlers were complete
        # vLLM's error handlers set it when the engine is dead, to end their HTTP server.
        app.state.server = SimpleNamespace(should_exit=False)
        engine = VllmEngine(llm, app, steps, events, hang_after)
        llm.blocks = engine.blocks = blocks
        await engine.warm_up()
    except BaseException:
        if events is not None:
            events.close()
        llm.shutdown()
        raise
    gc.collect()
    gc.freeze()  # what is alive now stays: the collector need not walk it again in mid-stream
    return engine


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(options: Options, required: set[str]) -> Namespace:
    """As `vllm serve` would read them. Options that this vLLM doesn't know are left out, unless the
    operator asked for them by name."""
    parser = make_arg_parser(_Parser())
    known = parser._option_string_actions
    words: list[str] = []
    for name, value in options.items():
        if f"--{name}" not in known and name not in required:
            _log.warning("this vLLM has no option --%s", name)
        elif value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}", str(value)]
        elif f"--no-{name}" in known:
            words.append(f"--no-{name}")
    args: Namespace = parser.parse_args(words)
    validate_parsed_serve_args(args)
    return args


def _adopt_logs() -> None:
    """vLLM's records go to our handlers instead of its own, and ours lose what it adds; its level stays."""
    logger = logging.getLogger("vllm")
    logger.handlers.clear()
    logger.propagate = True
    logging.setLogRecordFactory(logging.LogRecord)


class VllmEngine:
    """See `workers.engines.base.Engine`."""

    name = "vllm"
    continues = True

    def __init__(
        self, llm: TappedLLM, app: Any, steps: Steps, events: Events | None, hang_after: float
    ) -> None:
        self._llm = llm
        self.blocks: Blocks | None = None
        self._events = events
        if events is not None:
            events.open()
        self.app: ASGIApp = _heeding_disconnects(app)
        config = llm.vllm_config
        self._kv_blocks = max(0, (config.cache_config.num_gpu_blocks or 0) - 1)  # one is vLLM's null block
        block_tokens = int(config.cache_config.block_size)
        lora = config.lora_config
        self.adapter_slots = int(lora.max_loras) if lora else 0
        self.adapters_in_memory = int(lora.max_cpu_loras) if lora else 0
        self.max_rank = int(lora.max_lora_rank) if lora else 0
        self._loras = Loras(llm, app.state.openai_serving_models.lora_requests)
        scheduler = config.scheduler_config
        self._stats = EngineStats(
            running=0,
            waiting=0,
            max_running=int(scheduler.max_num_seqs),
            step_tokens=int(scheduler.max_num_batched_tokens),
            kv_tokens_total=self._kv_blocks * block_tokens,
            kv_tokens_free=self._kv_blocks * block_tokens,
            kv_block_tokens=block_tokens,
        )
        self.base = str(app.state.openai_serving_models.base_model_paths[0].name)
        served = {getattr(route, "path", "") for route in app.routes}
        self.models: tuple[ModelCard, ...] = (
            ModelCard(
                id=self.base,
                base=self.base,
                context_tokens=int(llm.model_config.max_model_len),
                paths=tuple(path for path in PATHS if path in served),
            ),
        )
        self.on_change: Callable[[], None] | None = None
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.died.add_done_callback(lambda died: died.cancelled() or died.exception())  # may go unread
        self.can_sleep = bool(llm.model_config.enable_sleep_mode)
        self._closed = False
        self._processes: dict[int, BaseProcess] = {
            process.sentinel: process for process in llm.engine_core.resources.engine_manager.processes
        }
        for sentinel in self._processes:
            asyncio.get_running_loop().add_reader(sentinel, self._on_process_end, sentinel)
        steps.on_step = self._on_step
        self._hang_after = hang_after
        self._still = 0  # looks since the last step
        self._look: asyncio.TimerHandle | None = None
        if hang_after:
            self._look_after()

    def stats(self) -> EngineStats:
        return self._stats

    async def load_adapter(self, model: str, path: Path, rank: int) -> None:
        if not self.adapter_slots:
            raise errors.AdapterFailed("vllm.adapter_slots = 0: this engine takes no adapters")
        await self._loras.load(model, path)

    async def unload_adapter(self, model: str) -> None:
        await self._loras.unload(model)

    async def warm_up(self) -> None:
        """Run what the first request of each kind would otherwise wait for."""
        requests: dict[str, dict[str, object]] = {
            "/v1/chat/completions": {
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 2,
                "logprobs": True,
                "top_logprobs": 1,
            },
            "/v1/embeddings": {"input": "Hello"},
        }
        for path in requests.keys() & set(self.models[0].paths):
            status = await _post(self.app, path, {"model": self.base} | requests[path])
            if status != 200:
                _log.warning("the warm-up request was refused", extra={"path": path, "status": status})

    async def sleep(self) -> None:
        if not self.can_sleep:
            raise errors.EngineFailed("vLLM sleeps on a GPU alone, and with vllm.sleep = true")
        await self._llm.sleep(level=1)

    async def wake(self) -> None:
        await self._llm.wake_up()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        if self._events is not None:
            self._events.close()
        self._llm.output_handler.cancel()  # or it reports the death of what is being stopped
        self._llm.output_processor.propagate_error(EngineDeadError())
        gc.unfreeze()
        resources = self._llm.engine_core.resources
        await asyncio.to_thread(self._llm.shutdown)
        resources.ctx.destroy(linger=0)  # vLLM closes its sockets, and leaves their context to the collector

    def _look_after(self) -> None:
        """Kill an EngineCore that hangs: its end is seen to as any other's."""
        # Counted, not timed: a worker that was stopped itself has yet to read of the steps meanwhile.
        self._still = self._still + 1 if self._llm.output_processor.has_unfinished_requests() else 0
        if self._still > LOOKS:
            _log.error("vLLM has made no step for %.0f s, and is killed", self._hang_after)
            for process in self._processes.values():
                process.kill()
        else:
            loop = asyncio.get_running_loop()
            self._look = loop.call_later(self._hang_after / LOOKS, self._look_after)

    def _on_step(self, scheduler: Any, iteration: Any) -> None:
        self._still = 0
        if scheduler is None:
            return
        self._llm.tell_first_tokens()
        old = self._stats
        self._stats = replace(
            old,
            running=scheduler.num_running_reqs,
            waiting=scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs,
            kv_tokens_free=round((1 - scheduler.kv_cache_usage) * self._kv_blocks) * old.kv_block_tokens,
            preemptions=old.preemptions + (iteration.num_preempted_reqs if iteration is not None else 0),
            steps=old.steps + 1,
            skipped=scheduler.num_skipped_waiting_reqs,
        )
        if self.on_change is not None:
            self.on_change()

    def _on_process_end(self, sentinel: int) -> None:
        self._unwatch()
        self._report_end(self._processes[sentinel], 20)

    def _report_end(self, process: BaseProcess, tries: int) -> None:
        """The exit code comes a moment after the end: vLLM's own watcher may be fetching it just now."""
        if process.exitcode is None and tries:
            asyncio.get_running_loop().call_later(0.005, self._report_end, process, tries - 1)
        elif not self.died.done():
            reason = f"vLLM's {process.name} process ended, exit code {process.exitcode}"
            self.died.set_exception(errors.EngineFailed(reason))

    def _unwatch(self) -> None:
        if self._look is not None:
            self._look.cancel()
        for sentinel in self._processes:
            asyncio.get_running_loop().remove_reader(sentinel)


def _heeding_disconnects(app: ASGIApp) -> ASGIApp:
    """`app`, watching for the disconnect whatever the caller's ASGI version is, and silent after it."""

    async def heeding(scope: Scope, receive: Receive, send: Send) -> None:
        gone = False

        async def received() -> ASGIMessage:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def sent(message: ASGIMessage) -> None:
            if not gone:
                await send(message)

        # From 2.4 on, Starlette waits for `send` to fail instead.
        await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, received, sent)

    return heeding


async def _post(app: ASGIApp, path: str, body: object) -> int:
    """POST `body` to an ASGI application; returns the status and drops the answer."""
    status = 0
    bodies = [orjson.dumps(body)]

    async def receive() -> ASGIMessage:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await asyncio.Future()  # never a disconnect
        raise AssertionError

    async def send(message: ASGIMessage) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"content-type", b"application/json")]
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    return status
