"""One HTTP request through the queue: publish, follow its frames, cancel when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

import orjson

from broker import base, bodies, errors, replies, subjects, usage
from broker.messages import QUEUED_EPOCH, Frame, FrameKind, Request
from ingress import metrics, resume
from ingress.config import IngressConfig
from ingress.http import Receive, disconnected
from ingress.relay import Relay

_log = logging.getLogger(__name__)

_WORKER_FIRST = 0.25
"""Seconds in which a worker that had the request says so."""

_STORE_AGAIN = 0.1
"""Seconds after which a request that no stream took, or no connection, is offered again."""

_REPEAT = 1.0
"""Seconds after which a cancel that nobody confirmed is sent again."""

_CONFIRM_TIMEOUT = 5.0
"""Seconds to wait for a worker's word that a cancelled request stopped."""

_NOTE_AFTER = 0.25
"""Seconds in the queue after which a request is noted in the journal."""


class Exchange:
    """Owned by the task that handles the HTTP request."""

    def __init__(
        self,
        config: IngressConfig,
        broker: base.Broker,
        request: Request,
        stream: replies.Stream,
        relay: Relay,
        served: Callable[[str], bool],
    ) -> None:
        self._config = config
        self._broker = broker
        self._request = request
        self._stream = stream
        self._relay = relay
        self._served = served  # whether a worker takes requests for a model now
        self._ack: asyncio.Future[base.Stored] | None = None
        self._published_at = 0.0
        self._quiet_since = 0.0
        self._note_at = 0.0
        self._republished = False
        self._taken = False
        self._absence = resume.Absence(broker)

    async def publish(self) -> None:
        """Put the request into the queue; its acknowledgement is awaited beside the first frame.

        A connection that moves to another node is waited for. Raises errors.Unavailable, errors.TooLarge.
        """
        self._published_at = time.monotonic()
        self._note_at = self._published_at + _NOTE_AFTER
        while True:
            try:
                self._ack = await self._publish()
                break
            except errors.Unavailable:
                if not self._may_publish_again():
                    raise
            await asyncio.sleep(_STORE_AGAIN)
        self._ack.add_done_callback(self._on_ack)

    def accepted(self, stored: base.Stored) -> None:
        """The request is in the queue, and noted, already: what there is to do is to follow it."""
        self._published_at = time.monotonic()
        self._note_at = self._published_at + replies.NOTE_AGAIN
        self._ack = asyncio.get_running_loop().create_future()
        self._ack.set_result(stored)

    def _may_publish_again(self) -> bool:
        return time.monotonic() - self._published_at + _STORE_AGAIN < self._config.publish_timeout

    async def _publish(self) -> asyncio.Future[base.Stored]:
        request = self._request
        return await self._broker.enqueue(str(request.subject), request.body, request.headers())

    def _on_ack(self, ack: asyncio.Future[base.Stored]) -> None:
        metrics.PUBLISH.observe(time.monotonic() - self._published_at)
        if ack.cancelled() or ack.exception() is not None or ack.result().duplicate:
            self._stream.wake()

    @property
    def cancellable(self) -> bool:
        """False when the queue refused the request, or holds another one under its id."""
        ack = self._ack
        if ack is None or not ack.done():
            return ack is not None
        if ack.cancelled() or isinstance(ack.exception(), errors.Unconfirmed):
            return True
        return not (ack.exception() or ack.result().duplicate)

    async def follow(self, receive: Receive) -> errors.HeadraceError | None:
        """Relay frames until the answer is complete. Returns the fault that ended it, if one did.

        Raises errors.FramesLost, errors.Unavailable when the reply can't be read to its end,
        errors.ReaderTooSlow when too much has come while its client took what there was.
        """
        gone = asyncio.create_task(disconnected(receive))
        gone.add_done_callback(lambda _: self._stream.wake())
        self._quiet_since = time.monotonic()
        try:
            while True:
                # A broker that has not said yes may be one that says nothing: its journal can't be asked.
                accepted = self._ack is not None and self._ack.done()
                patience, noting = self._patience(), self._note_left(accepted)
                frames = await self._stream.next(
                    min(patience, noting), ask_journal=accepted and patience <= noting
                )
                if gone.done():
                    return self.too_slow() if self._relay.cut() else errors.Cancelled("the client went away")
                if frames:
                    self._observe_transit(frames)
                    self._taken = self._taken or _from_worker(frames)
                    self._quiet_since = time.monotonic()
                    self._absence.heard()
                    overflows = self._stream.overflows
                    if await self._relay.frames(frames):
                        return self._relay.fault
                    if self._stream.overflows > overflows:
                        raise self.too_slow()
                    continue
                fault = self._overdue()
                if isinstance(fault, errors.Unavailable) and await self._published_again(fault):
                    continue
                if fault is not None:
                    await self._relay.fail(fault)
                    return fault
                if accepted and self._note_left(accepted) <= 0:
                    await self._note()
                if time.monotonic() - self._quiet_since >= self._config.keepalive:
                    self._quiet_since = time.monotonic()
                    if (lost := await self._left()) is not None:
                        raise lost
                    base_model, _, _, model = self._request.subject
                    served = self._served(model) or self._served(base_model)
                    await self._relay.keepalive("" if served else model)
        except errors.MalformedMessage as exc:
            raise errors.FramesLost(f"the reply holds what is no frame: {exc.message}") from exc
        finally:
            gone.cancel()

    async def _left(self) -> errors.FramesLost | None:
        """Why nobody will go on with the reply; None while somebody may, or nobody can tell."""
        ack = self._ack
        if not self._taken or ack is None or not ack.done() or ack.cancelled() or ack.exception():
            return None
        try:
            return await self._absence.fault(ack.result().seq)
        except errors.Unavailable:
            return None

    def too_slow(self) -> errors.ReaderTooSlow:
        return errors.ReaderTooSlow(
            "the answer comes faster than you read it, and goes on without you: "
            + read_on(self._request.request_id)
        )

    async def leave(self) -> errors.HeadraceError:
        """What to tell a caller whom this ingress can't serve to the end, since it stops.

        errors.IngressStopped: the request goes on, and can be read on by its id from now.
        """
        if not self.cancellable:
            return errors.Unavailable("this ingress stopped before the request was queued")
        assert self._ack is not None
        if not self._taken:
            if not self._ack.done() or self._ack.cancelled() or self._ack.exception() is not None:
                return errors.Unconfirmed("this ingress stopped before the broker had taken the request")
            with contextlib.suppress(errors.Unavailable):
                await self._note()
        return stopped(self._request.request_id)

    async def _published_again(self, fault: errors.Unavailable) -> bool:
        """Offer the request once more where it is sure that nobody has it: its stream elects a leader."""
        if isinstance(fault, errors.Unconfirmed) or not self._may_publish_again():
            return False
        await asyncio.sleep(_STORE_AGAIN)
        try:
            self._ack = await self._publish()
        except errors.Unavailable:
            return False
        self._ack.add_done_callback(self._on_ack)
        return True

    def _observe_transit(self, frames: list[Frame]) -> None:
        now_ms = self._broker.now_ms()
        for frame in frames:
            at = frame.extra.get("at")
            if frame.kind is not FrameKind.BEAT and isinstance(at, (int, float)):
                metrics.FRAME.observe(max(0.0, now_ms - at) / 1000)

    def _patience(self) -> float:
        """Seconds until something is due: a keep-alive, the deadline, the broker's acknowledgement."""
        now = time.monotonic()
        left = min(
            (self._request.deadline_ms - self._broker.now_ms()) / 1000,
            self._quiet_since + self._config.keepalive - now,
        )
        if self._ack is not None and not self._ack.done():
            left = min(left, self._published_at + self._config.publish_timeout - now)
        return max(0.0, left)

    def _note_left(self, accepted: bool) -> float:
        """Seconds until the request has waited for long enough to be noted in the journal (again)."""
        if self._taken:
            return math.inf
        left = self._note_at - time.monotonic()
        return math.inf if left <= 0 and not accepted else max(0.0, left)

    async def _note(self) -> None:
        assert self._ack is not None
        self._note_at = time.monotonic() + replies.NOTE_AGAIN
        await replies.note_queued(self._broker, self._request.reply_to, self._ack.result().seq)

    def _overdue(self) -> errors.HeadraceError | None:
        """Why to give up now, if so. Called when no frame came within the patience."""
        assert self._ack is not None
        if self._ack.done():
            if self._ack.cancelled():
                return errors.Unavailable("the broker connection broke before it accepted the request")
            exc = self._ack.exception()
            if exc is not None and not self._taken:
                return exc if isinstance(exc, errors.HeadraceError) else errors.Unavailable(str(exc))
            if exc is None and self._ack.result().duplicate:
                return errors.DuplicateRequest(
                    f"request id {self._request.request_id!r} was used within the dedup window"
                )
        elif not self._taken and time.monotonic() - self._published_at >= self._config.publish_timeout:
            return errors.Unavailable("the broker did not accept the request in time")
        if self._broker.now_ms() >= self._request.deadline_ms:
            return errors.DeadlineExceeded("the request's deadline passed")
        return None

    async def cancel(self, fault: errors.HeadraceError) -> None:
        """Stop the request wherever it is, and see to it that its usage event is written once.

        The worker that runs it is told, again and again, since it may be reconnecting; a queued message
        is deleted by its sequence, so that it never runs. A worker that had it confirms with its
        terminal frame; where none does in time the message goes all the same, and nobody runs it anew.
        """
        started = time.monotonic()
        try:
            deleted = await self._stop_until(started + _CONFIRM_TIMEOUT)
            if self._stream.finished or deleted:
                metrics.CANCEL.observe(time.monotonic() - started)
            if deleted and not self._stream.finished:
                await usage.unrun(self._broker, self._request, fault, deleted)
        except errors.DuplicateRequest:
            return  # under its id lies another's request, or none: ours was never accepted, or has ended
        except (errors.Unavailable, errors.FramesLost) as exc:
            _log.warning(
                "a cancel may not have arrived: %s",
                exc.message,
                extra={"request_id": self._request.request_id},
            )

    async def _stop_until(self, end: float) -> int | None:
        """The sequence of the message if it was deleted, else None; returns when the reply has ended,
        when nobody had the request, or at monotonic time `end`.

        Nobody is told to stop before it is known that the request is ours: what lies in the queue may be
        its client's second try, at another ingress. Raises errors.DuplicateRequest when it is.
        """
        # Without the sequence: deleting the queued message is ours, not the scheduler's.
        body = orjson.dumps({"at": self._broker.now_ms()})
        seq: int | None = None
        deleted = False
        while not self._stream.finished:
            if seq is None:
                seq = await self._sequence()
            if seq is not None or self._taken:
                await self._broker.publish(f"cancel.{self._request.key}", body)
            over = time.monotonic() >= end
            if seq is not None and (over or not self._taken):
                deleted = await self._broker.delete(subjects.REQUESTS, seq) or deleted
                self._taken = _from_worker(await self._stream.next(_WORKER_FIRST)) or self._taken
                if deleted and (over or not self._taken):
                    await bodies.discard(self._broker, self._request)
                    return seq
            if over:
                break
            self._taken = _from_worker(await self._stream.next(_REPEAT)) or self._taken
        return None

    async def _sequence(self) -> int | None:
        """Where the request lies in the queue; None if it was never accepted, or if nobody can tell."""
        if self._ack is None:
            return None
        try:
            stored = await asyncio.wait_for(asyncio.shield(self._ack), self._config.publish_timeout)
        except (errors.Unconfirmed, TimeoutError):
            # The same message again, under the same id, tells. If it is news, it is deleted as such.
            with contextlib.suppress(errors.Unavailable):
                self._ack = await self._publish()
                self._republished = True
            return None
        except (errors.HeadraceError, asyncio.CancelledError):
            return None
        if stored.duplicate and not (self._republished and await self._is_ours(stored.seq)):
            raise errors.DuplicateRequest("another request has the id")
        return stored.seq

    async def _is_ours(self, seq: int) -> bool:
        record = await self._broker.record(subjects.REQUESTS, seq)
        return record is not None and (record.headers or {}).get(subjects.REPLY_TO) == self._request.reply_to


def read_on(request_id: str) -> str:
    """What a caller is told whose answer goes on."""
    return f"read on with GET {resume.PATH.format(id=request_id)} and the last event's id as Last-Event-ID"


def stopped(request_id: str) -> errors.IngressStopped:
    return errors.IngressStopped(
        f"this ingress stops, and the answer goes on: at another ingress {read_on(request_id)}"
    )


def _from_worker(frames: list[Frame]) -> bool:
    return any(frame.epoch != QUEUED_EPOCH for frame in frames)
