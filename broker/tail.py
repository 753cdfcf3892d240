"""The reply frames that a process published lately, to publish them again where they may be lost.

A core publish is heard by who listens, and that's all: frames on a connection that breaks, and frames for
a journal that elects its leader, are gone. Readers drop what they have seen, so saying it twice is safe.
Pure: the clock is handed in.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache


class Tail:
    """Frames of the last `seconds`, at most `limit` bytes of them: past that the oldest go.

    Owned by the event loop of the connection that publishes them.
    """

    def __init__(self, seconds: float, limit: int) -> None:
        self._seconds = seconds
        self._limit = limit
        self._bytes = 0
        self._order: deque[tuple[float, str]] = deque()
        self._frames: dict[str, deque[tuple[str, bytes]]] = {}

    def add(self, subject: str, data: bytes, now: float) -> None:
        """Note a frame published under `out.<tenant>.<mailbox>.<request>`."""
        key = _key(subject)
        self._order.append((now, key))
        self._frames.setdefault(key, deque()).append((subject, data))
        self._bytes += len(data)
        self._trim(now)

    def keys(self, now: float) -> list[str]:
        """`<tenant>.<request>` of each reply in it."""
        self._trim(now)
        return list(self._frames)

    def of(self, key: str) -> list[tuple[str, bytes]]:
        """(subject, frame) of one reply, in order."""
        return list(self._frames.get(key, ()))

    def _trim(self, now: float) -> None:
        while self._order and (self._order[0][0] < now - self._seconds or self._bytes > self._limit):
            _, key = self._order.popleft()
            frames = self._frames[key]
            self._bytes -= len(frames.popleft()[1])
            if not frames:
                del self._frames[key]


@lru_cache(maxsize=4096)
def _key(subject: str) -> str:
    _, tenant, _, request = subject.split(".")
    return f"{tenant}.{request}"
