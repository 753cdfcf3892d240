"""Response headers that tell how a request was served: its wait, its first token against what was predicted,
and what of its prompt the worker had cached. Pure.
"""

from __future__ import annotations

from typing import Any

from broker.messages import Frame

_PARTS = ("queue", "ttft", "predicted")
"""Milliseconds: in the queue; to the first token, that included; the same as the dispatcher foresaw it."""


def headers(head: Frame | None) -> list[tuple[bytes, bytes]]:
    """`Server-Timing` and `X-Headrace-Prefix-Hit`, as the head frame tells; anyone may have written that."""
    told: Any = head.extra.get("timing") if head is not None else None
    if not isinstance(told, dict):
        return []
    numbers = {name: value for name, value in told.items() if isinstance(value, (int, float))}
    known = {name: value for name, value in numbers.items() if 0 <= value < 1e12}
    parts = ", ".join(f"{part};dur={known[part]:.1f}" for part in _PARTS if part in known)
    found = [(b"server-timing", parts.encode())] if parts else []
    if known.get("prompt") and "cached" in known:
        found.append((b"x-headrace-prefix-hit", b"%d/%d" % (known["cached"], known["prompt"])))
    return found
