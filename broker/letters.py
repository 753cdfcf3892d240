"""Dead letters: messages that can't be run, or failed for good, kept in the DEAD stream."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping

from broker import base, bodies, errors, subjects
from broker.messages import Attempt, DeadLetter, Request, parse_request
from broker.replies import Writer

_log = logging.getLogger(__name__)

_HEADER_ROOM = 128
"""Bytes of a letter's message kept free for its own headers."""


async def dead_letter(
    broker: base.Broker,
    subject: str,
    headers: Mapping[str, str] | None,
    body: bytes,
    exc: errors.HeadraceError,
    epoch: int = 0,
    history: tuple[Attempt, ...] = (),
    seq: int = 0,
) -> None:
    """Keep a message that can't be run in DEAD, and answer it with an `error` frame if it says where.

    `seq`: its place in REQUESTS, under which it is kept once.
    """
    reply_to = (headers or {}).get(subjects.REPLY_TO, "")
    if subjects.may_answer(subject, reply_to):
        await Writer(broker, reply_to, epoch).error(exc)
    await bury(broker, subject, headers, body, exc, history, seq)


async def bury(
    broker: base.Broker,
    subject: str,
    headers: Mapping[str, str] | None,
    body: bytes,
    exc: errors.HeadraceError,
    history: tuple[Attempt, ...] = (),
    seq: int = 0,
) -> None:
    """Keep a message that failed for good in DEAD, that of a `seq` in REQUESTS once. Whoever asked is told
    elsewhere."""
    letter = DeadLetter(
        reason=exc.code,
        message=exc.message,
        subject=subject.encode("utf-8", "backslashreplace").decode(),
        headers=dict(headers or {}),
        body=base64.b64encode(body).decode(),
        failed_ms=int(broker.now_ms()),
        history=history,
    )
    data, stowed = letter.model_dump_json().encode(), None
    if not _fits(broker, data):  # base64 and the envelope can make a message that just fitted too large
        letter, stowed = await _smaller(broker, letter, body)
        data = letter.model_dump_json().encode()
    once = {subjects.MSG_ID: subjects.letter_id(seq)} if seq else None
    try:
        kept = await (await broker.enqueue(subjects.dead(exc.code), data, once))
    except (errors.Overloaded, errors.TooLarge):
        if stowed is not None:
            await bodies.discard(broker, stowed)
        raise
    if kept.duplicate and stowed is not None:
        await bodies.discard(broker, stowed)  # the first letter has one of its own
    _log.warning("a message went to the dead letters: %s", exc.message, extra={"code": exc.code})


def _fits(broker: base.Broker, letter: bytes) -> bool:
    return len(letter) + _HEADER_ROOM <= broker.max_payload


async def _smaller(broker: base.Broker, letter: DeadLetter, body: bytes) -> tuple[DeadLetter, Request | None]:
    """`letter` as it fits, and the request whose body the store of large bodies has for it now. What can't be
    replayed anyway, and what is too large by its headers, is told of without headers and body."""
    left_out = f"{letter.message} (headers and body, {len(body)} bytes, were too large to keep"
    bare = letter.model_copy(update={"headers": {}, "body": "", "message": f"{left_out})"})
    try:
        request = parse_request(letter.subject, letter.headers, body)
    except errors.MalformedMessage:
        return bare, None
    # As long as any name in the store.
    named = letter.headers | {subjects.BODY_OBJECT: subjects.body_object(request.subject.tenant, "0" * 32)}
    without_body = letter.model_copy(update={"headers": named, "body": ""})
    if request.body_object or not _fits(broker, without_body.model_dump_json().encode()):
        return bare, None
    try:
        stowed = await bodies.put_away(broker, request)
    except errors.Overloaded as exc:
        return bare.model_copy(update={"message": f"{left_out}; {exc.message})"}), None
    named[subjects.BODY_OBJECT] = stowed.body_object
    return letter.model_copy(update={"headers": named, "body": ""}), stowed
