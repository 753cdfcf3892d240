"""Workers that come and go by number, with children that end when they are let."""

from __future__ import annotations

import asyncio
from typing import cast

from ops.autoscale import Range, Workers
from ops.child import Child
from tests.waiting import until


class Still:
    """A child that does nothing, and drains until `let` is set."""

    def __init__(self, number: int) -> None:
        self.name = f"worker-{number}"
        self.settled = False
        self.let = asyncio.Event()
        self.kept = asyncio.Event()

    async def keep_alive(self) -> None:
        self.kept.set()

    async def stop(self, grace: float) -> None:
        await self.let.wait()


def names(workers: Workers) -> list[str]:
    return [child.name for child in workers.children]


async def test_the_newest_drain_and_their_numbers_come_again_once_they_have_ended() -> None:
    made = [Still(0)]
    gone: list[str] = []

    def make(number: int) -> Child:
        made.append(Still(number))
        return cast("Child", made[-1])

    async with asyncio.TaskGroup() as group:
        workers = Workers([cast("Child", made[0])], make, group, 1.0, gone.append)
        workers.resize(3)
        assert (names(workers), workers.count) == (["worker-0", "worker-1", "worker-2"], 3)
        assert all(child.settled for child in made[1:])
        for child in made[1:]:
            await child.kept.wait()

        workers.resize(1)
        assert workers.count == 1
        assert names(workers) == [
            "worker-0",
            "worker-1",
            "worker-2",
        ]  # two of them drain, and are stopped with `up`
        workers.resize(2)
        assert names(workers)[-1] == "worker-3"
        assert workers.count == 2
        made[2].let.set()
        await until(lambda: gone == ["worker-2"])
        workers.resize(3)
        assert names(workers) == ["worker-0", "worker-1", "worker-3", "worker-2"]
        made[1].let.set()
    assert gone == ["worker-2", "worker-1"]
    assert (names(workers), workers.count) == (["worker-0", "worker-3", "worker-2"], 3)


def test_a_number_outside_the_bounds_is_brought_within() -> None:
    assert [Range(2, 4).within(count) for count in (0, 2, 3, 9)] == [2, 2, 3, 4]
