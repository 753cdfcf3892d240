"""Reply frames to bytes and back: `<one-line JSON meta>\\n<payload>`."""

from __future__ import annotations

import orjson

from broker import errors
from broker.messages import Frame, FrameKind


def encode(frame: Frame) -> bytes:
    """Fields that hold their default stay out of the meta line."""
    meta: dict[str, object] = {"epoch": frame.epoch, "seq": frame.seq, "kind": frame.kind, "off": frame.off}
    if frame.ids:
        meta["ids"] = frame.ids
    if frame.choices:
        meta["choices"] = frame.choices
    if frame.extra:
        meta.update(frame.extra)
    return orjson.dumps(meta) + b"\n" + frame.payload


_KINDS = {str(kind): kind for kind in FrameKind}


def decode(data: bytes) -> Frame:
    """Raises errors.MalformedMessage when `data` is no frame; unknown meta keys land in `extra`."""
    line, newline, payload = data.partition(b"\n")
    try:
        meta = orjson.loads(line)
        take = meta.pop
        epoch, seq, kind, off = take("epoch"), take("seq"), _KINDS[take("kind")], take("off", 0)
        ids, choices = take("ids", None), take("choices", None)
        if not (newline and type(epoch) is type(seq) is type(off) is int):
            raise ValueError("epoch, seq and off must be integers on a line of their own")
        if type(ids or []) is not list or type(choices or []) is not list:
            raise ValueError("ids and choices must be lists")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise errors.MalformedMessage(f"not a reply frame: {exc!r}") from exc
    return Frame(epoch, seq, kind, off, ids or [], choices or [], payload, meta)
