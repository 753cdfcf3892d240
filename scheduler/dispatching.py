"""The dispatcher at work: takes what is queued for every base that has workers, and hands each request to the
worker that `dispatch.Dispatcher` chooses, when that worker can begin it.

Only the scheduler that leads dispatches. It says so on `dispatch`, and workers then pull nothing themselves;
when it falls silent they do. What it has taken and not handed out is told to the broker as being in
progress; when it stops it gives that back, and when it dies its successor finds it: delivered, and held by no
worker. A request on its way to a worker is the worker's once that tells of it on `held.<worker>`; one that
nobody tells of is handed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec

import orjson
from pydantic import ValidationError

from broker import base, bodies, entries, errors, subjects, usage
from broker.messages import (
    UNTOLD,
    Answer,
    Cached,
    Command,
    Credit,
    Dispatch,
    Heartbeat,
    News,
    Request,
    Sent,
    ServiceClass,
    Steps,
    parse_request,
)
from kvstate import prefix
from scheduler import held, ledger, metrics, progress
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.dispatcher import Dispatcher
from scheduler.dispatch.types import Item, Preempt, Send, Shed, WorkerState
from scheduler.guard import PULLS_STAND, Guard
from scheduler.leader import Leader
from scheduler.sends import Sends

_log = logging.getLogger(__name__)

_TICK = 0.1
"""Seconds between two words of the dispatcher; workers pull by themselves after three and a half."""

_SMALL = 16 * 2**10
"""Bytes of a body that is kept here and sent along; a larger one is read from the queue by its worker."""

_UNCLAIMED = 0.5
_UNREAD = 3.0
"""Seconds after which a request that was sent must be told of by its worker; a large one is read from the
queue before."""

_AT_ONCE = 256
"""Requests that are prolonged before anything else gets its turn."""

_STALL = 0.1
"""Seconds by which a word may be late; past that we stood still, or did not lead."""

_HELD = 0.8
"""Part of the ack wait after which the broker may have given to others what we have not prolonged."""

_UNWANTED = 1.0
"""Seconds after which what is no request comes again, where no worker was there to refuse it."""

_PAUSE = 5.0
"""Seconds for which workers pull by themselves after a defect of the dispatcher."""

_MOST = 2**32
_LONGEST = 2**22
"""A worker's figures may be anything; more than this, of a worker or a request, they are not."""

_UNSERVED = 10.0
"""Seconds without a worker after which a base's requests go back into the queue."""

_TURN = 2.0
"""Seconds for which a worker's adapters may all be busy before another one's request is sent there."""

_ASKS = 64
_ASKED = 0.5
"""Requests of which the journal is asked at the same time how far they have come, and seconds that it is
given, and then left alone for: it may be without a leader."""

Spawn = Callable[[Coroutine[Any, Any, None]], None]
P = ParamSpec("P")


def _careful(act: Callable[Concatenate[Dispatching, P], None]) -> Callable[Concatenate[Dispatching, P], None]:
    """A defect must cost no request: workers can do without a dispatcher."""

    def acting(self: Dispatching, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            act(self, *args, **kwargs)
        except Exception:
            self._failed()

    return acting


@dataclass(slots=True)
class _Queued:
    """A delivery in our hands. `done`: output tokens that earlier attempts made."""

    request: Request
    parcel: base.Parcel
    seq: int
    done: int = 0


@dataclass(slots=True)
class _Out:
    """A request that was sent to a worker."""

    queued: _Queued
    worker: str
    at: float
    number: int

    @property
    def limit(self) -> float:
        """Seconds until its worker must have told of it."""
        return _UNREAD if self.queued.parcel.data is None else _UNCLAIMED


@dataclass(slots=True, eq=False)
class _Queue:
    """What is dispatched of one base."""

    dispatcher: Dispatcher
    pullers: dict[ServiceClass, base.Puller] = field(default_factory=dict)
    waiting: dict[int, _Queued] = field(default_factory=dict)
    of_class: dict[ServiceClass, int] = field(default_factory=lambda: dict.fromkeys(ServiceClass, 0))
    sends: dict[str, Sends] = field(default_factory=dict)  # to each worker
    context: int = 0  # tokens of its models' longest; 0 = nobody has told
    unserved_since: float = math.inf
    decide_soon: bool = False
    timer: asyncio.TimerHandle | None = None


class Dispatching:
    """See the module. Owned by the scheduler's event loop.

    Args:
        guard: knows what workers hold; it is told what we do.
        workers: the newest heartbeat of each live worker.
    """

    def __init__(
        self,
        config: DispatchConfig,
        broker: base.Broker,
        leader: Leader,
        name: str,
        guard: Guard,
        workers: Callable[[], Iterable[Heartbeat]],
        spawn: Spawn,
    ) -> None:
        self._config = config
        self._broker = broker
        self._leader = leader
        self._name = name
        self._guard = guard
        guard.on_lost, guard.in_other_hands = self._lost, self.holds
        self._workers = workers
        self._spawn = spawn
        self._epoch = 0
        self._queues: dict[str, _Queue] = {}
        self._out: dict[int, _Out] = {}
        self._opening: set[tuple[str, int]] = set()  # bases, and in which epoch
        self._numbers = itertools.count(1)
        self._roomless: dict[str, float] = {}  # workers whose adapters are all busy, and since when
        self._before: tuple[float, Dispatch] | None = None  # another one that dispatched, and when it said so
        self._beats: dict[str, Heartbeat] = {}
        self._keys: dict[str, int] = {}  # of waiting requests
        self._names: dict[str, tuple[str, int]] = {}  # request -> base and sequence, for `explain`
        self._prolonged = 0.0  # when the last round of it began that came to its end
        self._prolonging = False
        self._ticked = 0.0
        self._steps: tuple[Steps, ...] = ()
        self._noted = 0.0  # when the shares were; inf = they are being noted
        self._asking = asyncio.Semaphore(_ASKS)
        self._bounced = asyncio.Event()  # what still comes to who dispatched before is handed on
        self._journal_from = 0.0  # when it is asked again, after it did not answer
        self._paused_until = -math.inf

    def holds(self, seq: int) -> bool:
        """Whether it waits here, or is on its way to a worker that will tell of it."""
        out = self._out.get(seq)
        if out is not None:
            return time.monotonic() - out.at < out.limit
        return any(seq in queue.waiting for queue in self._queues.values())

    async def watch(self) -> list[base.Subscription]:
        return [
            await self._broker.subscribe(subjects.ALL_CREDITS, self._on_news),
            await self._broker.subscribe(subjects.ALL_CACHED, self._on_cached),
            await self._broker.subscribe(subjects.ALL_CANCELS, self._on_cancel),
            await self._broker.subscribe(subjects.EXPLAIN, self._on_explain),
            await self._broker.subscribe(subjects.DISPATCH, self._on_dispatch),
            # That we are there, even if we hang: see `_bounce`.
            await self._broker.subscribe(subjects.roster(self._name), lambda _: None),
        ]

    async def run(self) -> None:
        """Dispatch while we lead, for ever."""
        try:
            while True:
                try:
                    await self._tick()
                except errors.HeadraceError as exc:
                    _log.warning("dispatching was put off: %s", exc.message)
                except Exception:
                    self._failed()
                await asyncio.sleep(_TICK if self._epoch else _TICK / 5)  # a new leader begins at once
        finally:
            await self._stop(give_back=self._leader.leads)

    async def _tick(self) -> None:
        paused = time.monotonic() < self._paused_until
        if paused or not (self._config.enabled and self._leader.leads):
            self._beats = {beat.worker: beat for beat in self._workers()}
            if self._leader.holds and self._config.enabled and not paused:
                await self._rest()  # if nobody takes it, we go on with what we know
            elif self._epoch:
                await self._stop(give_back=False)  # whoever leads has them, or will
            return
        now = time.monotonic()
        if self._epoch and self._outdated(now):
            await self._stop(give_back=False)
        if not self._epoch:
            self._epoch, self._prolonged = self._leader.revision, now
            _log.info("dispatching", extra={"epoch": self._epoch})
            self._bounced.clear()
            self._spawn(self._bounce())
        told = Dispatch(
            scheduler=self._name,
            epoch=self._epoch,
            bases=tuple(self._queues),
            inbox=self._broker.inbox,
            steps=self._steps,
        )
        await self._broker.publish(subjects.DISPATCH, told.model_dump_json().encode())
        live = {beat.base: beat for beat in self._workers()}
        for beat in live.values():
            known = self._queues.get(beat.base)
            if not (known and known.pullers) and (beat.base, self._epoch) not in self._opening:
                self._opening.add((beat.base, self._epoch))
                self._spawn(self._open(beat.base, self._epoch, known))
        for base_model, queue in list(self._queues.items()):
            queue.unserved_since = math.inf if base_model in live else min(queue.unserved_since, now)
            if now - queue.unserved_since > _UNSERVED:
                del self._queues[base_model]
                await self._close(queue, give_back=True)
                continue
            await self._fill(base_model, queue)
            self._soon(base_model)
        if now - self._ticked > _TICK + _STALL:
            for out in self._out.values():  # what was told of meanwhile has not been read, or was not heard
                out.at = now
        else:
            await self._reclaim(now)
        self._ticked = now
        if now - self._noted > ledger.INTERVAL:
            self._noted = math.inf
            self._steps = tuple(self._measured())
            self._spawn(self._note_shares())
        if now - self._prolonged > self._broker.ack_wait / 3 and not self._prolonging:
            self._prolonging = True
            self._spawn(self._prolong(now))

    async def _prolong(self, now: float) -> None:
        """Beside the ticks: what waits may be a lot."""
        epoch = self._epoch
        try:
            for queue in list(self._queues.values()):
                for number, (seq, queued) in enumerate(list(queue.waiting.items())):
                    if number % _AT_ONCE == 0:
                        await asyncio.sleep(0)
                    if self._epoch != epoch:
                        return
                    if queue.waiting.get(seq) is queued:
                        await self._broker.prolong(queued.parcel.receipt)
            if self._epoch == epoch:
                self._prolonged = now
        finally:
            self._prolonging = False

    def _outdated(self, now: float) -> bool:
        """Whether what waits here may be others' by now."""
        return now - self._prolonged > _HELD * self._broker.ack_wait

    def _measured(self) -> Iterator[Steps]:
        """How long the steps of each pool take."""
        metrics.STEP.clear()
        metrics.TTFT_ERROR.clear()
        for base_model, queue in self._queues.items():
            metrics.TTFT_ERROR.labels(base_model).set(queue.dispatcher.error_p90())
            for pool in queue.dispatcher.pools():
                for each in pool.classes:
                    metrics.STEP.labels(base_model, each).set(pool.step_s)
                yield Steps(
                    base=base_model,
                    classes=pool.classes,
                    workers=pool.workers,
                    tokens=min(pool.step_tokens, _MOST),
                    ms=round(1000 * pool.step_s, 3),
                )

    async def _note_shares(self) -> None:
        """For who leads next. Beside the ticks, as `_open`."""
        try:
            for base_model, queue in list(self._queues.items()):
                await ledger.write(self._broker, base_model, queue.dispatcher.served(time.monotonic()))
        finally:
            self._noted = time.monotonic()

    # Taking what is queued

    async def _open(self, base_model: str, epoch: int, known: _Queue | None) -> None:
        """Beside the ticks: a cluster that elects a leader may keep us waiting. `known`: it rests."""
        queue = known or _Queue(Dispatcher(base_model, self._config))
        pullers: dict[ServiceClass, base.Puller] = {}
        try:
            if known is None:
                await self._resume(base_model, queue.dispatcher)
            for service_class in ServiceClass:
                pullers[service_class] = await self._broker.pull(
                    base_model,
                    service_class,
                    lambda delivery: self._on_delivery(base_model, queue, delivery),
                    lambda: self._spawn(self._fill(base_model, queue)),
                )
            if self._epoch == epoch and self._queues.get(base_model) is known:
                self._queues[base_model], queue.pullers = queue, pullers
        finally:
            self._opening.discard((base_model, epoch))
            if queue.pullers is not pullers:
                for puller in pullers.values():
                    await puller.close()
        if self._queues.get(base_model) is queue:
            for beat in self._workers():
                if beat.base == base_model:
                    self._observe(beat, beat.credit, beat.dispatched)
            await self._fill(base_model, queue)
            # What another dispatcher had and left, and has got until now. What it sent is told of at once, by
            # who lives.
            await self._bounced.wait()
            if self._guard.knows_all:
                await self._guard.hand_on_unclaimed(base_model, _TICK)
            await self._guard.hand_on_unclaimed(base_model)

    async def _resume(self, base_model: str, dispatcher: Dispatcher) -> None:
        """Begin with what tenants were served by who led before, where the broker tells."""
        try:
            async with asyncio.timeout(_ASKED):
                entry = await ledger.read(self._broker, base_model)
        except (errors.Unavailable, TimeoutError):
            return
        now = time.monotonic()
        dispatcher.resume(entry.served, now - entry.age(self._broker.now_ms()), now)

    async def _rest(self) -> None:
        """Take nothing more: what comes once another leads it would not find."""
        for queue in list(self._queues.values()):
            pullers, queue.pullers = queue.pullers, {}
            for puller in pullers.values():
                await puller.close()

    async def _close(self, queue: _Queue, give_back: bool) -> None:
        """`give_back`: nobody else can have what waits here."""
        if queue.timer is not None:
            queue.timer.cancel()
        for puller in queue.pullers.values():
            await puller.close()
        for seq in list(queue.waiting):
            queued = self._drop(queue, seq)
            if give_back and queued is not None:
                await self._broker.hand_on(queued.parcel.receipt)

    def _on_dispatch(self, message: base.Message) -> None:
        """Another one's word, or our own."""
        try:
            told = Dispatch.model_validate_json(message.data)
        except ValidationError:
            return
        if told.scheduler == self._name:
            return
        if told.bases:
            self._before = time.monotonic(), told
        else:
            self._guard.is_awake(told.inbox)

    async def _bounce(self) -> None:
        """Hand on what is still delivered to the one that dispatched before, if it hangs."""
        try:
            if self._before is not None and time.monotonic() - self._before[0] <= PULLS_STAND:
                before = self._before[1]
                if before.inbox:
                    await self._guard.bounce(before.scheduler, before.inbox)
        finally:
            self._bounced.set()

    async def _fill(self, base_model: str, queue: _Queue) -> None:
        """Have the broker hand us what is queued, up to the window."""
        if self._queues.get(base_model) is not queue:
            return
        for service_class, puller in queue.pullers.items():
            outstanding, few = puller.outstanding, self._config.window // 4
            room = self._config.window - queue.of_class[service_class] - outstanding
            if room > few >= outstanding:
                await puller.ask(room)

    @_careful
    def _on_delivery(self, base_model: str, queue: _Queue, delivery: base.Delivery) -> None:
        if self._queues.get(base_model) is not queue:
            return  # stopped meanwhile: its ack wait, or who leads now, hands it on
        now, now_ms = time.monotonic(), self._broker.now_ms()
        try:
            request = parse_request(delivery.subject, delivery.headers, delivery.data)
        except errors.MalformedMessage:
            self._spawn(self._to_anyone(delivery))
            return
        data = delivery.data if len(delivery.data) <= _SMALL else None
        parcel = base.Parcel(delivery.subject, request.headers(), data, delivery.receipt)
        queued = _Queued(request, parcel, delivery.seq)
        if self._out.pop(delivery.seq, None) is not None:
            queue.dispatcher.returned(delivery.seq, now)
        elif self._drop(queue, delivery.seq) is not None:
            queue.dispatcher.cancel(delivery.seq)  # it lay here for longer than its ack wait
        service_class = ServiceClass(request.subject.service_class)
        queue.waiting[delivery.seq] = queued
        queue.of_class[service_class] += 1
        self._keys[request.key] = delivery.seq
        self._names.pop(request.key, None)  # else it kept its place among those to be forgotten
        self._names[request.key] = base_model, delivery.seq
        most = len(self._queues) * (len(ServiceClass) * self._config.window + self._config.explained)
        for _ in range(len(self._names) - most):
            oldest = next(iter(self._names))
            place = self._names.pop(oldest)
            if oldest in self._keys:  # it waits still
                self._names[oldest] = place
        age = max(0.0, (now_ms - delivery.enqueued_ms) / 1000)
        left = (request.deadline_ms - now_ms) / 1000 if request.deadline_ms else math.inf
        prompt_tokens = max(1, bodies.size(self._broker, request) // 4)
        if queue.context:  # what is longer is no text: an image, say
            prompt_tokens = min(prompt_tokens, queue.context)
        item = Item(
            key=delivery.seq,
            tenant=request.subject.tenant,
            model=self._model(request),
            service_class=service_class,
            arrived=now - age,
            deadline=now + left,
            prompt_tokens=prompt_tokens,
            max_tokens=request.budget,
            # No more than the prompt has: what is cached counts for less.
            hashes=prefix.read(request.prefix)[: prompt_tokens // prefix.BLOCK_TOKENS],
            weight=self._config.weights.get(request.subject.tenant, 1.0),
        )
        if delivery.attempt > 1:
            self._spawn(self._arrives_again(base_model, queue, queued, item, delivery.enqueued_ms))
            return
        self._arrive(base_model, queue, queued, item)

    async def _arrives_again(
        self, base_model: str, queue: _Queue, queued: _Queued, item: Item, enqueued_ms: float
    ) -> None:
        """One that a worker may have had. What it said extends the prompt and is off the budget. An answer
        that has begun is worth finishing, whatever its deadline; where nobody knows, its worker judges."""
        come = progress.Progress(begun=True, tokens=0)
        async with self._asking:
            if time.monotonic() >= self._journal_from:
                try:
                    async with asyncio.timeout(_ASKED):
                        come = await progress.of(self._broker, queued.request.reply_to, enqueued_ms)
                except errors.MalformedMessage:
                    pass  # someone else wrote there
                except (errors.Unavailable, TimeoutError) as exc:
                    if time.monotonic() >= self._journal_from:  # not once for each of those asked
                        why = str(exc) or "no answer in time"
                        _log.warning("how far requests have come is not known: %s", why)
                    self._journal_from = time.monotonic() + _ASKED
        if come.begun:
            queued.done = _tokens(come.tokens)
            item = dataclasses.replace(item, deadline=math.inf, done_tokens=queued.done)
        self._arrive(base_model, queue, queued, item)

    @_careful
    def _arrive(self, base_model: str, queue: _Queue, queued: _Queued, item: Item) -> None:
        if queue.waiting.get(queued.seq) is queued:  # else cancelled meanwhile, or not ours any more
            queue.dispatcher.arrive(item, time.monotonic())
            self._soon(base_model)

    def _model(self, request: Request) -> str:
        """An adapter, where workers take any; whatever else is named any worker answers, or refuses."""
        name, base_model = request.subject.model, request.subject.base
        if not entries.split(name)[1]:
            return base_model
        takes = any(beat.slots for beat in self._beats.values() if beat.base == base_model)
        return name if takes else base_model

    async def _to_anyone(self, delivery: base.Delivery) -> None:
        """What is no request is a worker's to refuse."""
        worker = next((beat.worker for beat in self._workers() if beat.state == "serving"), None)
        if worker is None:
            await self._broker.hand_back(delivery, _UNWANTED)
            return
        # Whatever else a publisher may have set: not all that a server takes can be written again.
        head = {name: text for name, text in (delivery.headers or {}).items() if name in subjects.OF_REQUESTS}
        parcel = base.Parcel(delivery.subject, head, delivery.data, delivery.receipt)
        sent = Sent(epoch=self._epoch, number=0, why="it is no request")
        await self._broker.relay(subjects.run(worker), parcel, sent.model_dump_json())

    def _drop(self, queue: _Queue, seq: int) -> _Queued | None:
        """It waits here no more."""
        queued = queue.waiting.pop(seq, None)
        if queued is not None:
            queue.of_class[ServiceClass(queued.request.subject.service_class)] -= 1
            if self._keys.get(queued.request.key) == seq:
                del self._keys[queued.request.key]
        return queued

    # Workers

    def on_heartbeat(self, beat: Heartbeat) -> None:
        known = self._beats.get(beat.worker)
        if known is not None and (beat.state == "gone" or beat.started_ms != known.started_ms):
            self._lose(beat.worker)
        if beat.state == "gone":
            return
        self._beats[beat.worker] = beat
        if (queue := self._queues.get(beat.base)) is not None:
            longest = max((_within(card.context_tokens) for card in beat.models), default=0)
            queue.context = max(queue.context, longest)
        self._observe(beat, beat.credit, beat.dispatched)
        self._compare(beat)

    @_careful
    def _compare(self, beat: Heartbeat) -> None:
        """Have it tell all that its engine caches, if we have missed something of it."""
        queue = self._queues.get(beat.base)
        if queue is None or (told := queue.dispatcher.told(beat.worker)) == beat.cached:
            return
        if told > beat.cached:  # it tells nothing any more, or begins anew, or what was told was not so
            queue.dispatcher.caches(beat.worker, 0, (), time.monotonic())
        if beat.cached:
            self._spawn(self._broker.publish(subjects.inventory(beat.worker), b""))

    @_careful
    def _on_cached(self, message: base.Message) -> None:
        if not self._epoch:
            return
        try:
            told = Cached.model_validate_json(message.data)
            taken, evicted = (prefix.decode(each, most=_MOST) for each in (told.taken, told.evicted))
        except ValueError:
            _log.warning("a message on %s is unreadable", message.subject)
            return
        beat = self._beats.get(told.worker)
        queue = self._queues.get(beat.base) if beat is not None else None
        if beat is None or queue is None or told.started_ms != beat.started_ms:
            return
        now = time.monotonic()
        if told.whole:
            queue.dispatcher.caches(told.worker, told.number, taken, now)
        else:
            queue.dispatcher.cache(told.worker, told.number, taken, evicted, now)

    def _lost(self, lost: held.Lost) -> None:
        """It fell silent; one that was started anew under its name has not."""
        known = self._beats.get(lost.worker)
        if known is not None and known.started_ms == lost.beat.started_ms:
            self._lose(lost.worker, frozenset(lost.receipts))

    @_careful
    def _lose(self, worker: str, told: Container[str] = ()) -> None:
        """`told`: receipts of what it told of. That is handed on for it, and only once: a receipt names a
        message, whoever has it by then."""
        beat = self._beats.pop(worker, None)
        queue = self._queues.get(beat.base) if beat is not None else None
        if queue is None or beat is None:
            return
        queue.dispatcher.lose(worker)
        queue.sends.pop(worker, None)
        self._roomless.pop(worker, None)
        for seq, out in list(self._out.items()):
            if out.worker == worker:
                del self._out[seq]
                receipt = out.queued.parcel.receipt
                if receipt not in told and not self._guard.holds(seq):
                    self._spawn(self._broker.hand_on(receipt))
        self._soon(beat.base)

    @_careful
    def _on_news(self, message: base.Message) -> None:
        if not self._epoch:
            return
        try:
            news = News.model_validate_json(message.data)
        except ValidationError:
            _log.warning("a message on %s is unreadable", message.subject)
            return
        beat = self._beats.get(news.worker)
        queue = self._queues.get(beat.base) if beat is not None else None
        if beat is None or queue is None:
            return
        now = time.monotonic()
        for seq, cached in news.first:
            if self._has(news.worker, seq):
                queue.dispatcher.first(seq, now, _told(cached))
        for seq, prompt_tokens, cached, output in news.done:
            if self._has(news.worker, seq):
                before = self._out.pop(seq).queued.done
                prompt_tokens, known = _tokens(prompt_tokens), _told(cached)
                known = None if known is None else min(known, prompt_tokens)
                queue.dispatcher.finish(seq, now, prompt_tokens, known, _tokens(output - before))
        self._observe(beat, news.credit, news.dispatched)

    @_careful
    def _observe(self, beat: Heartbeat, credit: Credit, dispatched: tuple[int, int]) -> None:
        queue = self._queues.get(beat.base)
        if queue is None:
            return
        epoch, number = dispatched
        sends = queue.sends.setdefault(beat.worker, Sends()).upto(number if epoch == self._epoch else 0)
        now = time.monotonic()
        queue.dispatcher.state(_state(beat, credit, sends, self._adapter_room(beat, now)), now)
        self._soon(beat.base)

    def _has(self, worker: str, seq: int) -> bool:
        """Whether it was sent there, and nowhere since."""
        out = self._out.get(seq)
        return out is not None and out.worker == worker

    def _adapter_room(self, beat: Heartbeat, now: float) -> bool:
        """Whether one more adapter could run there. Where all are busy for long, one more may wait there for
        its turn, which the worker gives it: else it might wait here for ever."""
        busy = sum(1 for each in beat.adapters if each.running or each.waiting)
        if not beat.slots or busy < max(beat.slots, beat.adapters_in_memory):
            self._roomless.pop(beat.worker, None)
            return beat.slots > 0
        if now - self._roomless.setdefault(beat.worker, now) < _TURN:
            return False
        del self._roomless[beat.worker]
        return True

    # Deciding

    def _soon(self, base_model: str) -> None:
        """Decide once for all that comes within one turn of the loop."""
        queue = self._queues.get(base_model)
        if queue is not None and not queue.decide_soon:
            queue.decide_soon = True
            asyncio.get_running_loop().call_soon(self._decide, base_model, queue)

    @_careful
    def _decide(self, base_model: str, queue: _Queue) -> None:
        queue.decide_soon = False
        now = time.monotonic()
        if self._queues.get(base_model) is not queue or not self._leader.leads or self._outdated(now):
            return
        decisions = queue.dispatcher.decide(now)
        due = queue.dispatcher.next_due(now)
        sends: list[tuple[str, base.Parcel, str]] = []
        for decision in decisions:
            match decision:
                case Send():
                    if (queued := self._drop(queue, decision.key)) is not None:
                        sends.append(self._sent(queue, queued, decision, now))
                case Shed():
                    self._shed(queue, decision)
                case Preempt():
                    self._preempt(queue, decision)
        if sends:
            self._spawn(self._send(sends))
        if queue.timer is not None:
            queue.timer.cancel()
            queue.timer = None
        if due < math.inf:
            queue.timer = asyncio.get_running_loop().call_later(
                max(0.001, due - now), self._decide, base_model, queue
            )

    def _sent(self, queue: _Queue, queued: _Queued, send: Send, now: float) -> tuple[str, base.Parcel, str]:
        number = next(self._numbers)
        queue.sends.setdefault(send.worker, Sends()).add(number)
        self._out[send.key] = _Out(queued, send.worker, now, number)
        metrics.DISPATCHED.inc()
        sent = Sent(
            epoch=self._epoch,
            number=number,
            queued_ms=1000 * send.queue_s,
            predicted_ms=1000 * (send.queue_s + send.predicted_ttft_s),
            hit_tokens=send.hit_tokens,
            why=send.why,
        )
        return subjects.run(send.worker), queued.parcel, sent.model_dump_json()

    async def _send(self, sends: list[tuple[str, base.Parcel, str]]) -> None:
        for to, parcel, note in sends:
            try:
                await self._broker.relay(to, parcel, note)
            except errors.HeadraceError as exc:  # handed on once nobody tells of it
                _log.warning("a request was not sent: %s", exc.message)

    def _shed(self, queue: _Queue, shed: Shed) -> None:
        queued = self._drop(queue, shed.key)
        if queued is None:
            return
        metrics.SHED.labels(queued.request.subject.service_class).inc()
        fault: errors.HeadraceError = errors.Overloaded(
            f"it would not be served in time: {shed.why}", retry_after=shed.retry_after_s
        )
        if queued.request.late(self._broker.now_ms()):
            fault = errors.DeadlineExceeded("the request's deadline passed in the queue")
        self._spawn(self._end(queued, fault))

    async def _end(self, queued: _Queued, fault: errors.HeadraceError) -> None:
        """Whoever deletes it tells its caller."""
        if await self._broker.delete(subjects.REQUESTS, queued.seq):
            await usage.unrun(self._broker, queued.request, fault, queued.seq)
            await bodies.discard(self._broker, queued.request)

    def _preempt(self, queue: _Queue, preempt: Preempt) -> None:
        out = self._out.get(preempt.key)
        if out is not None:
            self._spawn(self._take_back(queue, out, preempt))

    async def _take_back(self, queue: _Queue, out: _Out, preempt: Preempt) -> None:
        command = Command(do="preempt", request=out.queued.request.key, reason=preempt.why)
        told = {"request": out.queued.request.key, "worker": preempt.worker}
        try:
            said = await self._broker.ask(subjects.ctl(preempt.worker), command.model_dump_json().encode())
            answer = Answer.model_validate_json(said)
        except (errors.HeadraceError, ValidationError) as exc:
            answer = Answer(ok=False, message=f"no answer: {exc}")
        if answer.ok:
            metrics.PREEMPTED.inc()
            _log.info("a batch request is taken back: %s", preempt.why, extra=told)
        else:
            _log.info("not preempted: %s", answer.message, extra=told)
            queue.dispatcher.stays(preempt.key)

    # What goes wrong

    async def _reclaim(self, now: float) -> None:
        """Hand on what was sent and no worker tells of: it got lost on the way, or its end did."""
        for seq, out in list(self._out.items()):
            if now - out.at > out.limit and not self._guard.holds(seq) and self._out.get(seq) is out:
                del self._out[seq]
                queue = self._queues.get(out.queued.request.subject.base)
                if queue is not None:
                    queue.dispatcher.returned(seq, now)
                    queue.sends.setdefault(out.worker, Sends()).upto(out.number)
                await self._broker.hand_on(out.queued.parcel.receipt)  # acked meanwhile, it does nothing

    def _failed(self) -> None:
        """Called where a defect is caught: better no dispatcher than a wrong one."""
        _log.exception("the dispatcher failed: workers pull by themselves for %g s", _PAUSE)
        self._paused_until = time.monotonic() + _PAUSE
        self._spawn(self._stop(give_back=self._leader.leads))

    async def _stop(self, give_back: bool) -> None:
        """Take and send nothing more. `give_back`: nobody else can have what waits here."""
        queues, self._queues = self._queues, {}
        epoch, self._epoch, self._steps = self._epoch, 0, ()
        metrics.STEP.clear()
        metrics.TTFT_ERROR.clear()
        self._out.clear()
        for queue in queues.values():
            await self._close(queue, give_back)
        if epoch and self._broker.connected:
            # Nothing is delivered to us any more: whoever hands that on must listen no longer, else its
            # listening would keep our pulls standing when it hangs itself.
            told = Dispatch(scheduler=self._name, epoch=epoch, bases=(), inbox=self._broker.inbox)
            with contextlib.suppress(errors.HeadraceError):
                await self._broker.publish(subjects.DISPATCH, told.model_dump_json().encode())

    # Callers

    @_careful
    def _on_cancel(self, message: base.Message) -> None:
        """Of a request that waits here. What runs is its worker's to end."""
        try:
            seq = self._keys.get(subjects.cancelled(message.subject))
        except ValueError:
            return
        for queue in self._queues.values():
            if seq is not None and seq in queue.waiting:
                queue.dispatcher.cancel(seq)
                if (queued := self._drop(queue, seq)) is not None:
                    self._spawn(self._end(queued, errors.Cancelled("the caller cancelled it in the queue")))

    def _on_explain(self, message: base.Message) -> None:
        """`<tenant>.<request>` in the message, or `<request>` of any tenant; the answer is JSON."""
        if not self._leader.leads or not message.reply:
            return
        asked = message.data.decode("utf-8", "replace")
        found = self._names.get(asked) or next(
            (place for key, place in reversed(self._names.items()) if key.endswith(f".{asked}")), None
        )
        told = None
        if found is not None and (queue := self._queues.get(found[0])) is not None:
            told = queue.dispatcher.explain(found[1], time.monotonic())
        self._spawn(self._broker.publish(message.reply, orjson.dumps(told)))


def _state(beat: Heartbeat, credit: Credit, sends: int, adapter_room: bool) -> WorkerState:
    """Of what a worker tells; whatever it is."""
    held, step = _within(credit.held), max(1, _within(credit.step_tokens))
    kv_total = _within(credit.kv_tokens_total)
    return WorkerState(
        worker=beat.worker,
        seen=time.monotonic(),
        step_tokens=step,
        slots_total=held + _within(credit.slots_free),
        running=held,
        prefill_held=_within(credit.prefill_tokens_held),
        kv_total=kv_total,
        kv_free=min(kv_total, _within(credit.kv_tokens_free)),
        block_size=max(1, _within(credit.kv_block_tokens)),
        sends=sends,
        serving=beat.state == "serving",
        adapters=frozenset(each.model for each in beat.adapters if each.state in ("loading", "ready")),
        adapter_room=adapter_room,
    )


def _within(figure: int) -> int:
    return max(0, min(figure, _MOST))


def _tokens(figure: int) -> int:
    """Of one request."""
    return max(0, min(figure, _LONGEST))


def _told(cached: int) -> int | None:
    return None if cached == UNTOLD else _tokens(cached)
