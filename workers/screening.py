"""What is looked at before a request may run: is it one, is it ours, is it still wanted, is it new."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from typing import Any

import orjson

from broker import base, bodies, errors, letters, replies, usage
from broker.assembler import Assembler
from broker.messages import Attempt, FrameKind, Request, UsageEvent
from workers import metrics
from workers.engines.base import Engine

_AT = (b"@", b"\\u0040")
"""How JSON may write what every adapter version's name holds."""

_CLOCKS_APART = 60_000
"""Milliseconds that a worker may be wrong about the broker's clock, for a while: it was set, say."""


class Tombstones:
    """Requests cancelled before they came, by key. Bounded: past `limit` the oldest is forgotten,
    and if it was still queued it runs unread until its deadline."""

    def __init__(self, limit: int = 100_000) -> None:
        self._limit = limit
        self._keys: OrderedDict[str, float] = OrderedDict()

    def add(self, key: str, now_ms: float) -> None:
        self._keys[key] = now_ms
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def has(self, key: str, enqueued_ms: float) -> bool:
        """As `pop`, but it is remembered."""
        at = self._keys.get(key)
        return at is not None and at >= enqueued_ms - _CLOCKS_APART

    def pop(self, key: str, enqueued_ms: float) -> bool:
        """Whether the request `key`, queued at that unix time, was cancelled; it is forgotten with that.

        A cancel well before the request was meant for an earlier one of the same id.
        """
        cancelled = self.has(key, enqueued_ms)
        self._keys.pop(key, None)
        return cancelled


class Takes:
    """Attempts that workers told of lately, by request. What comes here after that for an earlier one lay in
    our socket. Bounded: past `limit` the oldest is forgotten."""

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._newest: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def note(self, key: str, attempt: int, now_ms: float) -> None:
        self._newest[key] = attempt, now_ms
        self._newest.move_to_end(key)
        if len(self._newest) > self._limit:
            self._newest.popitem(last=False)

    def later(self, key: str, attempt: int, enqueued_ms: float) -> bool:
        """Whether the request, queued at that unix time, was taken as a later attempt than this.

        What was told before it was queued was of an earlier one of the same id.
        """
        newest, at = self._newest.get(key, (0, 0.0))
        return newest > attempt and at >= enqueued_ms


def cancelled_at(message: base.Message, now_ms: float) -> float:
    """Unix time in ms at which the caller says it went away; now, when it doesn't say."""
    try:
        return int(orjson.loads(message.data)["at"])
    except (ValueError, KeyError, TypeError):
        return now_ms


def screen(
    request: Request, engine: Engine, now_ms: float, adapter: bool = False
) -> errors.HeadraceError | None:
    """None when the request may run, else why not. `adapter`: it asks for an adapter of the engine's base."""
    if request.late(now_ms):
        return errors.DeadlineExceeded("the request's deadline passed in the queue")
    cards = {card.id: card for card in engine.models}
    card = engine.models[0] if adapter else cards.get(request.subject.model)
    if card is None:
        adapters = ", and its adapters' versions, <name>@<version>" if engine.adapter_slots else ""
        if not engine.adapter_slots and "@" in request.subject.model:
            adapters = (
                f"; adapters need adapter_slots, in the section [{engine.name}] of the workers' settings"
            )
        return errors.UnknownModel(
            f"the workers of {request.subject.base!r} do not serve {request.subject.model!r}; "
            f"they serve {', '.join(sorted(cards))}{adapters}"
        )
    if request.path not in card.paths:
        return errors.InvalidRequest(
            f"{request.subject.model!r} does not serve {request.path}; it serves {', '.join(card.paths)}"
        )
    return None


def named(request: Request, engine: Engine) -> Request:
    """`request` with the subject's model in its body, which alone says who answers: the caller named another,
    or an adapter's bare name. A body in which no adapter's version can stand is not parsed."""
    model = request.subject.model
    adapters = engine.adapter_slots and any(sign in request.body for sign in _AT)
    if not (adapters or request.asked or model != engine.base):
        return request
    body = _parsed(request.body)
    if not isinstance(body, dict) or body.get("model") == model:
        return request  # what is no JSON object is the engine's to refuse
    body["model"] = model
    return dataclasses.replace(request, body=_written(body))


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        # An engine may read what orjson does not: NaN, or a number of more than 64 bits.
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return None


def _written(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError:
        return json.dumps(body).encode()


async def settle(broker: base.Broker, request: Request, delivery: base.Delivery) -> None:
    """Tell of the usage of a request that was answered before, from its frames, and ack it.

    Its worker may have gone between the last frame and the usage event; where it had not, the two
    events are one to the stream.
    """
    try:
        event = await _answered(broker, request, delivery)
    except (errors.MalformedMessage, errors.FramesLost, ValueError, TypeError, AttributeError):
        event = None  # someone else wrote there: what they say is no usage
    if event is not None:
        await usage.publish(broker, event, delivery.seq)
    await delivery.ack()


async def _answered(broker: base.Broker, request: Request, delivery: base.Delivery) -> UsageEvent | None:
    """Of the end that its readers take; None where that is none. An `error` comes without figures."""
    frames = await replies.journal(broker, request.reply_to, delivery.enqueued_ms)
    assembler = Assembler()
    said = assembler.feed_all(frames)
    if not assembler.finished:
        return None
    end, figures = said[-1], said[-1].extra.get("usage", {})
    told = usage.event(
        request,
        None,
        next((f.extra["worker"] for f in frames if f.epoch == end.epoch and "worker" in f.extra), ""),
        broker.now_ms(),
        status=next((f.extra["status"] for f in said if f.kind is FrameKind.HEAD), 200),
        epoch=end.epoch,
        **{name: figures.get(name, 0) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")},
    )
    return told if end.kind is FrameKind.END else usage.failed(told, end.extra["status"], end.extra["code"])


async def bury(
    broker: base.Broker, delivery: base.Delivery, died: tuple[Attempt, ...]
) -> errors.HeadraceError:
    """Keep a request that its workers die of among the dead letters; returns what its caller is told."""
    fault = errors.Poisoned(
        f"{len(died)} workers or engines died under this request: it is kept among the dead letters and will "
        "not run again by itself"
    )
    await letters.bury(broker, delivery.subject, delivery.headers, delivery.data, fault, died, delivery.seq)
    metrics.DEAD.inc()
    return fault


async def repeated(broker: base.Broker, request: Request, delivery: base.Delivery, running: Request) -> None:
    """Answer a second message under the id of one that runs: one answer goes to both, or it is refused."""
    if request.reply_to != running.reply_to:
        fault = errors.DuplicateRequest(f"request id {request.request_id!r} is running: choose another")
        await replies.Writer(broker, request.reply_to, delivery.attempt, delivery.seq).error(fault)
    await delivery.ack()
    if request.body_object != running.body_object:
        await bodies.discard(broker, request)


async def reject(broker: base.Broker, delivery: base.Delivery, exc: errors.MalformedMessage) -> None:
    """Take what is no request out of the queue, telling whoever can be told."""
    await letters.dead_letter(
        broker,
        delivery.subject,
        delivery.headers,
        delivery.data,
        exc,
        epoch=delivery.attempt,
        seq=delivery.seq,
    )
    await delivery.ack()
    metrics.DEAD.inc()
