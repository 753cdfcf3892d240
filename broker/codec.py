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


_OWN = frozenset({"epoch", "seq", "kind", "off", "ids", "choices"})


def decode(data: bytes) -> Frame:
    """Raises errors.MalformedMessage when `data` is no frame; unknown meta keys land in `extra`."""
    line, newline, payload = data.partition(b"\n")
    try:
        meta = orjson.loads(line)
        frame = Frame(
            epoch=meta["epoch"],
            seq=meta["seq"],
            kind=FrameKind(meta["kind"]),
            off=meta.get("off", 0),
            ids=meta.get("ids") or [],
            choices=meta.get("choices") or [],
            payload=payload,
        )
        if not (newline and type(frame.epoch) is int and type(frame.seq) is int):
            raise ValueError("epoch and seq must be integers on a line of their own")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise errors.MalformedMessage(f"not a reply frame: {exc!r}") from exc
    if len(meta) > 4:
        frame.extra = {key: value for key, value in meta.items() if key not in _OWN}
    return frame
