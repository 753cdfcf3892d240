"""What is looked at before a request may run: is it one, is it ours, is it still wanted, is it new."""

from __future__ import annotations

import time
from collections import OrderedDict

import orjson

from broker import base, codec, errors, replies, subjects, usage
from broker.messages import TERMINAL, FrameKind, Request, UsageEvent
from workers import metrics
from workers.engines.base import Engine

_CLOCKS_APART = 60_000
"""Milliseconds that a worker's clock and the broker's may differ."""

ANSWERED = errors.DuplicateRequest("the request was answered before; only its ack was lost")
"""A verdict of its own: nothing is left to do but what its worker may not have come to, see `settle`."""


class Tombstones:
    """Requests cancelled before they came, by key. Bounded: past `limit` the oldest is forgotten,
    and if it was still queued it runs unread until its deadline."""

    def __init__(self, limit: int = 100_000) -> None:
        self._limit = limit
        self._keys: OrderedDict[str, float] = OrderedDict()

    def add(self, key: str) -> None:
        self._keys[key] = time.time() * 1000
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def pop(self, key: str, enqueued_ms: float) -> bool:
        """Whether the request `key`, queued at that unix time, was cancelled; it is forgotten with that.

        A cancel well before the request was meant for an earlier one of the same id.
        """
        at = self._keys.pop(key, None)
        return at is not None and at >= enqueued_ms - _CLOCKS_APART


def cancelled_at(message: base.Message) -> int:
    """Unix time in ms at which the caller says it went away; now, when it doesn't say."""
    try:
        return int(orjson.loads(message.data)["at"])
    except (ValueError, KeyError, TypeError):
        return replies.now_ms()


async def screen(
    request: Request, delivery: base.Delivery, engine: Engine, broker: base.Broker
) -> errors.HeadraceError | None:
    """None when the request may run, else why not (`ANSWERED` when there is nobody to tell)."""
    if request.deadline_ms and request.deadline_ms <= time.time() * 1000:
        return errors.DeadlineExceeded("the request's deadline passed in the queue")
    cards = {card.id: card for card in engine.models}
    card = cards.get(request.subject.model)
    if card is None:
        return errors.UnknownModel(
            f"the workers of {request.subject.base!r} do not serve {request.subject.model!r}; "
            f"they serve {', '.join(sorted(cards))}"
        )
    if request.path not in card.paths:
        return errors.InvalidRequest(
            f"model {card.id!r} does not serve {request.path}; it serves {', '.join(card.paths)}"
        )
    return await _earlier_attempt(request, delivery, broker) if delivery.attempt > 1 else None


async def _earlier_attempt(
    request: Request, delivery: base.Delivery, broker: base.Broker
) -> errors.HeadraceError | None:
    """A redelivered request runs again only if no output of an earlier attempt reached its caller."""
    try:
        frame = await replies.last_frame(broker, request.reply_to, delivery.enqueued_ms)
    except errors.MalformedMessage as exc:
        return exc  # someone else wrote there: who reads it can't tell what is ours
    if frame is None or frame.kind is FrameKind.BEAT:
        return None
    if frame.kind in TERMINAL:
        return ANSWERED
    return errors.WorkerLost("the worker was lost while it was answering; send the request again")


async def settle(broker: base.Broker, request: Request, delivery: base.Delivery) -> None:
    """Tell of the usage of a request that was ANSWERED, from its frames, and ack it.

    Its worker may have gone between the last frame and the usage event; where it had not, the two
    events are one to the stream.
    """
    try:
        event = await _answered(broker, request, delivery)
    except (errors.MalformedMessage, ValueError, TypeError, AttributeError):
        event = None  # someone else wrote there: what they say is no usage
    if event is not None:
        await usage.publish(broker, event, delivery.seq)
    await delivery.ack()


async def _answered(broker: base.Broker, request: Request, delivery: base.Delivery) -> UsageEvent | None:
    """None where the journal holds no `end`: an `error` comes without figures."""
    records = await broker.read(subjects.REPLIES, request.reply_to, limit=1_000_000)
    frames = [codec.decode(record.data) for record in records if record.stored_ms >= delivery.enqueued_ms]
    end = next((frame for frame in frames if frame.kind is FrameKind.END), None)
    if end is None:
        return None
    heads = [f for f in frames if f.kind is FrameKind.HEAD and f.epoch == end.epoch]
    told = heads[0].extra if heads else {}
    figures = end.extra.get("usage", {})
    return usage.event(
        request,
        None,
        told.get("worker", ""),
        status=told.get("status", 200),
        epoch=end.epoch,
        **{name: figures.get(name, 0) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")},
    )


async def repeated(broker: base.Broker, request: Request, delivery: base.Delivery, running: Request) -> None:
    """Answer a second message under the id of one that runs: one answer goes to both, or it is refused."""
    if request.reply_to != running.reply_to:
        fault = errors.DuplicateRequest(f"request id {request.request_id!r} is running: choose another")
        await replies.Writer(broker, request.reply_to, delivery.attempt).error(fault)
    await delivery.ack()


async def reject(broker: base.Broker, delivery: base.Delivery, exc: errors.MalformedMessage) -> None:
    """Take what is no request out of the queue, telling whoever can be told."""
    await replies.dead_letter(
        broker, delivery.subject, delivery.headers, delivery.data, exc, epoch=delivery.attempt
    )
    await delivery.ack()
    metrics.DEAD.inc()
