"""One request, from delivery to terminal frame: the ASGI call into the engine and its reply frames."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field

from broker import base, bodies, errors, messages, replies, subjects, usage
from broker.messages import Latency, Request
from kvstate import prefix
from workers import metrics, recovery
from workers.engines.base import ASGIMessage, Engine, Receive, Refused, Scope, Tap, current_tap

_log = logging.getLogger(__name__)

_TO_CALLER = (b"content-type", b"x-request-id", b"retry-after")
"""The engine's headers that travel in the head frame."""

_BEAT_AFTER = 0.25
"""Seconds without a head after which the reader is told that a worker has its request."""

_ABORT_GRACE = 2.0
"""Seconds an engine gets to end its run after a disconnect, before its task is cancelled."""

_HAND_BACKS = 3
"""Times that a request which engines refused goes to another worker. Then it is answered: where every
worker's engine refuses, it would go round until its deadline."""

_REASON = 200
"""Characters of why a request was handed back that go into the journal."""

_AWAY = 5.0
"""Seconds that the end of a request waits for the broker to come back; then it is left to the ack wait."""

_DEATH_NOTICE = 0.25
"""Seconds until an engine that failed a request counts as alive."""


class HandBack(errors.HeadraceError):
    """Not an outcome: the request leaves this worker unfinished, for another one to run."""

    code = "handed_back"

    def __init__(self, message: str, delay: float = 0.0) -> None:
        """`delay`: seconds before which nobody gets it."""
        super().__init__(message)
        self.delay = delay


class Superseded(errors.HeadraceError):
    """Not an outcome: another worker has taken the request over, and whatever we say is nobody's."""

    code = "superseded"


@dataclass(slots=True)
class Timing:
    """`time.monotonic()` seconds, but for `queued`, the seconds already spent in the queue."""

    queued: float
    taken: float = field(default_factory=time.monotonic)
    last_frame: float = 0.0
    gpu_seconds: float = 0.0


class Share:
    """Engine time split equally among the requests that run at once: O(1) for each start and end.

    `read` is the time one request has had since ever, if it had always run; a request's own share is
    the difference between two readings.
    """

    def __init__(self) -> None:
        self._running = 0
        self._value = 0.0
        self._at = 0.0

    def _read(self) -> float:
        now = time.monotonic()
        if self._running:
            self._value += (now - self._at) / self._running
        self._at = now
        return self._value

    def enter(self) -> float:
        value = self._read()
        self._running += 1
        return value

    def leave(self, entered: float) -> float:
        """Seconds of engine time since `entered`, the reading that `enter` gave."""
        value = self._read()
        self._running -= 1
        return value - entered


class Touch:
    """When the worker last told the fleet that it lives; `at` is loop time, written by the worker."""

    LIMIT = 0.25
    """Seconds after which the fleet may have taken it for lost; below the 0.3 at which it does by default."""
    BEATS = 2.5
    """The same in heartbeats, where these are slower: `scheduler.lost_after` is three of them, at least."""

    def __init__(self, heartbeat: float = 0.0) -> None:
        self._limit = self.BEATS * heartbeat
        self.at = asyncio.get_running_loop().time()

    @property
    def lost(self) -> bool:
        return asyncio.get_running_loop().time() - self.at > max(self.LIMIT, self._limit)


class Job:
    """Runs one request. Written by its own task; `stop` may be called from anywhere on the loop."""

    def __init__(
        self,
        request: Request,
        delivery: base.Delivery,
        broker: base.Broker,
        engine: Engine,
        worker: str,
        share: Share,
        touch: Touch,
        sent: messages.Sent | None = None,
    ) -> None:
        """`sent`: what the scheduler that handed it here expected of it."""
        self.request = request
        self._sent = sent
        self.delivery = delivery
        self.tap = Tap()
        self.timing = Timing(queued=max(0.0, broker.now_ms() - delivery.enqueued_ms) / 1000)
        self.acked = False
        self._engine = engine
        self._worker = worker
        self._share = share
        self._touch = touch
        self._writer = replies.Writer(broker, request.reply_to, delivery.attempt, delivery.seq)
        self._broker = broker
        self._joint: recovery.Joint | None = None
        self.past = recovery.NOTHING
        self._ran = False  # the engine was called
        self._event: messages.UsageEvent | None = None  # since its reader was told of its end
        self._taken = False
        self.behind: list[base.Delivery] = []  # of the same request, for when this run has ended
        self._doubted = False  # the fleet may have taken us for lost, and given the request to another
        self._fault: errors.HeadraceError | None = None
        self.stopped = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._beat: asyncio.Task[None] | None = None
        self._abort_sent_ms = 0.0
        self._held_head: ASGIMessage | None = None
        self._body = b""
        self._status = 0
        self._streams = False  # what was said of the answer has been passed on: see `Assembler`
        self._complete = False
        self.label(request.subject.model if any(c.id == request.subject.model for c in engine.models) else "")

    def label(self, model: str) -> None:
        """What its metrics call its model; "" = one that is not served."""
        self._labels = model or metrics.OTHER, self.request.subject.service_class
        self._itl = metrics.ITL.labels(*self._labels)

    @property
    def epoch(self) -> int:
        """Of its frames: the attempt that began the run. A later delivery to the same worker is of the same
        run, and its attempt says nothing of who took the request in between."""
        return self._writer.epoch

    @property
    def prompt_estimate(self) -> int:
        return max(1, bodies.size(self._broker, self.request) // 4)

    @property
    def uncached_estimate(self) -> int:
        """Of the prompt: less what who sent it expects to be cached here."""
        return max(1, self.prompt_estimate - (self._sent.hit_tokens if self._sent is not None else 0))

    @property
    def prompt_tokens(self) -> int:
        """Counted by the engine once it has; guessed from the body's length before."""
        return self.tap.prompt_tokens or self.prompt_estimate

    @property
    def engine_well(self) -> bool | None:
        """Whether the engine did what it is there for; None where that does not show."""
        if isinstance(self._fault, errors.EngineFailed) or (self._complete and self._status >= 500):
            return False
        return True if self._complete and self._status < 400 else None

    def stop(self, fault: errors.HeadraceError, asked_ms: float = 0) -> None:
        """End the run early: with `fault` as its error frame, or, if a HandBack, in another worker.

        Args:
            asked_ms: unix time in ms at which the caller went away, for the abort metric.
        """
        if self._fault is None and not self._complete:
            self._fault = fault
            self._abort_sent_ms = asked_ms
            self.stopped.set()
            if self._limit is not None:
                self._limit.reschedule(asyncio.get_running_loop().time() + _ABORT_GRACE)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more, whoever runs it."""
        return self.stopped.is_set() or self.request.late(self._broker.now_ms())

    def left(self) -> float | None:
        """Seconds until its deadline, below 0 past it; None for one without."""
        deadline_ms = self.request.deadline_ms
        return (deadline_ms - self._broker.now_ms()) / 1000 if deadline_ms else None

    @property
    def movable(self) -> bool:
        """Whether another worker can go on with it, or begin it anew."""
        continues = self._engine.continues and not recovery.several_prompts(self.request.body)
        return continues or not self._streams

    @property
    def superseded(self) -> bool:
        """Another worker has taken the request over, and this run comes to nothing."""
        return self._taken

    async def deaths(self) -> int:
        """Workers, or engines, that died under the request so far. Raises errors.Unavailable."""
        try:
            return len(recovery.died(await self._journal()))
        except errors.MalformedMessage:
            return 0  # told when it is taken over

    async def _journal(self) -> list[messages.Frame]:
        return await replies.journal(self._broker, self.request.reply_to, self.delivery.enqueued_ms)

    async def take_over(self) -> errors.HeadraceError | None:
        """Fence earlier attempts off, and go on from where they came to; the reason if that can't be.

        Raises errors.Unavailable.
        """
        request, delivery = self.request, self.delivery
        try:
            if await self._superseded():
                return Superseded("another worker has it")  # it lay in our socket while we were out of touch
            await self._broker.publish(subjects.taken(request.key), b"%d" % self.epoch)
            self.past = await recovery.fence(self._broker, request, delivery, self._writer, self._worker)
        except errors.MalformedMessage as exc:
            return exc  # someone else wrote there: who reads it can't tell what is ours
        except errors.FramesLost as exc:
            return errors.WorkerLost(f"the worker was lost while it was answering, and {exc.message}")
        if self.past.streamed:
            self._joint = recovery.Joint(self.past)
            self._writer.go_on({index: len(ids) for index, ids in self.past.ids.items()})
            self.tap.replay = self.past.ids
        return recovery.refusal(self.past, request, self._engine.continues)

    async def run(self, verdict: errors.HeadraceError | None = None) -> None:
        """Run to the terminal frame, or hand the request back; with a `verdict`, refuse without running."""
        if verdict is not None:
            self.stop(verdict)
        elif self._engine.died.done():
            self.stop(HandBack("the engine died"))  # not of this request
        timer = None
        if (left := self.left()) is not None:
            timer = asyncio.get_running_loop().call_later(left, self._expire)
        try:
            if self._fault is None:
                self._ran = True
                slow = asyncio.get_running_loop().call_later(_BEAT_AFTER, self._on_slow)
                entered = self._share.enter()
                try:
                    await self._call_engine()
                finally:
                    slow.cancel()
                    self.timing.gpu_seconds = self._share.leave(entered)
        finally:
            if timer is not None:
                timer.cancel()
        await self._finish()

    def _on_slow(self) -> None:
        self._beat = asyncio.create_task(self._say_taken())

    async def _say_taken(self) -> None:
        if not self._writer.head_sent:
            await self._writer.beat(self._worker)

    def _expire(self) -> None:
        self.stop(errors.DeadlineExceeded("the request's deadline passed while it ran"))

    async def _call_engine(self) -> None:
        self.tap.between, self.tap.fail = self._flush, self.stop
        self.tap.chain, self.tap.body_size = prefix.read(self.request.prefix), len(self.request.body)
        current_tap.set(self.tap)
        try:
            # Without limit until `stop` sets one, for an engine deaf to its disconnect.
            async with asyncio.timeout(None) as self._limit:
                try:
                    await self._engine.app(self._scope(), self._receive(), self._send)
                finally:
                    self._limit = None
        except errors.HeadraceError as exc:
            self.stop(exc)
        except Exception as exc:  # TimeoutError, when the engine was deaf to its disconnect
            if self._fault is None:
                _log.exception("the engine's app failed", extra=self.log_extra())
            self.stop(errors.EngineFailed(f"the engine failed on this request: {type(exc).__name__}"))
        if self._abort_sent_ms:
            metrics.ABORT.observe(max(0.0, self._broker.now_ms() - self._abort_sent_ms) / 1000)

    def _scope(self) -> Scope:
        request = self.request
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(request.body)),
            (b"x-request-id", request.request_id.encode("utf-8", "replace")),
        ]
        if request.traceparent:
            headers.append((b"traceparent", request.traceparent.encode("latin-1", "replace")))
        return {
            "type": "http",
            # 2.3: Starlette then watches `receive` for the disconnect while it streams.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            "state": {},
        }

    def _receive(self) -> Receive:
        bodies = [self.request.body]

        async def receive() -> ASGIMessage:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await self.stopped.wait()
            return {"type": "http.disconnect"}

        return receive

    async def _send(self, message: ASGIMessage) -> None:
        if self._fault is not None:
            return  # output past a stop is nobody's
        if message["type"] == "http.response.start":
            # Held until the first body bytes: the two make one frame.
            self._held_head = message
            self._status = message["status"]
            return
        if message["type"] != "http.response.body":
            return
        self._body += message.get("body", b"")
        complete = not message.get("more_body", False)
        if complete or not self.tap.more:
            await self._flush(complete)
        self._complete = complete  # not before: a frame that can't be sent is a fault

    async def _flush(self, complete: bool = False) -> None:
        """Pass on what the app has sent of the engine's outputs, with their tokens."""
        self.tap.more = False
        if self._fault is not None:
            return
        try:
            if self._held_head is not None:
                # A dying engine answers 500: whether that is the caller's answer shows at the end.
                if self._status < 500 and (self._body or complete):
                    await self._send_head()
            elif self._body:
                await self._pass_on(*self._drained())
        except errors.HeadraceError as exc:
            self.stop(exc)  # raised into the app, it would become an event of the answer

    def _drained(self) -> tuple[bytes, list[tuple[int, list[int]]]]:
        body, self._body = self._body, b""
        tokens, self.tap.ids = self.tap.ids, []
        return body, tokens

    async def _pass_on(self, body: bytes, tokens: list[tuple[int, list[int]]]) -> None:
        if self._joint is not None:
            body = self._joint.feed(body, tokens)
            if not body and not tokens:
                return
        if tokens:
            now = time.monotonic()
            self._itl.observe(now - self.timing.last_frame)
            self.timing.last_frame = now
        await self._writer.data(body, tokens)

    async def _send_head(self) -> None:
        assert self._held_head is not None
        self.timing.last_frame = time.monotonic()
        head, self._held_head = self._held_head, None
        body, tokens = self._drained()
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in head.get("headers", ())
            if name.lower() in _TO_CALLER
        }
        self._streams = headers.get("content-type", "").startswith("text/event-stream")
        if self._joint is None:
            await self._writer.head(head["status"], headers, self._worker, body, tokens, self._told())
        elif head["status"] == 200:
            await self._pass_on(body, tokens)  # its reader has had a head
        else:
            raise errors.WorkerLost(
                f"the answer can't be continued: the engine answered {head['status']} now"
            )

    def _told(self) -> dict[str, float]:
        """For the response's headers: milliseconds, and prompt tokens."""
        tap, parts = self.tap, self.latency()
        told = {
            "queue": 1000 * self.timing.queued,
            "prompt": tap.prompt_tokens,
            "cached": tap.cached_tokens or 0,
        }
        if parts.ttft is not None:
            told["ttft"] = 1000 * parts.ttft
        if self._sent is not None:
            told["predicted"] = self._sent.predicted_ms
        return told

    async def _finish(self) -> None:
        """The terminal frame, or the way back into the queue."""
        if self._held_head is not None and self._fault is None:
            await self._settle_held_head()
        if self._fault is None and not self._complete:
            self._fault = errors.EngineFailed("the engine ended without finishing its answer")
        if self._fault is None and self._joint is not None and not self._joint.reached:
            self._fault = errors.WorkerLost("the answer can't be continued: it ended sooner this time")
        if not await self._ours():
            self._fault = Superseded("another worker has it")
        if isinstance(self._fault, Superseded):
            _log.info("request left to the worker that took it over", extra=self.log_extra())
            if self._writer.frames:
                await self._writer.beat(self._worker, left="was taken for lost")  # else it counts as a death
            if self.delivery.attempt > self.epoch and await self._came_back():
                await self.delivery.nak()
            return
        movable = self._engine.continues or not self._streams
        if movable and isinstance(self._fault, errors.EngineFailed) and await self._engine_died():
            self._fault = HandBack("the engine died")
        elif isinstance(self._fault, Refused) and self.past.left < _HAND_BACKS:
            self._fault = HandBack(self._fault.message)
        if isinstance(self._fault, HandBack):
            if movable:
                await self._hand_back(self._fault)
                return
            self._fault = errors.WorkerLost("the worker stopped while it was answering")
        if self._fault is None:
            await self._writer.end(self._usage_meta())
        else:
            await self._writer.error(self._fault)
        self._event = self._usage_event()

    @property
    def ended(self) -> bool:
        """Its reader has been told of its end."""
        return self._event is not None

    async def settle(self) -> None:
        """The usage event and the ack of what has ended, once the journal has all of its reply.

        Raises errors.Unavailable.
        """
        if self._event is None:
            return
        await self._writer.kept(self.delivery.enqueued_ms)
        # The ack last: who finds the request answered but not acked tells of its usage again.
        if not await self._ours(sure=True):
            return  # the broker removes a message for whoever acks it, under the hands of whoever has it
        await usage.publish(self._broker, self._event, self.delivery.seq)
        await self.delivery.ack()
        self.acked = True
        self._observe(self._event)

    async def _hand_back(self, reason: HandBack) -> None:
        """To another worker, with what was said so far in the journal."""
        metrics.RETURNED.labels(reason.code).inc()
        died = self._ran and self._engine.died.done()
        if not died:
            # An attempt that leaves a trace counts as a death, unless it says why it ended; and of one that
            # leaves none, the next can't know that it said nothing.
            left = recovery.PASSED_ON if reason.delay else reason.message[:_REASON]
            await self._writer.beat(self._worker, left=left)
        elif not self._writer.frames:
            await self._writer.beat(self._worker)
        if await self._ours(sure=True):
            await self._give_back(reason.delay)
        _log.info("request handed back: %s", reason.message, extra=self.log_extra())

    async def pass_on(self, delay: float) -> None:
        """To another worker, in `delay` seconds, instead of running it here."""
        await self._writer.beat(self._worker, left=recovery.PASSED_ON)
        await self._give_back(delay)

    async def _give_back(self, delay: float) -> None:
        if delay:
            await self._broker.hand_back(self.delivery, delay)
        else:
            await self.delivery.nak()

    async def _ours(self, sure: bool = False) -> bool:
        """Whether no other worker has taken the request over; `sure` takes a round trip to the broker.

        Raises errors.Unavailable when the broker stays away.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + _AWAY
        while not self._taken:
            try:
                if sure:
                    await self._broker.sync()
                lost = self._doubted or self._touch.lost
                return not (self._taken or (lost and await self._superseded()))
            except errors.MalformedMessage:
                return True  # someone else wrote into the reply: nobody can tell
            except errors.Unavailable:
                if not sure or loop.time() > end:
                    raise
                self._doubted = True  # what was said meanwhile has passed us by
                await asyncio.sleep(_AWAY / 50)
        return False

    def supersede(self) -> None:
        """Another worker has taken the request over: stop, and neither ack nor hand it back."""
        self._taken = True
        self.stop(Superseded("another worker has it"))

    async def _superseded(self) -> bool:
        return any(frame.epoch > self.epoch for frame in await self._journal())

    async def _came_back(self) -> bool:
        """Whether the newest attempt is a delivery to us, taken for one of this run before another worker was
        known to have had the request in between."""
        with contextlib.suppress(errors.MalformedMessage):
            return all(frame.epoch < self.delivery.attempt for frame in await self._journal())
        return False

    async def doubt(self) -> None:
        """See whether the request was given to another worker while this one was out of touch."""
        self._doubted = True
        with contextlib.suppress(errors.Unavailable, errors.MalformedMessage):  # asked again before the ack
            if await self._superseded():
                self.supersede()

    async def _settle_held_head(self) -> None:
        if self._status >= 500 and await self._engine_died():
            self._fault = HandBack("the engine died")
            return
        try:
            await self._send_head()
        except errors.WorkerLost as exc:
            self._fault = exc

    async def _engine_died(self) -> bool:
        """Give the engine's watcher a moment to notice the death that a failure may have announced."""
        await asyncio.wait({self._engine.died}, timeout=_DEATH_NOTICE)
        return self._engine.died.done()

    def _usage_meta(self) -> dict[str, int]:
        tap = self.tap
        return {
            "prompt_tokens": tap.prompt_tokens,
            "cached_tokens": tap.cached_tokens or 0,
            "completion_tokens": tap.output_tokens,
        }

    def latency(self) -> Latency:
        tap, timing = self.tap, self.timing
        scheduled, first, now = tap.scheduled_at, tap.first_token_at, time.monotonic()
        return Latency(
            queue=timing.queued,
            engine_wait=None if scheduled is None else max(0.0, scheduled - timing.taken),
            prefill=None if first is None or scheduled is None else max(0.0, first - scheduled),
            ttft=None if first is None else timing.queued + first - timing.taken,
            decode=None if first is None else max(0.0, now - first),
            total=timing.queued + now - timing.taken,
        )

    def _usage_event(self) -> messages.UsageEvent:
        return usage.event(
            self.request,
            self._fault,
            self._worker,
            self._broker.now_ms(),
            status=self._status,
            epoch=self.epoch,
            gpu_seconds=self.timing.gpu_seconds,
            latency=self.latency(),
            **self._usage_meta(),
        )

    def _observe(self, event: messages.UsageEvent) -> None:
        parts, labels = event.latency, self._labels
        metrics.FRAMES.inc(self._writer.frames)
        metrics.QUEUE_WAIT.labels(*labels).observe(self.timing.queued)
        for histogram, value in (
            (metrics.ENGINE_WAIT, parts.engine_wait),
            (metrics.PREFILL, parts.prefill),
            (metrics.TTFT, parts.ttft),
        ):
            if value is not None:
                histogram.labels(*labels).observe(value)
        if parts.total is not None:
            metrics.TOTAL.labels(*labels, event.outcome).observe(parts.total)
        for kind, count in self._usage_meta().items():
            metrics.TOKENS.labels(labels[0], kind.removesuffix("_tokens")).inc(count)
        _log.info("request %s", event.outcome, extra=self.log_extra() | _logged(event))

    def log_extra(self) -> dict[str, object]:
        subject = self.request.subject
        return {
            "request_id": self.request.request_id,
            "tenant": subject.tenant,
            "model": subject.model,
            "worker": self._worker,
        }


def _logged(event: messages.UsageEvent) -> dict[str, object]:
    """What a request's one log line says of its end; latency parts in seconds."""
    parts = event.latency.model_dump(exclude_none=True)
    return {
        "path": event.path,
        "class": event.service_class,
        "outcome": event.outcome,
        "status": event.status,
        "code": event.code,
        "epoch": event.epoch,
        "prompt_tokens": event.prompt_tokens,
        "cached_tokens": event.cached_tokens,
        "completion_tokens": event.completion_tokens,
        **{f"{part}_s": round(seconds, 6) for part, seconds in parts.items()},
    }
