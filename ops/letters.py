"""Dead letters, for `headrace dead`: read, told in words, turned back into requests. No I/O."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import orjson

from broker import base, errors, subjects
from broker.messages import DeadLetter, parse_request
from ops.errors import NotReplayable

_COLUMN = 40
"""Characters of a cell in a table; the last column has no bound."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One message of DEAD. `content` is None where somebody else wrote there, and it is no letter."""

    record: base.Record
    content: DeadLetter | None

    @classmethod
    def read(cls, record: base.Record) -> Letter:
        try:
            return cls(record, DeadLetter.model_validate_json(record.data))
        except ValueError:
            return cls(record, None)

    @property
    def seq(self) -> int:
        return self.record.seq

    @property
    def body(self) -> bytes:
        """Raises ValueError where it is no base64."""
        if self.content is None:
            return self.record.data
        return base64.b64decode(self.content.body, validate=True)


class Row(NamedTuple):
    """A letter as `list` shows it; "" is what can't be told."""

    seq: int
    when: str
    reason: str
    tenant: str
    model: str
    request: str
    message: str


class Replay(NamedTuple):
    """What goes back into REQUESTS."""

    subject: str
    body: bytes
    headers: dict[str, str]


def revived(letter: Letter) -> Replay:
    """The request of a letter as the queue shall have it: a new message id, since the old one may still be
    known there, and no deadline, since that is over. Raises NotReplayable."""
    content = letter.content
    if content is None:
        raise NotReplayable("it is no dead letter of Headrace's")
    if not (content.headers or content.body):
        raise NotReplayable(f"its headers and body were not kept: {content.message}")
    headers = {
        name: value
        for name, value in content.headers.items()
        if name != subjects.DEADLINE and not name.startswith(subjects.RESERVED)
    }
    try:
        tenant = subjects.parse_request(content.subject).tenant
        headers[subjects.MSG_ID] = subjects.replay_id(tenant, letter.seq, letter.record.stored_ms)
        request = parse_request(content.subject, headers, letter.body)
    except (errors.MalformedMessage, ValueError) as exc:
        raise NotReplayable(f"it would die again: {exc}") from exc
    return Replay(str(request.subject), request.body, headers)


def summary(letter: Letter) -> Row:
    content = letter.content
    reason = letter.record.subject.partition(".")[2]
    if content is None:
        told = f"no letter: {letter.record.data[:60]!r}"
        return Row(letter.seq, when(letter.record.stored_ms), plain(reason), "", "", "", told)
    tenant = model = ""
    with contextlib.suppress(ValueError):  # it may have died of that
        _, _, tenant, model = subjects.parse_request(content.subject)
    names = (content.reason, tenant, model, _request_id(content), content.message)
    return Row(letter.seq, when(content.failed_ms), *map(plain, names))


def _request_id(content: DeadLetter) -> str:
    reply_to = content.headers.get(subjects.REPLY_TO, "")
    token = content.headers.get(subjects.REQUEST_ID, "")
    if subjects.is_reply(reply_to):
        token = reply_to.rpartition(".")[2]
    try:
        return subjects.name(token)
    except ValueError:
        return token


def describe(letter: Letter, with_body: bool) -> str:
    """All that a letter holds; the body where it is asked for."""
    content = letter.content
    facts = list(summary(letter)._asdict().items())
    parts = [_body(letter, with_body)]
    if content is not None:
        facts.append(("subject", plain(content.subject)))
        if content.history:
            tries = [(a.epoch, plain(a.worker), when(a.at_ms), plain(a.what)) for a in content.history]
            parts.insert(0, table(("EPOCH", "WORKER", "WHEN", "WHAT"), tries))
        headers = [(plain(name), plain(value)) for name, value in content.headers.items()]
        parts.insert(0, table(("HEADER", "VALUE"), headers))
    return "\n\n".join([table((), facts), *parts])


def _body(letter: Letter, whole: bool) -> str:
    try:
        body = letter.body
    except ValueError:
        return "the body is no base64"
    if (
        not body
        and letter.content is not None
        and (stored := letter.content.headers.get(subjects.BODY_OBJECT))
    ):
        return f"the body is the object {plain(stored)} of bucket {subjects.PAYLOADS}"
    if not whole:
        return f"body of {len(body)} bytes; --body shows it"
    try:
        text = orjson.dumps(orjson.loads(body), option=orjson.OPT_INDENT_2).decode()
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # the latter: nested too deep
        text = body.decode("utf-8", "backslashreplace")
    return "\n".join(map(plain, text.split("\n")))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as what is in them, up to `_COLUMN`; `-` where nothing is."""
    lines = [[str(cell) or "-" for cell in row] for row in ([head] if head else []) + list(rows)]
    lines = [[*(_cut(cell) for cell in line[:-1]), line[-1]] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cut(cell: str) -> str:
    return cell if len(cell) <= _COLUMN else cell[: _COLUMN - 1] + "…"


def plain(text: str) -> str:
    """What others wrote, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def when(unix_ms: float) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000).astimezone().isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return ""  # no time of this world
