"""The scheduler process: the fleet's registry and health, and the last resort of queued requests.

It hands queued requests to workers (`dispatching`); without it they pull first come, first served. What only
it does besides: it remembers models in the registry after their workers have gone, hands on at once what a
lost worker held, ends requests that nobody will ever pull, deletes what a direct publisher cancels while it
is still queued, and plans which worker holds which adapter (`placing`). Of several schedulers one leads and
does all that; the others know the fleet as well as it does, and one of them leads within moments of its end.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson
from prometheus_client import start_http_server

from broker import addresses, base, bodies, errors, fleet, letters, registry, subjects, usage
from broker.messages import ModelCard, Request, ServiceClass, parse_request
from scheduler import metrics
from scheduler.config import SchedulerConfig
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatching import Dispatching
from scheduler.guard import Guard
from scheduler.leader import Leader
from scheduler.placing import Placing

_log = logging.getLogger(__name__)

_SWEEP_PAGE = 256
_SWEEP_PAGES = 8
"""Pages of one subject's messages that one sweep looks at; the next one goes on from there."""

_STAMP = 3600.0
"""Seconds after which the registry is told again that a model is served."""

_AGAIN = 1.0
"""Seconds after which a side task that did not end is told to end once more."""

_WORKER_FIRST = 0.5
"""Seconds that a cancelled request's worker has to end it, or to tell that it has it; ended by both, it would
be counted twice."""


class Scheduler:
    """See the module. `run` may be called once. All state belongs to the event loop."""

    def __init__(
        self, config: SchedulerConfig, broker: base.Broker, dispatch: DispatchConfig | None = None
    ) -> None:
        self.name = config.name or f"scheduler-{socket.gethostname()}-{os.getpid()}"
        self._config = config
        self._broker = broker
        self._leader = Leader(broker, self.name, config.lease)
        self._fleet = fleet.Fleet(config.lost_after)
        self._guard = Guard(config.lost_after, broker, self._leader, self._spawn)
        self._dispatching = Dispatching(
            dispatch or DispatchConfig(),
            broker,
            self._leader,
            self.name,
            self._guard,
            lambda: self._fleet.live(time.monotonic()),
            self._spawn,
        )
        self._registry = registry.Registry(broker)
        self._placing = Placing(config, broker, self._leader, self.name, self._registry, self._spawn)
        self._stamp_ms = min(_STAMP, config.forget_after / 4) * 1000
        self._orphans: dict[str, float] = {}  # subject -> when it was first seen with nobody to serve it
        self._reached: dict[str, int] = {}  # subject -> sequence from which the next sweep goes on
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def leads(self) -> bool:
        return self._leader.leads

    async def run(self, stop: asyncio.Event, ready: Callable[[str], None] = lambda url: None) -> None:
        """Serve until `stop`. `ready` gets the URL of its metrics once it looks after the fleet."""
        server, _ = start_http_server(self._config.metrics_port, self._config.metrics_host)
        subscriptions = [
            await self._broker.subscribe(subjects.ALL_HEARTBEATS, self._on_heartbeat),
            await self._broker.subscribe(subjects.ALL_HELD, self._guard.on_held),
            await self._broker.subscribe(subjects.ALL_CANCELS, self._on_cancel),
            await self._registry.watch(),
            *await self._placing.watch(),
            *await self._dispatching.watch(),
        ]
        host = addresses.elsewhere(self._config.metrics_host)
        metrics_url = addresses.url("http", host, server.server_port) + "/metrics"
        _log.info("serving", extra={"scheduler": self.name, "metrics_url": metrics_url})
        ready(metrics_url)
        sides: list[Coroutine[Any, Any, Any]] = [stop.wait(), self._guard.run(), self._look_after()]
        sides += [self._placing.run(), self._dispatching.run()]
        ends: list[asyncio.Task[Any]] = [*map(asyncio.create_task, sides)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                if end.done():
                    end.result()  # a side task never ends by itself: raise what ended it
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            await _cancel(ends)
            await self._leader.resign()
            for subscription in subscriptions:
                await subscription.close()
            await asyncio.to_thread(server.shutdown)  # it answers its poll, up to half a second later
            server.server_close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except errors.HeadraceError as exc:
                _log.warning("put off: %s", exc.message)
            except Exception:
                _log.exception("a task of the scheduler failed")

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The registry

    def _on_heartbeat(self, message: base.Message) -> None:
        now = time.monotonic()
        beat = self._fleet.observe(message, now)
        if beat is None:
            return
        if self._guard.on_heartbeat(beat, now):
            self._spawn(self._broker.publish(subjects.roster(beat.worker)))
        self._placing.on_heartbeat(beat, now)
        self._dispatching.on_heartbeat(beat)
        if not self.leads:
            return
        now_ms = int(self._broker.now_ms())
        for card in beat.models:
            if not subjects.fits(card.id):
                continue  # no request can name it
            entry = self._registry.entries.get(card.id)
            if entry is None or now_ms - entry.served_ms > self._stamp_ms or self._outdated(entry.card, card):
                self._spawn(self._registry.put(card, now_ms))  # what fails, the next heartbeat tries again

    def _outdated(self, stored: ModelCard, announced: ModelCard) -> bool:
        """Where workers differ about a model (an upgrade, two kinds of machine) the first card stands as
        long as anyone announces it: else each heartbeat would write another."""
        return stored != announced and not any(
            stored in beat.models for beat in self._fleet.live(time.monotonic())
        )

    async def _forget(self, now: float) -> None:
        """Let go of models that no worker has served for `forget_after`."""
        now_ms = int(self._broker.now_ms())
        for name, entry in list(self._registry.entries.items()):
            if self._fleet.card(name, now) is not None:
                continue
            if not entry.served_ms:
                await self._registry.put(entry.card, now_ms)  # nobody noted when: it counts from now
            elif now_ms - entry.served_ms > self._config.forget_after * 1000:
                await self._registry.remove(name)
                _log.info("model %s is forgotten: no worker serves it any more", name)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(self._config.sweep)
            now = time.monotonic()
            self._fleet.expire(now)
            self._count_workers(now)
            if not self.leads:
                metrics.QUEUED.clear()
                continue
            try:
                await self._sweep()
            except errors.HeadraceError as exc:
                _log.warning("no sweep: %s", exc.message)

    def _count_workers(self, now: float) -> None:
        metrics.WORKERS.clear()
        for (base_model, state), n in Counter((b.base, b.state) for b in self._fleet.live(now)).items():
            metrics.WORKERS.labels(base_model, state).set(n)

    # The last resort

    async def _sweep(self) -> None:
        """End what nobody will ever pull: requests for a base that never was (a direct publisher's
        typo), and those whose deadline passed while their base had no worker."""
        counts = await self._broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)
        now = time.monotonic()
        await self._forget(now)
        known = {entry.card.base for entry in self._registry.entries.values()}
        served = {beat.base for beat in self._fleet.live(now) if beat.state != "asleep"}
        orphans: dict[str, float] = {}
        queued: Counter[tuple[str, str]] = Counter()
        for subject, count in counts.items():
            try:
                parsed = subjects.parse_request(subject)
                ServiceClass(parsed.service_class)
            except ValueError:
                orphans[subject] = -math.inf  # no queue has such a name: no use in waiting for one
                continue
            queued[parsed.base, parsed.service_class] += count
            if parsed.base not in known:
                orphans[subject] = self._orphans.get(subject, now)
            elif parsed.base not in served:
                await self._each(subject, self._expire)
        self._orphans = orphans
        self._reached = {subject: seq for subject, seq in self._reached.items() if subject in counts}
        metrics.QUEUED.clear()
        for (base_model, service_class), count in queued.items():
            metrics.QUEUED.labels(base_model, service_class).set(count)
        for subject, since in orphans.items():
            if now - since >= self._config.orphan_after:
                bases = ", ".join(sorted(known)) or "none yet"
                fault = errors.UnknownModel(f"no worker serves {subject}; bases served: {bases}")
                await self._each(subject, functools.partial(self._end, fault=fault, reason="orphan"))

    async def _each(self, subject: str, act: Callable[[base.Record], Awaitable[None]]) -> None:
        """Do `act` with the messages under `subject`. One that breaks it is logged, and the rest goes on."""
        start = self._reached.pop(subject, 1)
        for _ in range(_SWEEP_PAGES):
            page = await self._broker.read(subjects.REQUESTS, subject, start, _SWEEP_PAGE)
            for record in page:
                try:
                    await act(record)
                except errors.Unavailable:
                    raise  # the broker's fault, not the message's
                except Exception:
                    _log.exception("message %d could not be swept", record.seq)
            if len(page) < _SWEEP_PAGE:
                return
            start = page[-1].seq + 1
        self._reached[subject] = start

    async def _expire(self, record: base.Record) -> None:
        try:
            request = parse_request(record.subject, record.headers, record.data)
        except errors.MalformedMessage as exc:
            await self._end(record, exc, "malformed")
            return
        if request.late(self._broker.now_ms()):
            fault = errors.DeadlineExceeded("the request's deadline passed in the queue")
            await self._end(record, fault, "expired")

    async def _end(self, record: base.Record, fault: errors.HeadraceError, reason: str) -> None:
        """Take one message out of the queue and tell whoever published it why."""
        try:
            request = parse_request(record.subject, record.headers, record.data)
        except errors.MalformedMessage as exc:
            if await self._delete(record, reason):
                await letters.dead_letter(
                    self._broker, record.subject, record.headers, record.data, exc, seq=record.seq
                )
            return
        if await self._delete(record, reason):
            await usage.unrun(self._broker, request, fault, record.seq)
            await bodies.discard(self._broker, request)

    async def _delete(self, record: base.Record, reason: str) -> bool:
        deleted = await self._broker.delete(subjects.REQUESTS, record.seq)
        if deleted:
            metrics.SWEPT.labels(reason).inc()
        return deleted

    def _on_cancel(self, message: base.Message) -> None:
        """A direct publisher's cancel that names the sequence; an ingress deletes its own."""
        try:
            seq = orjson.loads(message.data)["seq"]
        except (ValueError, KeyError, TypeError):
            return  # without a sequence the worker that meets it refuses it
        if type(seq) is int and seq > 0:
            self._spawn(self._cancel_queued(message.subject, seq))

    async def _cancel_queued(self, subject: str, seq: int) -> None:
        """Delete a queued request; one that a worker has is that worker's to end, and by now it has."""
        try:
            key = subjects.cancelled(subject)
        except ValueError:
            return  # no request has such a name
        await asyncio.sleep(_WORKER_FIRST)
        if not self.leads:
            return  # asked only now: who leads may have changed
        found = await self._broker.read(subjects.REQUESTS, subjects.ALL_REQUESTS, start=seq, limit=1)
        if not found or found[0].seq != seq or _key(found[0]) != key:
            return
        if not self._guard.holds(seq):
            await self._end(found[0], errors.Cancelled("the caller cancelled it in the queue"), "cancelled")


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """Until all have ended. Python 3.11's wait_for, in nats-py too, swallows a cancellation that comes
    together with its result: who goes on for ever after that is told again."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN)


def _key(record: base.Record) -> str:
    try:
        request: Request = parse_request(record.subject, record.headers, record.data)
    except errors.MalformedMessage:
        return ""
    return request.key
