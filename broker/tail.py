"""The reply frames that a process published lately, to publish them again where they may be lost.

A core publish is heard by who listens, and that's all: frames on a connection that breaks, and frames for
a journal that elects its leader, are gone. Readers drop what they have seen, so saying it twice is safe.
Pure: the clock is handed in.
"""

from __future__ import annotations

from collections import deque


class Tail:
    """Frames of the last `seconds`, at most `limit` bytes of them: past that the oldest go.

    A frame is noted without a tuple or another object that Python's garbage collector looks after: kept by
    the ten thousands, those would set it off again and again.
    Owned by the event loop of the connection that publishes them.
    """

    def __init__(self, seconds: float, limit: int) -> None:
        self._seconds = seconds
        self._limit = limit
        self._bytes = 0
        self._times: deque[float] = deque()
        self._order: deque[str] = deque()  # the subject of each frame in `_times`
        self._frames: dict[str, deque[bytes]] = {}  # by subject
        self._subjects: dict[str, list[str]] = {}  # of each reply

    def add(self, subject: str, data: bytes, now: float) -> None:
        """Note a frame published under `out.<tenant>.<mailbox>.<request>`."""
        frames = self._frames.get(subject)
        if frames is None:
            frames = self._frames[subject] = deque()
            self._subjects.setdefault(_key(subject), []).append(subject)
        frames.append(data)
        self._times.append(now)
        self._order.append(subject)
        self._bytes += len(data)
        self._trim(now)

    def keys(self, now: float) -> list[str]:
        """`<tenant>.<request>` of each reply in it."""
        self._trim(now)
        return list(self._subjects)

    def of(self, key: str) -> list[tuple[str, bytes]]:
        """(subject, frame) of one reply, in order under each subject."""
        return [(subject, data) for subject in self._subjects.get(key, ()) for data in self._frames[subject]]

    def _trim(self, now: float) -> None:
        while self._times and (self._times[0] < now - self._seconds or self._bytes > self._limit):
            self._times.popleft()
            subject = self._order.popleft()
            frames = self._frames[subject]
            self._bytes -= len(frames.popleft())
            if not frames:
                self._forget(subject)

    def _forget(self, subject: str) -> None:
        del self._frames[subject]
        subjects = self._subjects[_key(subject)]
        subjects.remove(subject)
        if not subjects:
            del self._subjects[_key(subject)]


def _key(subject: str) -> str:
    _, tenant, _, request = subject.split(".")
    return f"{tenant}.{request}"
