"""The directory of adapters' files: bounded, whole or not there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import artifacts
from workers.disk import Disk, Full, verify

pytestmark = pytest.mark.anyio


def filling(size: int) -> Callable[[Path], Awaitable[None]]:
    async def fill(into: Path) -> None:
        (into / "weights").write_bytes(b"x" * size)

    return fill


async def add(disk: Disk, key: str, size: int = 10, kept: set[str] | None = None) -> None:
    await disk.add(key, size, filling(size), kept or set())


def there(disk: Disk, keys: str) -> list[str]:
    return [key for key in keys if key in disk]


async def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    disk, gone = Disk(tmp_path, 30), list[str]()
    disk.on_gone = gone.append
    for key in "abc":
        await add(disk, key)
    assert (disk.path("a") / "weights").read_bytes() == b"x" * 10
    await add(disk, "d")
    assert there(disk, "abcd") == ["a", "c", "d"]
    assert gone == ["b"]
    assert disk.used == 30
    assert sorted(path.name for path in disk.path("a").parent.iterdir()) == [".lock", "a", "c", "d"]


async def test_what_is_kept_never_goes(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 30)
    for key in "abc":
        await add(disk, key)
    await add(disk, "d", kept={"a", "b"})
    assert there(disk, "abcd") == ["a", "b", "d"]
    with pytest.raises(Full):
        await add(disk, "e", 20, kept={"a", "b"})
    assert there(disk, "abde") == ["a", "b", "d"]  # nothing went in vain


async def test_what_is_half_written_is_not_there(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 100)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def fill(into: Path) -> None:
        (into / "weights").write_bytes(b"x")
        begun.set()
        await go_on.wait()
        raise ValueError("the store went away")

    task = asyncio.create_task(disk.add("a", 60, fill, set()))
    await begun.wait()
    assert "a" not in disk
    with pytest.raises(Full):  # its room is taken already
        await add(disk, "b", 60)
    go_on.set()
    with pytest.raises(ValueError, match="went away"):
        await task
    assert "a" not in disk
    assert [path.name for path in (tmp_path / "0").iterdir()] == [".lock"]
    await add(disk, "b", 60)


async def test_a_crash_leaves_whole_versions_only(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 100)
    await add(disk, "a")
    await add(disk, "b")
    (tmp_path / "0" / "part-ofc").mkdir()
    (tmp_path / "0" / "part-ofc" / "weights").write_bytes(b"half")
    disk.close()
    again = Disk(tmp_path, 15)
    assert there(again, "ab") == ["a", "b"]
    assert again.used == 20
    assert not (tmp_path / "0" / "part-ofc").exists()
    await add(again, "c", 5)  # the limit is another now
    assert there(again, "abc") == ["b", "c"]


async def test_each_worker_has_a_directory_of_its_own(tmp_path: Path) -> None:
    one, two = Disk(tmp_path, 100), Disk(tmp_path, 100)
    await add(one, "a")
    assert "a" not in two
    one.close()
    one.close()
    three = Disk(tmp_path, 100)
    assert "a" in three
    assert three.path("a") == tmp_path / "0" / "a"


async def test_damaged_files_are_found_out(tmp_path: Path) -> None:
    good = {"weights": (3, artifacts.digest(b"abc"))}
    (tmp_path / "weights").write_bytes(b"abc")
    assert await verify(tmp_path, good, artifacts.digest)
    (tmp_path / "weights").write_bytes(b"abd")
    assert not await verify(tmp_path, good, artifacts.digest)
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "more").write_bytes(b"")
    assert not await verify(tmp_path, good, artifacts.digest)
    assert not await verify(tmp_path / "no", good, artifacts.digest)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 60), st.sets(st.sampled_from("abcdef"))),
        max_size=25,
    )
)
@settings(max_examples=50)
def test_the_bound_holds_and_nothing_that_is_kept_goes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, set[str]]]
) -> None:
    async def run() -> None:
        disk = Disk(tmp_path_factory.mktemp("disk"), 100)
        for key, size, kept in steps:
            before = set(there(disk, "abcdef"))
            try:
                await add(disk, key, size, kept - {key})
            except Full:
                assert set(there(disk, "abcdef")) == before
            else:
                assert key in disk
            assert (before & kept) <= set(there(disk, "abcdef")) | {key}
            files = list(disk._directory.rglob("weights"))
            assert disk.used == sum(file.stat().st_size for file in files) <= 100
        disk.close()

    asyncio.run(run())
