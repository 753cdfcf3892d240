"""The instance pool: a host's agent that runs an engine for each base while it is worth its memory.

What is decided is in `workers.pool`; here is what it is decided on (the queues, the fleet's heartbeats, the
engines' processes) and how it is carried out. Requests for a base without an engine wait in the queue, whose
length drives the start. The pool has the fleet know its bases from the beginning, so that they queue at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import start_http_server
from pydantic import ValidationError

from broker import addresses, base, client, errors, registry, subjects
from broker import messages as wire
from broker.messages import Answer, Command, PoolBeat
from ops import pool_file, pool_metrics, ports, targets
from ops.instance import Instance
from ops.others import Others
from ops.pool_file import Base, PoolSection
from ops.service import Ready, Serve
from ops.settings import Settings
from workers import pool
from workers.pool import Action, Seat

logger = logging.getLogger(__name__)

_BEAT = 1.0
_STAMP = 3600.0
"""Seconds after which the registry is told again that a base is to be had."""


def part(file: Path, config: Path | None, flags: dict[str, str]) -> Serve:
    """The pool as a part of a fleet, for `service.run`. `config` and `flags` are handed on to its workers.

    Raises SettingsError when the file is no good.
    """
    loaded = pool_file.load(file)
    return functools.partial(_serve, loaded.pool, pool_file.bases(loaded, config, flags), config, flags)


async def _serve(
    section: PoolSection,
    bases: Sequence[Base],
    config: Path | None,
    flags: dict[str, str],
    settings: Settings,
    stop: asyncio.Event,
    ready: Ready,
) -> None:
    worker = settings.worker
    ports.free(worker.metrics_host, worker.metrics_port, "worker.metrics_port")
    name = section.name or f"pool-{socket.gethostname()}"
    common = ["worker", *(["--config", str(config)] if config else [])]
    async with await client.connect(settings.broker, f"headrace pool {name}") as broker:
        made = Pool(name, section, settings, broker)
        for each in bases:
            made.add(each, [*common, *_flags(flags | each.settings)])
        await made.run(stop, ready)


def _flags(settings: dict[str, str]) -> list[str]:
    return [word for key, text in settings.items() for word in ("--set", f"{key}={text}")]


class Pool:
    """See the module. `run` may be called once, when all bases are added. The event loop owns its state."""

    def __init__(self, name: str, section: PoolSection, settings: Settings, broker: base.Broker) -> None:
        self.name = name
        self._section = section
        self._settings = settings
        self._broker = broker
        self._policy = section.policy()
        self._host = socket.gethostname()
        self._instances: dict[str, Instance] = {}
        self._workers: dict[str, Instance] = {}
        self._others = Others(name, self._workers, section.lost_after)
        self._registry = registry.Registry(broker)
        self._wanted: dict[str, float] = {}
        self._called: set[str] = set()  # by a command, until they are hot
        self._busy_at: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._beats = 0
        self._metrics_url = ""
        self._registered: set[str] = set()  # whose card was told since an engine ran
        self._told: dict[str, str] = {}  # the metrics that were told last
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, each: Base, arguments: list[str]) -> None:
        """`arguments` start its worker, but for what the pool says of it."""
        worker = f"{self.name}-{each.name}"
        log = self._settings.data / "logs" / f"{subjects.token(worker)}.log"
        own = _flags({"worker.name": worker, "worker.metrics_port": "0"})
        drain = self._settings.worker.drain_timeout
        made = Instance(each, worker, [*arguments, *own], log, drain, self._tell, self._changed.set)
        self._instances[each.name] = self._workers[worker] = made

    async def run(self, stop: asyncio.Event, ready: Ready) -> None:
        """Serve until `stop`, then drain every engine."""
        config = self._settings.worker
        (self._settings.data / "logs").mkdir(parents=True, exist_ok=True)
        server, _ = start_http_server(config.metrics_port, config.metrics_host)
        host = addresses.elsewhere(config.metrics_host)
        self._metrics_url = addresses.url("http", host, server.server_port) + "/metrics"
        pool_metrics.MEMORY.labels("limit").set(self._section.memory)
        subscriptions = [
            await self._broker.subscribe(subjects.ALL_HEARTBEATS, self._on_heartbeat),
            await self._broker.subscribe(subjects.ALL_POOLS, self._others.on_pool),
            await self._broker.subscribe(subjects.ctl(self.name), self._on_command),
            await self._registry.watch(),
        ]
        forget = self._broker.on_reconnect(self._reconnected)
        try:
            await self._register()
            await self._beat()
            names = list(self._instances)
            ready({"pool": self.name, "base": names[0], "bases": names, "metrics": self._metrics_url})
            await self._decide_until(stop)
            for instance in self._instances.values():
                instance.stop("the pool stops")
            beating = asyncio.create_task(self._beat_on())
            await asyncio.gather(*(instance.ended() for instance in self._instances.values()))
            beating.cancel()
            await self._beat()
        finally:
            forget()
            for subscription in subscriptions:
                await subscription.close()
            await asyncio.to_thread(server.shutdown)
            server.server_close()

    # Deciding

    async def _decide_until(self, stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait())
        # Whoever serves one of our bases already shall have been heard before anything is decided.
        await asyncio.wait({stopping}, timeout=max(self._section.lost_after, self._section.poll))
        beat_at = -math.inf
        while not stopping.done():
            try:
                await self._turn()
            except errors.Unavailable as exc:
                logger.warning("nothing is decided: %s", exc.message)
            if self._changed.is_set() or time.monotonic() - beat_at >= _BEAT:
                self._changed.clear()
                await self._register()
                await self._beat()
                beat_at = time.monotonic()
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait(
                {stopping, changed}, timeout=self._section.poll, return_when=asyncio.FIRST_COMPLETED
            )
            changed.cancel()

    async def _turn(self) -> None:
        """Look, decide, and have it done."""
        queued = await asyncio.gather(*(self._queued(name) for name in self._instances))
        now = time.monotonic()
        self._others.expire(now)
        for instance in self._instances.values():
            instance.overdue(self._section.start_limit, self._section.hung_after)
        seats = [
            self._seat(instance, n, now) for instance, n in zip(self._instances.values(), queued, strict=True)
        ]
        for action in pool.decide(seats, self._policy, now):
            self._do(action)

    async def _queued(self, name: str) -> int:
        """Requests for a base that wait or run."""
        counts = await self._broker.counts(subjects.REQUESTS, f"req.{subjects.token(name)}.>")
        return sum(counts.values())

    def _seat(self, instance: Instance, queued: int, now: float) -> Seat:
        name = instance.base.name
        if queued:
            self._busy_at[name] = now
        if instance.state == "hot":
            self._called.discard(name)
        needed = queued > 0 or name in self._called or instance.base.keep
        if needed and instance.state not in ("hot", "starting", "waking"):
            self._wanted.setdefault(name, now)
        else:
            self._wanted.pop(name, None)
        return instance.seat(
            self._wanted.get(name),
            queued > 0,
            self._busy_at.get(name, -math.inf),
            name not in self._called and self._others.serve(name, queued, now),
        )

    def _seats(self) -> list[Seat]:
        """What they take, and no more."""
        return [instance.seat(None, False, 0.0, False) for instance in self._instances.values()]

    def _do(self, action: Action) -> None:
        instance = self._instances[action.base]
        logger.info("%s %s: %s", action.do, action.base, action.reason, extra={"worker": instance.worker})
        pool_metrics.ACTIONS.labels(action.base, action.do).inc()
        acts: dict[pool.Do, Callable[[str], None]] = {
            "start": instance.start,
            "wake": instance.wake,
            "sleep": instance.sleep,
            "stop": instance.stop,
        }
        acts[action.do](action.reason)

    # Hearing

    def _on_heartbeat(self, message: base.Message) -> None:
        beat = self._others.on_heartbeat(message)
        if beat is not None and (own := self._workers.get(beat.worker)) is not None:
            own.heard(beat.state)

    def _reconnected(self) -> None:
        for instance in self._instances.values():
            instance.heard_at = time.monotonic()  # it is we who heard nothing

    def _on_command(self, message: base.Message) -> None:
        try:
            command = Command.model_validate_json(message.data)
        except ValidationError as exc:
            answer = Answer(ok=False, message=f"that is no command: {exc.errors()[0]['msg']}")
        else:
            answer = self._obey(command)
        if message.reply:
            self._spawn_answer(message.reply, answer)

    def _obey(self, command: Command) -> Answer:
        instance = self._instances.get(command.model)
        if instance is None:
            have = ", ".join(self._instances)
            return Answer(ok=False, message=f"this pool has no base {command.model[:200]!r}, only {have}")
        reason = f"told to {command.do}" + (f": {command.reason}" if command.reason else "")
        match command.do, instance.state:
            case (("start" | "wake"), _):
                self._called.add(command.model)
            case "stop", _:
                self._called.discard(command.model)
                instance.stop(reason)
            case "sleep", "hot":
                if not pool.may_sleep(self._seats(), command.model, self._policy):
                    return Answer(ok=False, message="it can't sleep, or pool.sleep_memory has no room for it")
                self._called.discard(command.model)
                instance.sleep(reason)
            case "sleep", state:
                return Answer(ok=False, message=f"{command.model} is {state}: only one that is hot can sleep")
            case do, _:
                return Answer(ok=False, message=f"a pool takes start, wake, sleep and stop, not {do}")
        self._changed.set()
        return Answer(ok=True, message=instance.state)

    # Telling

    async def _tell(self, worker: str, command: Command) -> Answer | None:
        try:
            data = await self._broker.ask(subjects.ctl(worker), command.model_dump_json().encode())
            answer = Answer.model_validate_json(data)
        except (errors.Unavailable, ValidationError) as exc:
            logger.warning("%s did not answer a command: %s", worker, exc)
            return None
        if not answer.ok:
            logger.warning("%s refused to %s: %s", worker, command.do, answer.message)
        return answer

    def _spawn_answer(self, reply: str, answer: Answer) -> None:
        async def publish() -> None:
            with contextlib.suppress(errors.Unavailable):  # who asked hears nothing, and asks again
                await self._broker.publish(reply, answer.model_dump_json().encode())

        task = asyncio.create_task(publish())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _register(self) -> None:
        """Have the fleet know each base, served or not, so that requests for it queue.

        At our start, and after an engine's life, its card is told anew: that of the file, where it says
        something. While its engine announces another one, the fleet's word stands.
        """
        now_ms = int(self._broker.now_ms())
        for instance in self._instances.values():
            name = instance.base.name
            rests = instance.state in ("cold", "failed")  # no worker of ours announces it
            entry = self._registry.entries.get(name)
            remembered = entry.card if entry is not None else None
            card = instance.base.known(remembered) if rests else remembered or instance.base.card
            settled = not rests or name in self._registered or card == remembered
            try:
                if not settled or entry is None or now_ms - entry.served_ms >= _STAMP * 1000:
                    await self._registry.put(card, now_ms)
                (self._registered.add if rests else self._registered.discard)(name)
            except errors.Unavailable as exc:
                logger.warning("%s is not registered: %s", name, exc.message)

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(_BEAT)
            await self._beat()

    async def _beat(self) -> None:
        seats = self._seats()
        used = pool.used(seats)
        instances = tuple(
            wire.Instance(
                base=seat.base,
                state=seat.state,
                worker=instance.worker if instance.pid is not None else "",
                memory=seat.held,
                resident=instance.resident,
                reason=instance.reason,
                failing=instance.failing,
            )
            for seat, instance in zip(seats, self._instances.values(), strict=True)
        )
        beat = PoolBeat(
            host=self._host,
            name=self.name,
            memory=self._section.memory,
            used=used,
            instances=instances,
            seq=self._beats,
        )
        self._beats += 1
        self._observe(beat)
        with contextlib.suppress(errors.Unavailable):  # the next one says it
            await self._broker.publish(subjects.pool(self._host), beat.model_dump_json().encode())

    def _observe(self, beat: PoolBeat) -> None:
        pool_metrics.MEMORY.labels("used").set(beat.used)
        pool_metrics.MEMORY.labels("resident").set(sum(each.resident for each in beat.instances))
        pool_metrics.INSTANCES.clear()
        for each in beat.instances:
            pool_metrics.INSTANCES.labels(each.base, each.state).set(1)
        urls = {
            instance.worker: instance.metrics_url
            for instance in self._instances.values()
            if instance.metrics_url
        }
        if urls != self._told:
            self._told = urls
            logger.info("the engines' metrics", extra={"metrics": urls})
            targets.write(self._settings.data / f"metrics-{subjects.token(self.name)}.json", urls)
