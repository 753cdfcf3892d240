"""Adapters' files on a worker's disk: bounded, whole or not there, the least recently used ones out first.

    <root>/<n>/.lock          held by the worker that has directory n
    <root>/<n>/part-…         being written; removed at the next start
    <root>/<n>/<key>/         the files of one version

Each worker of a machine takes a directory that no other has, and finds in it what an earlier one left.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Mapping
from pathlib import Path

_PART = "part-"


class Full(Exception):
    """There is no room, and nothing that may go for it."""


class Disk:
    """One worker's directory. Owned by its event loop.

    Attributes:
        limit: bytes that all of it may take, with what is being written.
        used: bytes that it takes.
        on_gone: called with each key that had to make room for another.
    """

    def __init__(self, root: Path, limit: int) -> None:
        """Take a directory below `root`. Raises OSError."""
        self.limit = limit
        self.used = 0
        self.on_gone: Callable[[str], None] = lambda key: None
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._coming = 0  # bytes of what is being written
        self._lock, self._directory = _taken(root.absolute())
        self._scan()

    def _scan(self) -> None:
        found: list[tuple[float, str, int]] = []
        for path in self._directory.iterdir():
            if path.name.startswith(_PART):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append((path.stat().st_mtime, path.name, size))
        for _, key, size in sorted(found):
            self._sizes[key] = size
            self.used += size

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    def path(self, key: str) -> Path:
        """Where the files of `key`, which is there, lie. It counts as used now."""
        self._sizes.move_to_end(key)
        path = self._directory / key
        os.utime(path)
        return path

    async def add(
        self,
        key: str,
        size: int,
        fill: Callable[[Path], Awaitable[None]],
        kept: Container[str],
    ) -> None:
        """Have `fill` write `size` bytes into a directory, which is then `key`'s. Without room others go for
        it, but none of `kept`.

        Raises Full, OSError, and what `fill` raises; then `key` is not there.
        """
        self._make_room(size, kept)
        part = self._directory / f"{_PART}{uuid.uuid4().hex}"
        self._coming += size
        try:
            part.mkdir()
            await fill(part)
            self.remove(key)
            part.rename(self._directory / key)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            self._coming -= size
        self._sizes[key] = size
        self.used += size

    def remove(self, key: str) -> None:
        """Its files go, if they are there; who removed them before us does no harm."""
        if key in self._sizes:
            self.used -= self._sizes.pop(key)
            # Out of sight in one step: what half-goes with a crash must not be found again.
            part = self._directory / f"{_PART}{uuid.uuid4().hex}"
            with contextlib.suppress(FileNotFoundError):
                (self._directory / key).rename(part)
            shutil.rmtree(part, ignore_errors=True)

    def close(self) -> None:
        """Give the directory up; what is in it stays. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _make_room(self, size: int, kept: Container[str]) -> None:
        room = self.limit - self._coming - size
        spare = [key for key in self._sizes if key not in kept]
        if self.used - sum(self._sizes[key] for key in spare) > room:
            raise Full(f"{size:,} bytes do not fit into the {self.limit:,} of {self._directory}")
        while self.used > room:
            key = spare.pop(0)
            self.remove(key)
            self.on_gone(key)


def _taken(root: Path) -> tuple[int, Path]:
    """The first numbered directory that nobody has: an open file whose lock says so, and its path."""
    for number in itertools.count():
        directory = root / str(number)
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return lock, directory
    raise AssertionError  # the numbers never end


async def verify(
    directory: Path, files: Mapping[str, tuple[int, str]], digest: Callable[[bytes], str]
) -> bool:
    """Whether `directory` holds just these files, by name their size and digest."""

    def same() -> bool:
        try:
            found = {path.name: path for path in directory.iterdir()}
            return found.keys() == files.keys() and all(
                found[name].stat().st_size == size and digest(found[name].read_bytes()) == sha
                for name, (size, sha) in files.items()
            )
        except OSError:
            return False

    return await asyncio.to_thread(same)
