"""`headrace adapters`: what a push comes to, over the in-memory broker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker import artifacts, entries, errors, subjects
from broker.entries import ModelEntry
from broker.memory import MemoryBroker
from broker.messages import Credit, Heartbeat, ModelCard
from ops import adapters, peft, versions
from ops.catalogue import Catalogue
from tests.adapters import write_adapter


@pytest.fixture
async def broker(anyio_backend: object) -> AsyncIterator[MemoryBroker]:
    async with MemoryBroker() as broker:
        yield broker


def adapter(tmp_path: Path, seed: int = 0, rank: int = 2, base: str = "llama") -> peft.Adapter:
    return peft.read(write_adapter(tmp_path / f"{seed}-{rank}", seed=seed, rank=rank, base=base))


def beat(base: str = "llama", max_rank: int = 16, worker: str = "w1") -> Heartbeat:
    return Heartbeat(
        worker=worker,
        engine="sim",
        base=base,
        models=(ModelCard(id=base, base=base),),
        started_ms=1,
        seq=1,
        state="serving",
        credit=Credit(),
        max_rank=max_rank,
    )


def known(*beats: Heartbeat, **declared: Any) -> Catalogue:
    made = {name: ModelEntry(name=name, **facts) for name, facts in declared.items()}
    return Catalogue(made, {}, beats)


async def stored(broker: MemoryBroker) -> int:
    found = await broker.counts(
        subjects.objects(subjects.ARTIFACTS), subjects.all_object_metas(subjects.ARTIFACTS)
    )
    return len(found)


async def entry(broker: MemoryBroker, name: str = "support") -> ModelEntry:
    found = await entries.read(broker, name)
    assert found is not None
    return found


# What is pushed where


def test_the_base_is_the_one_that_is_named_or_that_follows(tmp_path: Path) -> None:
    one = adapter(tmp_path, base="org/Llama")
    nameless = adapter(tmp_path, seed=1, base="")
    both = known(beat("llama"), beat("qwen"))
    assert adapters.base_for(both, "support", one, None) == "llama"
    assert adapters.base_for(both, "support", nameless, "qwen") == "qwen"
    assert adapters.base_for(known(beat("qwen")), "support", nameless, None) == "qwen"
    assert adapters.base_for(known(llama={"kind": "base"}), "support", one, None) == "llama"
    has = known(beat("llama"), beat("qwen"), support={"kind": "adapter", "base": "qwen"})
    assert adapters.base_for(has, "support", nameless, None) == "qwen"


@pytest.mark.parametrize(
    ("name", "made_for", "base", "fault", "says"),
    [
        ("support", "", None, errors.InvalidRequest, "say --base, one of: llama, qwen"),
        ("support", "mistral", None, errors.InvalidRequest, "say --base, one of: llama, qwen"),
        ("support", "llama", "mistral", errors.NotFound, "no base 'mistral'; there are: llama, qwen"),
        ("on-qwen", "llama", None, errors.InvalidRequest, "made for 'llama'"),
        ("on-qwen", "llama", "llama", errors.InvalidRequest, "'on-qwen' is an adapter of 'qwen'"),
        ("llama", "llama", None, errors.InvalidRequest, "'llama' is a base's name"),
        ("short", "llama", None, errors.InvalidRequest, "'short' is an alias's name"),
        ("auto", "llama", None, errors.InvalidRequest, "'auto' leaves the choice to Headrace"),
        ("support@3", "llama", None, errors.InvalidRequest, "read as a version of 'support'"),
        ("x" * 201, "llama", None, errors.InvalidRequest, "1 to 200 bytes"),
        ("", "llama", None, errors.InvalidRequest, "1 to 200 bytes"),
        ("a\nb", "llama", None, errors.InvalidRequest, "all printable"),
        ("support", "qwen", None, errors.AdapterFailed, "of rank 2, and workers of 'qwen' take 1 at most"),
    ],
)
def test_what_can_not_be_pushed_is_told_why(
    tmp_path: Path, name: str, made_for: str, base: str | None, fault: type[Exception], says: str
) -> None:
    catalogue = known(
        beat("llama"),
        beat("qwen", max_rank=1),
        short={"kind": "alias"},
        **{"on-qwen": {"kind": "adapter", "base": "qwen"}},
    )
    with pytest.raises(fault) as raised:
        adapters.base_for(catalogue, name, adapter(tmp_path, base=made_for), base)
    assert says in str(raised.value)


def test_the_largest_worker_decides_on_the_rank(tmp_path: Path) -> None:
    one = adapter(tmp_path)
    assert (
        adapters.base_for(known(beat(max_rank=0), beat(worker="w2", max_rank=2)), "a", one, None) == "llama"
    )
    with pytest.raises(errors.AdapterFailed, match="no worker of 'llama' takes adapters"):
        adapters.base_for(known(beat(max_rank=0)), "a", one, None)
    with pytest.raises(errors.InvalidRequest, match="no base to push it for"):
        adapters.base_for(known(), "a", one, None)


# Versions


async def test_each_content_is_one_version_stored_once(broker: MemoryBroker, tmp_path: Path) -> None:
    first, second = adapter(tmp_path), adapter(tmp_path, seed=1, rank=4)
    pushed = await versions.push(broker, "support", "llama", first, "run 1")
    assert (pushed.version.number, pushed.current, pushed.known) == (1, 1, False)
    version = pushed.version
    assert (version.rank, version.targets, version.source) == (2, ("q_proj", "v_proj"), "run 1")
    assert (version.size, version.digest) == (first.size, first.digest)
    await artifacts.fetch(broker, version, tmp_path)
    pushed = await versions.push(broker, "support", "llama", second, activate=False)
    assert (pushed.version.number, pushed.current) == (2, 1)
    assert await stored(broker) == 4
    pushed = await versions.push(broker, "support", "llama", second)
    assert (pushed.version.number, pushed.current, pushed.known) == (2, 2, True)
    pushed = await versions.push(broker, "support", "llama", first)
    assert (pushed.version, pushed.current) == (version, 1)
    assert await stored(broker) == 4
    assert [v.number for v in (await entry(broker)).versions] == [1, 2]


async def test_pushes_at_once_get_numbers_of_their_own(broker: MemoryBroker, tmp_path: Path) -> None:
    some = [adapter(tmp_path, seed) for seed in range(6)]
    pushed = await asyncio.gather(*(versions.push(broker, "support", "llama", each) for each in some))
    assert sorted(each.version.number for each in pushed) == [1, 2, 3, 4, 5, 6]
    found = {version.number: version.digest for version in (await entry(broker)).versions}
    assert found == {each.version.number: each.version.digest for each in pushed}


async def test_the_same_pushed_at_once_is_one_version(broker: MemoryBroker, tmp_path: Path) -> None:
    one = adapter(tmp_path)
    pushed = await asyncio.gather(*(versions.push(broker, "support", "llama", one) for _ in range(4)))
    assert {each.version.number for each in pushed} == {1}
    assert len((await entry(broker)).versions) == 1
    assert await stored(broker) == 2
    await artifacts.fetch(broker, pushed[0].version, tmp_path)


async def test_a_number_never_comes_again(broker: MemoryBroker, tmp_path: Path) -> None:
    """A worker may still have `support@2` on its disk and in its cache."""
    for seed in range(2):
        await versions.push(broker, "support", "llama", adapter(tmp_path, seed), activate=seed == 0)
    await versions.remove(broker, "support", 2)
    assert (await versions.push(broker, "support", "llama", adapter(tmp_path, 2))).version.number == 3
    gone = await versions.remove(broker, "support")
    assert [version.number for version in gone] == [1, 3]
    assert await stored(broker) == 0
    with pytest.raises(errors.NotFound, match="no adapter 'support'"):
        await versions.rollback(broker, "support")
    pushed = await versions.push(broker, "support", "qwen", adapter(tmp_path))  # another base's now
    assert (pushed.version.number, (await entry(broker)).base) == (4, "qwen")


async def test_rollback_goes_one_back_or_to_any(broker: MemoryBroker, tmp_path: Path) -> None:
    for seed in range(3):
        await versions.push(broker, "support", "llama", adapter(tmp_path, seed))
    assert await versions.rollback(broker, "support") == (3, 2)
    assert await versions.rollback(broker, "support") == (2, 1)
    with pytest.raises(errors.NotFound, match="no version before its current one, 1; there are: 1, 2, 3"):
        await versions.rollback(broker, "support")
    assert await versions.rollback(broker, "support", 3) == (1, 3)
    with pytest.raises(errors.NotFound, match="no version 4"):
        await versions.rollback(broker, "support", 4)
    assert (await entry(broker)).current == 3
    await versions.remove(broker, "support", 2)
    assert await versions.rollback(broker, "support") == (3, 1)


async def test_the_current_version_is_not_removed_alone(broker: MemoryBroker, tmp_path: Path) -> None:
    await versions.push(broker, "support", "llama", adapter(tmp_path))
    with pytest.raises(errors.InvalidRequest, match="'support' means version 1"):
        await versions.remove(broker, "support", 1)
    with pytest.raises(errors.NotFound, match="no version 2"):
        await versions.remove(broker, "support", 2)
    assert await stored(broker) == 2


async def test_a_name_of_another_kind_takes_no_version_and_keeps_nothing(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    await entries.change(broker, "support", lambda _: ModelEntry(name="", kind="alias"))
    with pytest.raises(errors.InvalidRequest, match="an alias's name"):
        await versions.push(broker, "support", "llama", adapter(tmp_path))
    assert await stored(broker) == 0


async def test_a_push_that_breaks_off_leaves_what_a_sweep_takes(broker: MemoryBroker, tmp_path: Path) -> None:
    await versions.push(broker, "support", "llama", adapter(tmp_path))

    async def dies(*_: object) -> None:
        raise asyncio.CancelledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "change", dies)
        with pytest.raises(asyncio.CancelledError):
            await versions.push(broker, "support", "llama", adapter(tmp_path, 1))
    assert await stored(broker) == 4
    declared, _ = await entries.read_all(broker)
    await artifacts.sweep(broker, declared.values(), time.time() * 1000 + 60_000)
    assert await stored(broker) == 2
    await artifacts.fetch(broker, declared["support"].versions[0], tmp_path)
