"""Dead letters: messages that can't be run, or failed for good, kept in the DEAD stream."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping

from broker import base, bodies, errors, subjects
from broker.messages import Attempt, DeadLetter, parse_request
from broker.replies import Writer, now_ms

_log = logging.getLogger(__name__)


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
        failed_ms=now_ms(),
        history=history,
    )
    data = letter.model_dump_json().encode()
    if len(data) > broker.max_payload:
        # Base64 and the envelope can make a message that just fitted too large.
        data = (await _smaller(broker, letter, body)).model_dump_json().encode()
    once = {subjects.MSG_ID: subjects.letter_id(seq)} if seq else None
    await (await broker.enqueue(subjects.dead(exc.code), data, once))
    _log.warning("a message went to the dead letters: %s", exc.message, extra={"code": exc.code})


async def _smaller(broker: base.Broker, letter: DeadLetter, body: bytes) -> DeadLetter:
    """`letter` with its body in the store of large bodies, where a replay finds it. What is no request could
    not be replayed: its body is left out."""
    left_out = f"{letter.message} (headers and body, {len(body)} bytes, were too large to keep"
    try:
        stowed = await bodies.put_away(broker, parse_request(letter.subject, letter.headers, body))
    except errors.MalformedMessage:
        return letter.model_copy(update={"headers": {}, "body": "", "message": f"{left_out})"})
    except errors.Overloaded as exc:
        message = f"{left_out}; {exc.message})"
        return letter.model_copy(update={"headers": {}, "body": "", "message": message})
    return letter.model_copy(
        update={"headers": letter.headers | {subjects.BODY_OBJECT: stowed.body_object}, "body": ""}
    )
