"""One worker: pulls by credit, runs jobs, tells the fleet, and drains when asked to stop.

Two stops: first no more is fetched while what runs finishes; after `drain_timeout` the rest is
handed back. All state belongs to the event loop; handlers never block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Literal

from prometheus_client import start_http_server
from pydantic import ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from broker import addresses, base, bodies, errors, subjects
from broker.messages import UNTOLD, Credit, Heartbeat, News, Request, Sent, ServiceClass, parse_request
from kvstate import budget
from kvstate.uncomputed import Uncomputed
from workers import held, intake, metrics, screening
from workers.cached import Caching
from workers.config import WorkerConfig
from workers.control import Control
from workers.dispatched import BEAT, Dispatched
from workers.engines.base import Engine
from workers.job import HandBack, Job, Share, Touch
from workers.quarantine import Quarantine
from workers.rest import Rest
from workers.turns import before_stop

_log = logging.getLogger(__name__)

_DIGITS = 9
"""Of an attempt's number; anyone may publish a longer one."""

_SMOOTHING = 0.05
"""Weight of the newest request in the running means of prompt and output lengths."""


class Worker:
    """See the module. `run` may be called once."""

    def __init__(self, config: WorkerConfig, broker: base.Broker, engine: Engine) -> None:
        self.name = config.name or f"{engine.name}-{socket.gethostname()}-{os.getpid()}"
        self._config = config
        self._broker = broker
        self._engine = engine
        self._state: Literal["serving", "draining", "asleep", "gone"] = "serving"
        self._started_ms = int(broker.now_ms())
        self._held = held.Held(broker, self.name, self._started_ms)
        self._caching = Caching(broker, self.name, self._started_ms, engine.blocks)
        self._jobs: dict[str, Job] = {}
        self._prefilling: dict[Job, int] = {}  # those without a token yet, and their prompts' estimates
        self._prefill_held = 0
        self._uncomputed: Uncomputed[Job] = Uncomputed()
        self._steps = 0  # of the engine, as far as `_uncomputed` follows
        self._settling: set[Job] = set()  # they have ended, and are to be acked
        self._tasks: set[asyncio.Task[Any]] = set()
        self._queues = [intake.Queue() for _ in ServiceClass]
        self._pullers: list[base.Puller] = []
        self._tombstones = screening.Tombstones()
        self._takes = screening.Takes()
        self._share = Share()
        self._touch = Touch(config.heartbeat)
        self._quarantine = Quarantine(config.max_failures)
        self._trial = asyncio.Lock()
        self._told_to_drain = asyncio.Event()
        self._sleeper = Rest(engine, self.name, self._rest, self._rise)
        self._control = Control(
            self.name, config, broker, engine, self._told_to_drain.set, self._sleeper.obey, self._preempt
        )
        self._turned = asyncio.Event()
        self._dispatched = Dispatched(engine.base, self._turned.set)
        self._first: list[tuple[int, int]] = []
        self._done: list[tuple[int, int, int, int]] = []
        self._told: Credit | None = None
        self._control.on_wait(self._top_up)
        self._mean_prompt = 256.0
        self._mean_output = 128.0
        self._starved = False
        self._topping_up = False
        self._recheck: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._beats = 0
        self._metrics_url = ""

    async def run(self, stop: asyncio.Event, ready: Callable[[str], None] = lambda url: None) -> None:
        """Serve until `stop`, then drain. Raises errors.EngineFailed when the engine dies, errors.Unavailable
        where the broker is not there to begin with.

        `ready` gets the URL of its metrics before the first request is asked for.
        """
        server, _ = start_http_server(self._config.metrics_port, self._config.metrics_host)
        host = addresses.elsewhere(self._config.metrics_host)
        self._metrics_url = addresses.url("http", host, server.server_port) + "/metrics"
        subscriptions = [
            await self._broker.subscribe(subjects.ALL_CANCELS, self._on_cancel),
            await self._broker.subscribe(subjects.ALL_TAKEN, self._on_taken),
            await self._broker.subscribe(subjects.roster(self.name), self._on_roster),
            await self._broker.subscribe(
                subjects.inventory(self.name), lambda _: self._spawn(self._caching.tell_all())
            ),
            await self._broker.subscribe(subjects.DISPATCH, self._dispatched.hear),
        ]
        await self._control.open()
        await self._open()
        # Last: until it is ready, a signal ends it at once, whatever it has.
        subscriptions.append(await self._broker.subscribe(subjects.run(self.name), self._on_sent))
        _log.info("serving", extra={"worker": self.name, "metrics_url": self._metrics_url})
        ready(self._metrics_url)
        self._engine.on_change = self._on_step
        died: asyncio.Future[None] = asyncio.shield(self._engine.died)
        sides: list[Coroutine[Any, Any, Any]] = [
            stop.wait(),
            self._told_to_drain.wait(),
            self._beat(),
            self._hold(),
            self._follow(),
            self._sleeper.run(),
        ]
        ends: list[asyncio.Future[Any]] = [died, *map(asyncio.create_task, sides)]
        try:
            self._top_up()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                _log.error("the engine died: its requests go to other workers", extra={"worker": self.name})
            ends[-1].cancel()  # one that is about to sleep, or to wake, drains no less
            await self._drain(0.0 if died.done() else self._config.drain_timeout)
            for end in ends:
                if end.done() and not end.cancelled():
                    end.result()  # the engine's death or a broken side task ends the worker, loudly
        finally:
            self._state = "gone"
            self._engine.on_change = None
            for end in ends:
                end.cancel()
            await self._close_pulls()
            self._dispatched.close()
            await self._control.close()
            for subscription in subscriptions:
                await subscription.close()
            await self._announce()
            await asyncio.to_thread(server.shutdown)  # it answers its poll, up to half a second later
            server.server_close()

    async def _open(self) -> None:
        """Open the queues, unless a scheduler does that; nothing is asked for yet."""
        if self._dispatched.active or self._pullers:
            return
        self._queues = [intake.Queue() for _ in ServiceClass]
        self._pullers = [
            await self._broker.pull(self._engine.base, each, self._receiver(number), self._top_up)
            for number, each in enumerate(ServiceClass)
        ]

    def _serves(self) -> bool:
        return self._state == "serving"

    async def _close_pulls(self) -> None:
        pullers, self._pullers = self._pullers, []
        for puller in pullers:
            await puller.close()

    async def _follow(self) -> None:
        """Pull while no scheduler hands requests out."""
        while True:
            await self._turned.wait()
            self._turned.clear()
            if not self._serves():
                continue
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(errors.Unavailable), wait=wait_exponential(0.1, max=2.0)
            ):
                with attempt:
                    if self._dispatched.active:
                        await self._close_pulls()
                    else:
                        await self._open()
            if not self._serves():
                await self._close_pulls()
            self._told = None
            self._top_up()

    async def _rest(self) -> None:
        """Take nothing more, let what runs finish, and have the engine sleep."""
        await self._drain(self._config.drain_timeout)
        await self._control.pause()
        await self._engine.sleep()
        self._state = "asleep"
        await self._announce()

    async def _rise(self) -> None:
        await self._engine.wake()
        self._control.resume()
        await self._open()
        self._state = "serving"
        await self._announce()
        self._top_up()

    # Taking requests

    def _receiver(self, number: int) -> Callable[[base.Delivery], None]:
        return lambda delivery: self._take(number, delivery)

    def _take(self, number: int, delivery: base.Delivery) -> None:
        """Start a delivery, or hand it back when the credit it came against is gone or more urgent work's."""
        request = self._read(delivery)
        if request is None:
            return
        for queue, puller in zip(self._queues, self._pullers, strict=True):
            queue.outstanding = puller.outstanding
        if self._state != "serving" or self._credit() <= intake.owed(self._queues[:number]):
            self._queues[number].backlog = delivery.pending + 1
            metrics.RETURNED.labels("no_credit").inc()
            self._spawn(delivery.nak())
            return
        intake.taken(self._queues, number, delivery.pending, asyncio.get_running_loop().time())
        self._start(request, delivery)
        self._top_up()  # after it: asking for the next request must not hold this one up

    def _on_sent(self, message: base.Message) -> None:
        """`run.<worker>`: a request that a scheduler hands us."""
        try:
            sent = Sent.model_validate_json((message.headers or {}).get(subjects.SENT, ""))
        except ValidationError:
            _log.warning("a message on %s is unreadable", message.subject)
            return
        if self._dispatched.take(sent):
            self._spawn(self._take_sent(message, sent))

    async def _take_sent(self, message: base.Message, sent: Sent) -> None:
        try:
            await self._start_sent(message, sent)
        except errors.HeadraceError as exc:
            _log.warning("a request that was sent here is left to the broker: %s", exc.message)
        finally:
            self._dispatched.taken(sent)
            self._top_up()

    async def _start_sent(self, message: base.Message, sent: Sent) -> None:
        delivery = await self._broker.relayed(message)
        request = self._read(delivery) if delivery is not None else None
        if delivery is None or request is None:
            return
        if self._state != "serving" or self._room() <= 0:
            metrics.RETURNED.labels("no_credit").inc()
            await delivery.nak()
            return
        self._start(request, delivery, sent)

    def _read(self, delivery: base.Delivery) -> Request | None:
        """The request of a delivery; None where it is none, or one that runs here."""
        try:
            request = parse_request(delivery.subject, delivery.headers, delivery.data)
        except errors.MalformedMessage as exc:
            self._spawn(screening.reject(self._broker, delivery, exc))
            return None
        running = self._jobs.get(request.key)
        if running is None:
            if self._takes.later(request.key, delivery.attempt, delivery.enqueued_ms):
                told = {"request_id": request.request_id, "tenant": request.subject.tenant}
                _log.info("a request came late, and is left to the worker that took it over", extra=told)
                return None
            return request
        if running.delivery.seq != delivery.seq:
            self._spawn(screening.repeated(self._broker, request, delivery, running.request))
        elif running.superseded:
            # Others had it meanwhile, and it is to run anew: once the old run has ended.
            running.behind.append(delivery)
        else:
            # Our `in_progress` came too late, and the broker handed us what we are running.
            running.delivery = delivery
            self._held.take(delivery)
        return None

    def _start(self, request: Request, delivery: base.Delivery, sent: Sent | None = None) -> None:
        job = Job(request, delivery, self._broker, self._engine, self.name, self._share, self._touch, sent)
        job.tap.on_first_token = lambda: self._began(job)
        self._jobs[request.key] = job
        self._held.take(delivery)
        self._prefills(job)
        metrics.RUNNING.set(len(self._jobs))
        self._idle.clear()
        self._spawn(self._run(job))

    def _prefills(self, job: Job) -> None:
        stats = self._engine.stats()
        idle = not self._prefilling and not stats.running and not stats.waiting
        self._prefilling[job] = job.prompt_estimate
        self._prefill_held += job.prompt_estimate
        self._uncomputed.add(job, job.uncached_estimate)
        if idle and stats.steps:
            self._uncomputed.step(stats.step_tokens)  # an idle engine begins it at once

    def _began(self, job: Job) -> None:
        """Its first token came."""
        self._first.append((job.delivery.seq, _or_untold(job.tap.cached_tokens)))
        self._prefilled(job)

    def _prefilled(self, job: Job) -> None:
        self._prefill_held -= self._prefilling.pop(job, 0)
        self._uncomputed.drop(job)
        self._top_up()

    @property
    def _running(self) -> int:
        return len(self._jobs) - len(self._settling)

    def _load(self) -> budget.Load:
        """In constant time, since every take, first token and end asks for it."""
        stats = self._engine.stats()
        prefilling = len(self._prefilling)
        running = self._running - self._control.waiting
        # A request that decodes is, on average, half through its output.
        growth = self._mean_output * (prefilling + (running - prefilling) / 2)
        return budget.Load(
            slots_free=stats.max_running - max(running, stats.running + stats.waiting),
            prefill_limit=self._config.prefill_steps * stats.step_tokens,
            prefill_held=self._prefill_held,
            kv_total=stats.kv_tokens_total,
            kv_free=stats.kv_tokens_free,
            kv_promised=self._prefill_held + growth,
            mean_prompt=self._mean_prompt,
            mean_output=self._mean_output,
        )

    def _credit(self) -> int:
        return min(budget.requests(self._load()), self._room())

    def _room(self) -> int:
        """Requests for which there is a slot, and which an engine that failed lately may be tried with."""
        free = self._load().slots_free
        room = self._quarantine.room(asyncio.get_running_loop().time(), self._running)
        return free if room is None else min(free, room)

    def _judge(self, job: Job) -> None:
        """Learn from how a request ended whether the engine is in order."""
        if job.engine_well:
            self._quarantine.succeeded()
        elif job.engine_well is False and (
            pause := self._quarantine.failed(asyncio.get_running_loop().time())
        ):
            metrics.QUARANTINES.inc()
            _log.error(
                "the engine fails request after request: none is taken for %g s",
                pause,
                extra={"worker": self.name},
            )

    def _on_step(self) -> None:
        if skipped := self._engine.stats().skipped:
            metrics.SKIPPED.inc(skipped)
        if self._starved:  # else what ends a request or its prefill has asked already
            self._top_up()
        if self._uncomputed.tokens:
            asyncio.get_running_loop().call_soon(self._follow_steps)  # after those that got a first token

    def _follow_steps(self) -> None:
        """The next step has begun, or is about to: it computes some of what waits."""
        stats = self._engine.stats()
        if stats.steps == self._steps:
            return
        self._steps = stats.steps
        before = self._uncomputed.tokens
        decodes = max(0, stats.running + stats.waiting - len(self._prefilling))
        self._uncomputed.step(stats.step_tokens - decodes)
        if self._uncomputed.tokens != before:
            self._top_up()

    def _top_up(self) -> None:
        """Ask for what the credit allows; several calls within one turn of the loop make one ask."""
        if not self._topping_up:
            self._topping_up = True
            asyncio.get_running_loop().call_soon(self._ask)

    def _ask(self) -> None:
        self._topping_up = False
        if not self._broker.connected:
            return
        if self._dispatched.active:
            self._tell_news()
            return
        self._first, self._done = [], []  # nobody is there to be told
        if self._state != "serving" or not self._pullers:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        for queue, puller in zip(self._queues, self._pullers, strict=True):
            intake.asked(queue, puller.outstanding, now)
        credit = self._credit()
        self._starved = credit == 0
        for puller, n in zip(self._pullers, intake.asks(credit, self._queues), strict=True):
            if n:
                self._spawn(self._pull(puller, n))
        if credit and any(queue.backlog for queue in self._queues):
            # A class thought busy that turns out empty leaves its credit to the next.
            if self._recheck is not None:
                self._recheck.cancel()
            self._recheck = loop.call_later(2 * intake.ANSWER, self._top_up)

    def _tell_news(self) -> None:
        credit = self._credit_told()
        self._starved = credit.requests == 0
        if not self._first and not self._done and credit == self._told:
            return
        self._told = credit
        news = News(
            worker=self.name,
            credit=credit,
            dispatched=self._dispatched.last,
            first=tuple(self._first),
            done=tuple(self._done),
        )
        self._first, self._done = [], []
        self._spawn(self._tell(news))

    async def _tell(self, news: News) -> None:
        try:
            await self._broker.publish(subjects.credit(self.name), news.model_dump_json().encode())
        except errors.Unavailable as exc:
            _log.warning("no news of credit went out: %s", exc.message)

    async def _pull(self, puller: base.Puller, n: int) -> None:
        try:
            await puller.ask(n)
        except errors.Unavailable as exc:
            _log.warning("could not ask for work: %s", exc.message)

    # Running them

    async def _run(self, job: Job) -> None:
        """Run it, alone among those under which workers died: else these would bury what ran beside them."""
        try:
            await self._held.tell()  # from here on it is handed on if we die
            if await self._goes_elsewhere(job):
                return
            # Whatever died beside a killer has one death more than it at most: a first attempt that dies at
            # once leaves no trace. So both run alone before either is held to have died once too often.
            suspect = max(1, self._config.max_deaths - 2)
            if job.delivery.attempt > suspect and await job.deaths() >= suspect:
                async with self._turn(job):
                    if self._state != "serving":
                        await job.delivery.nak()  # it has not begun, and leaves no trace
                        return
                    await self._run_on(job)
            else:
                await self._run_on(job)
        except errors.Unavailable as exc:
            # The broker is out of reach: after the ack wait it gives the request to another worker.
            _log.warning("a request was left to the broker: %s", exc.message, extra=job.log_extra())
        finally:
            del self._jobs[job.request.key]
            self._settling.discard(job)
            self._held.drop(job.delivery)
            for delivery in job.behind:
                self._spawn(delivery.nak())
            metrics.RUNNING.set(len(self._jobs))
            if not self._jobs:
                self._idle.set()
            self._prefilled(job)

    async def _goes_elsewhere(self, job: Job) -> bool:
        if self._tombstones.has(job.request.key, job.delivery.enqueued_ms):
            return False
        delay = await self._control.elsewhere(job)
        if delay is None or job.over:
            return False
        metrics.RETURNED.labels("elsewhere").inc()
        await job.pass_on(delay)
        return True

    @contextlib.asynccontextmanager
    async def _turn(self, job: Job) -> AsyncIterator[None]:
        """Alone on trial; or at once when `job` is stopped or its deadline passes, since it runs no more."""
        had = await before_stop(job, asyncio.ensure_future(self._trial.acquire()), "to run alone")
        try:
            yield
        finally:
            if had:
                self._trial.release()

    async def _run_on(self, job: Job) -> None:
        adapter = await self._control.serves(job)
        if adapter:
            job.label(job.request.subject.model)
        verdict = screening.screen(job.request, self._engine, self._broker.now_ms(), adapter)
        if verdict is None and job.request.body_object:
            verdict = await self._fetch_body(job)
        if job.delivery.attempt > 1 or self._touch.lost:
            verdict = await job.take_over() or verdict
            if job.past.ended:
                await screening.settle(self._broker, job.request, job.delivery)
                await bodies.discard(self._broker, job.request)
                return
            if len(job.past.died) >= self._config.max_deaths:
                verdict = await screening.bury(self._broker, job.delivery, job.past.died)
        gone = self._tombstones.pop(job.request.key, job.delivery.enqueued_ms)
        if gone and not isinstance(verdict, errors.Poisoned):  # that one's letter needs its body
            verdict = errors.Cancelled("the caller went away")
        if verdict is None:
            job.request = screening.named(job.request, self._engine)
        if adapter and verdict is None:
            self._prefilled(job)  # the engine has nothing of it while it waits
            async with self._control.turn(job) as fault:
                self._prefills(job)
                await job.run(fault)
        else:
            await job.run(verdict)
        self._judge(job)
        if job.ended:
            tap = job.tap
            cached = _or_untold(tap.cached_tokens)
            self._done.append((job.delivery.seq, tap.prompt_tokens, cached, tap.output_tokens))
        if job.tap.output_tokens:
            self._mean_prompt += _SMOOTHING * (job.prompt_tokens - self._mean_prompt)
            self._mean_output += _SMOOTHING * (job.tap.output_tokens - self._mean_output)
        await self._settle(job, verdict)

    async def _settle(self, job: Job, verdict: errors.HeadraceError | None) -> None:
        """What has ended takes no room, however long the journal takes to have its reply."""
        self._settling.add(job)
        self._prefilled(job)
        await job.settle()
        # Not before the ack: a redelivery must find it. A dead letter needs it still.
        if job.acked and not isinstance(verdict, errors.Poisoned):
            await bodies.discard(self._broker, job.request)

    async def _fetch_body(self, job: Job) -> errors.HeadraceError | None:
        """Fetch a body that lies in the object store; returns why it can't be had, if so."""
        try:
            job.request = await bodies.load(self._broker, job.request)
        except (errors.BodyLost, errors.TooLarge) as exc:
            return exc
        # Only now its length is known; until now it counted as the shortest that no message holds.
        self._prefill_held += job.prompt_estimate - self._prefilling[job]
        self._prefilling[job] = job.prompt_estimate
        self._uncomputed.add(job, job.uncached_estimate)
        return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            _log.error("a task of the worker failed", exc_info=exc, extra={"worker": self.name})

    def _on_cancel(self, message: base.Message) -> None:
        """`cancel.<tenant>.<request>`: stop it here, or remember not to start it."""
        try:
            key = subjects.cancelled(message.subject)
        except ValueError:
            return  # no request has such a name
        job, now_ms = self._jobs.get(key), self._broker.now_ms()
        if job is None:
            self._tombstones.add(key, now_ms)
        else:
            job.stop(errors.Cancelled("the caller went away"), screening.cancelled_at(message, now_ms))

    def _preempt(self, key: str) -> bool:
        """Give a running request back, with its progress; whether it is here, and can be continued."""
        job = self._jobs.get(key)
        if job is None or not job.movable:
            return False
        job.stop(HandBack("preempted"))
        return True

    def _on_taken(self, message: base.Message) -> None:
        """`taken.<tenant>.<request>`: another worker runs it now, as the attempt in the message."""
        if not message.data.isdigit() or len(message.data) > _DIGITS:
            return
        key, attempt = message.subject.partition(".")[2], int(message.data)
        self._takes.note(key, attempt, self._broker.now_ms())
        job = self._jobs.get(key)
        if job is not None and attempt > job.epoch:
            job.supersede()

    # Stopping

    async def _drain(self, timeout: float) -> None:
        """Fetch no more, let what runs finish for `timeout` seconds, hand the rest back."""
        self._state = "draining"
        await self._close_pulls()
        self._control.hand_back()
        await self._announce()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            for job in list(self._jobs.values()):
                job.stop(HandBack("drained"))
            await self._idle.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # Telling the fleet and the broker

    async def _hold(self) -> None:
        """Tell the broker that our requests are in good hands."""
        while True:
            await asyncio.sleep(self._broker.ack_wait / 3)
            for job in list(self._jobs.values()):
                try:
                    await job.delivery.in_progress()
                except errors.Unavailable:
                    break  # said again after the next wait; the connection heals itself

    async def _beat(self) -> None:
        while True:
            if self._broker.connected:
                if self._touch.lost:
                    # We were stopped, or cut off: our requests may have been handed on.
                    for job in list(self._jobs.values()):
                        self._spawn(job.doubt())
                self._touch.at = asyncio.get_running_loop().time()
            await self._announce()
            self._top_up()
            # Who dispatches believes no figures that are older than its `stale_after`.
            await asyncio.sleep(min(self._config.heartbeat, BEAT if self._dispatched.active else math.inf))

    def _on_roster(self, message: base.Message) -> None:
        self._spawn(self._held.tell_all())

    async def _announce(self) -> None:
        await self._held.tell()
        await self._caching.tell(heard=self._dispatched.active)
        credit = self._credit_told()
        beat = Heartbeat(
            worker=self.name,
            engine=self._engine.name,
            base=self._engine.base,
            models=self._engine.models,
            started_ms=self._started_ms,
            seq=self._beats,
            state=self._state,
            credit=credit,
            metrics_url=self._metrics_url,
            inbox=self._broker.inbox,
            told=self._held.number,
            host=socket.gethostname(),
            adapters=self._control.states(),
            slots=self._engine.adapter_slots,
            max_rank=self._engine.max_rank,
            adapters_in_memory=self._engine.adapters_in_memory,
            dispatched=self._dispatched.last,
            cached=self._caching.number,
        )
        self._beats += 1
        metrics.observe_engine(self._engine.stats(), credit)
        if self._broker.connected:
            try:
                await self._broker.publish(subjects.heartbeat(self.name), beat.model_dump_json().encode())
            except errors.HeadraceError as exc:
                _log.warning("no heartbeat went out: %s", exc.message)

    def _credit_told(self) -> Credit:
        stats, load = self._engine.stats(), self._load()
        kv = budget.kv_free(load) if load.kv_total else 0
        # An engine that tells of no steps is taken to compute one at any time.
        under_way = 0 if stats.steps else stats.step_tokens
        return Credit(
            requests=self._credit() if self._state == "serving" else 0,
            slots_free=max(0, self._room()),
            slots_total=stats.max_running,
            prefill_tokens_free=int(budget.prefill_free(load)),
            step_tokens=stats.step_tokens,
            kv_tokens_free=int(kv),
            kv_tokens_total=stats.kv_tokens_total,
            kv_block_tokens=stats.kv_block_tokens,
            running=stats.running,
            waiting=stats.waiting,
            held=self._running,
            prefill_tokens_held=max(0, self._uncomputed.tokens - under_way),
        )


def _or_untold(tokens: int | None) -> int:
    return UNTOLD if tokens is None else tokens
