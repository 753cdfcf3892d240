"""A worker's adapters over the fake broker: from the catalogue to the engine, and how bad ones end."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from broker import artifacts, base, errors, objects, placement, subjects
from broker.config import BrokerConfig
from broker.entries import ModelEntry
from broker.memory import MemoryBroker
from broker.messages import AdapterState, Answer, Command, FrameKind, Heartbeat
from tests import asgi
from tests.pushing import drop, files, push
from tests.waiting import LIMIT, until
from tests.workbench import FAST, Caller, calling, idle, metric, serving, soon
from workers import loading
from workers.adapters import Adapters
from workers.config import SimConfig
from workers.engines import sim
from workers.engines.sim import SimEngine

pytestmark = pytest.mark.anyio

SLOW = SimConfig(ttft_ms=5, itl_ms=20, max_num_seqs=16, context_tokens=2048, kv_blocks=256)


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker(BrokerConfig())


@pytest.fixture
async def caller(broker: MemoryBroker) -> AsyncIterator[Caller]:
    async with calling(broker.client()) as made:
        yield made


class Watched(SimEngine):
    """Notes what is loaded and unloaded; loads wait for `gate`."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config)
        self.calls: list[str] = []
        self.paths: list[Path] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.most_skipped = 0

    async def load_adapter(self, model: str, path: Path, rank: int) -> None:
        self.calls.append(f"load {model}")
        self.paths.append(path)
        await self.gate.wait()
        await super().load_adapter(model, path, rank)

    async def unload_adapter(self, model: str) -> None:
        self.calls.append(f"unload {model}")
        await super().unload_adapter(model)

    def _changed(self) -> None:
        self.most_skipped = max(self.most_skipped, self.stats().skipped)
        super()._changed()


@asynccontextmanager
async def engine(config: SimConfig = FAST) -> AsyncIterator[Watched]:
    made = Watched(config)
    yield made
    await made.close()


class Beats:
    """The newest heartbeat of each worker."""

    def __init__(self) -> None:
        self.newest: dict[str, Heartbeat] = {}

    def on_beat(self, message: base.Message) -> None:
        beat = Heartbeat.model_validate_json(message.data)
        self.newest[beat.worker] = beat

    def states(self, worker: str = "w1") -> dict[str, str]:
        beat = self.newest.get(worker)
        return {} if beat is None else {each.model: each.state for each in beat.adapters}

    def of(self, model: str, worker: str = "w1") -> AdapterState:
        return next(each for each in self.newest[worker].adapters if each.model == model)


@pytest.fixture
async def beats(broker: MemoryBroker) -> Beats:
    made = Beats()
    await broker.client().subscribe(subjects.ALL_HEARTBEATS, made.on_beat)
    return made


async def told(broker: base.Broker, do: str, model: str = "", worker: str = "w1") -> Answer:
    command = Command.model_validate({"do": do, "model": model})
    return Answer.model_validate_json(
        await broker.ask(subjects.ctl(worker), command.model_dump_json().encode())
    )


async def test_an_adapter_answers_in_its_own_words(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made):
        call = await caller.submit(20, model="ada@1")
        await call.finishes()
        await (await caller.submit(20)).finishes()
        await until(lambda: beats.states() == {"ada@1": "ready"})
        beat = beats.newest["w1"]
        assert (beat.slots, beat.max_rank) == (FAST.adapter_slots, FAST.max_rank)
        assert beat.host
        assert [card.id for card in beat.models] == ["sim"]
        assert beats.of("ada@1").size > 0
        assert idle(made)
        assert made.calls == ["load ada@1"]
        event = (await caller.usage(2))[0]
    assert b'"model":"ada@1"' in call.payload
    assert (event.model, event.base, event.outcome) == ("ada@1", "sim", "finished")


async def test_the_subject_alone_says_which_model_answers(broker: MemoryBroker, caller: Caller) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "eve")
    body = {"prompt": "x", "max_tokens": 3, "stream": True}
    async with engine() as made, serving(broker, made):
        for asked in ({"model": "ada"}, {"model": "eve@1"}, {}, {"model": 3}):
            call = await caller.submit(3, model="ada@1", prompt="x", body=orjson.dumps(body | asked))
            await call.finishes()
        await (await caller.submit(3, model="eve@1")).finishes()
        # Nor can a request for the base borrow an adapter: its slot and its tenants' rights are others.
        for text in (
            b'{"model": "eve@1", "prompt": "x", "max_tokens": 3, "stream": true}',
            b'{"model": "eve\\u00401", "prompt": "x", "max_tokens": 3, "stream": true}',
        ):
            call = await caller.submit(3, prompt="x", body=text)
            await call.finishes()


@pytest.mark.parametrize("model", ["ada", "ada@2", "eve@1", "ada@x", "@1", "ada@1@1"])
async def test_what_is_no_version_of_an_adapter_is_unknown(
    broker: MemoryBroker, caller: Caller, model: str
) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "other", base_model="another base")
    async with engine() as made, serving(broker, made):
        frame = await (await caller.submit(3, model=model)).fails("model_not_found")
        assert b"ada" in frame.payload or b"eve" in frame.payload or b"@" in frame.payload
        await (await caller.submit(3, model="other@1")).fails("model_not_found")
        assert not made.calls


async def test_a_path_that_the_base_lacks_its_adapters_lack_too(broker: MemoryBroker, caller: Caller) -> None:
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3, model="ada@1", path="/v1/embeddings")).fails("invalid_request")


async def test_a_new_version_is_served_at_once_while_the_old_goes_on(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    async with engine(SLOW) as made, serving(broker, made):
        old = await caller.submit(60, model="ada@1")
        await old.reach(FrameKind.HEAD)
        await push(caller.broker, "ada", files(seed=2))
        new = await caller.submit(5, model="ada@2")
        await new.finishes()
        assert beats.of("ada@1").running == 1
        await old.finishes()
        await (await caller.submit(5, model="ada@1")).finishes()  # rolled back
        await until(lambda: beats.states() == {"ada@1": "ready", "ada@2": "ready"})


async def test_a_version_that_is_gone_from_the_catalogue_goes_when_its_requests_end(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "ada", files(seed=2))
    async with engine(SLOW) as made, serving(broker, made):
        running = await caller.submit(40, model="ada@1")
        await running.reach(FrameKind.HEAD)
        await drop(caller.broker, "ada", 1)
        await until(lambda: beats.states() == {"ada@1": "draining"})
        await (await caller.submit(3, model="ada@1")).fails("model_not_found")
        await running.finishes()
        await until(lambda: not beats.states() and not made.adapters)


# What is bad


def corrupt(content: dict[str, bytes]) -> dict[str, bytes]:
    return content | {artifacts.WEIGHTS: b"\xff" * 100}


def cut(content: dict[str, bytes]) -> dict[str, bytes]:
    return content | {artifacts.WEIGHTS: content[artifacts.WEIGHTS][:40]}


def no_json(content: dict[str, bytes]) -> dict[str, bytes]:
    return content | {artifacts.CONFIG: b"\x80\x04."}


@pytest.mark.parametrize("spoil", [corrupt, cut, no_json])
async def test_what_the_engine_does_not_take_fails_alone(
    broker: MemoryBroker, caller: Caller, beats: Beats, spoil: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    await push(caller.broker, "bad", spoil(files()))
    await push(caller.broker, "good")
    async with engine() as made, serving(broker, made):
        call = await caller.submit(3, model="bad@1")
        frame = await call.fails("adapter_failed")
        assert frame.extra["status"] == 422
        assert b"bad@1" in frame.payload
        await (await caller.submit(3, model="bad@1")).fails("adapter_failed")
        assert made.calls == ["load bad@1"]  # not tried again at once
        await (await caller.submit(9, model="good@1")).finishes()
        await (await caller.submit(9)).finishes()
        await until(lambda: beats.states() == {"bad@1": "failed", "good@1": "ready"})
        assert beats.of("bad@1").reason


async def test_missing_and_damaged_objects_fail_alone_and_heal_with_the_entry(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    lost, other = await push(caller.broker, "lost"), await push(caller.broker, "other")
    for file in lost.files:
        await objects.remove(caller.broker, subjects.ARTIFACTS, file.object)
    weights = next(file for file in other.files if file.name == artifacts.WEIGHTS)
    await objects.put(caller.broker, subjects.ARTIFACTS, weights.object, b"y" * weights.size)
    async with engine() as made, serving(broker, made):
        assert b"missing" in (await (await caller.submit(3, model="lost@1")).fails("adapter_failed")).payload
        assert b"corrupt" in (await (await caller.submit(3, model="other@1")).fails("adapter_failed")).payload
        await (await caller.submit(3)).finishes()
        await objects.put(caller.broker, subjects.ARTIFACTS, weights.object, files()[artifacts.WEIGHTS])
        await (await caller.submit(3, model="other@1")).fails("adapter_failed")  # still in its pause
        await push(caller.broker, "other", files(seed=3))
        await until(lambda: "other@1" not in beats.states())  # the entry changed: no pause any more
        await (await caller.submit(3, model="other@1")).finishes()


async def test_a_failed_adapter_is_tried_again_after_its_pause(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "FIRST", 0.0)
    version = await push(caller.broker, "ada")
    weights = next(file for file in version.files if file.name == artifacts.WEIGHTS)
    await objects.remove(caller.broker, subjects.ARTIFACTS, weights.object)
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3, model="ada@1")).fails("adapter_failed")
        await objects.put(caller.broker, subjects.ARTIFACTS, weights.object, files()[artifacts.WEIGHTS])
        await (await caller.submit(3, model="ada@1")).finishes()


async def test_a_rank_above_the_engines_is_refused_before_it_is_fetched(
    broker: MemoryBroker, caller: Caller
) -> None:
    await push(caller.broker, "wide", rank=128)
    async with engine() as made, serving(broker, made):
        assert (
            b"rank is 128" in (await (await caller.submit(3, model="wide@1")).fails("adapter_failed")).payload
        )
        assert not made.calls


async def test_one_that_is_larger_than_the_disk_s_bound_fails(broker: MemoryBroker, caller: Caller) -> None:
    await push(caller.broker, "big", files() | {artifacts.WEIGHTS: b"x" * 2**21})
    async with engine() as made, serving(broker, made, adapter_bytes=2**20):
        frame = await (await caller.submit(3, model="big@1")).fails("adapter_failed")
        assert b"worker.adapter_bytes" in frame.payload


def stored(cache: Path) -> list[Path]:
    return list(cache.rglob(artifacts.WEIGHTS))


async def test_files_damaged_on_disk_between_two_lives_are_fetched_anew(
    broker: MemoryBroker, caller: Caller, tmp_path: Path
) -> None:
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made, adapter_cache=str(tmp_path)):
        await (await caller.submit(3, model="ada@1")).finishes()
    (weights,) = stored(tmp_path)
    weights.write_bytes(b"half")
    async with engine() as made, serving(broker, made, adapter_cache=str(tmp_path)):
        await (await caller.submit(3, model="ada@1")).finishes()
    assert weights.read_bytes() == files()[artifacts.WEIGHTS]


async def test_what_lies_on_disk_is_not_fetched_again(
    broker: MemoryBroker, caller: Caller, tmp_path: Path
) -> None:
    version = await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made, adapter_cache=str(tmp_path)):
        await (await caller.submit(3, model="ada@1")).finishes()
    await artifacts.remove(caller.broker, version.files)
    async with engine() as made, serving(broker, made, adapter_cache=str(tmp_path)):
        await (await caller.submit(3, model="ada@1")).finishes()


async def test_files_that_somebody_removed_meanwhile_are_fetched_anew(
    broker: MemoryBroker, caller: Caller, tmp_path: Path
) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "eve")
    config = FAST.model_copy(update={"adapter_slots": 1, "adapters_in_memory": 1})
    async with engine(config) as made, serving(broker, made, adapter_cache=str(tmp_path)):
        await (await caller.submit(3, model="ada@1")).finishes()
        await (await caller.submit(3, model="eve@1")).finishes()
        for weights in stored(tmp_path):
            shutil.rmtree(weights.parent)
        await (await caller.submit(3, model="ada@1")).finishes()
        assert len(stored(tmp_path)) == 1


async def test_files_that_went_while_the_engine_refused_them_leave_the_worker_in_order(
    broker: MemoryBroker, caller: Caller, tmp_path: Path
) -> None:
    await push(caller.broker, "bad", no_json(files()))
    async with engine() as made, serving(broker, made, adapter_cache=str(tmp_path)):
        made.gate.clear()
        call = await caller.submit(3, model="bad@1")
        await until(lambda: made.calls)
        shutil.rmtree(stored(tmp_path)[0].parent)
        made.gate.set()
        await call.fails("adapter_failed")
        await (await caller.submit(3)).finishes()


@pytest.mark.parametrize("where", ["broker.artifacts.fetch", "workers.engines.sim.SimEngine.load_adapter"])
async def test_what_nobody_foresaw_fails_the_adapter_alone(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    await push(caller.broker, "ada")

    async def breaks(*_: object) -> None:
        raise ZeroDivisionError("x" * 100_000)

    async with engine() as made, serving(broker, made):
        with monkeypatch.context() as patch:
            patch.setattr(where, breaks)
            frame = await (await caller.submit(3, model="ada@1")).fails("adapter_failed")
            assert b"ZeroDivisionError" in frame.payload
            assert len(frame.payload) < 1000
        await (await caller.submit(3)).finishes()


async def test_no_more_than_two_are_fetched_at_once(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        await push(caller.broker, f"a{number}")
    fetch, under_way, most = artifacts.fetch, 0, 0

    async def counted(*args: Any) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await fetch(*args)
        under_way -= 1

    monkeypatch.setattr(artifacts, "fetch", counted)
    async with engine() as made, serving(broker, made):
        calls = [await caller.submit(3, model=f"a{number}@1") for number in range(5)]
        for call in calls:
            await call.finishes()
    assert most == 2


async def test_a_full_disk_sends_requests_to_another_worker(
    broker: MemoryBroker, caller: Caller, beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(caller.broker, "ada")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with engine() as made, serving(broker, made):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            before = metric("headrace_returned_total", reason="handed_back")
            frame = await (await caller.submit(3, model="ada@1")).fails("unavailable")
            assert b"No space left" in frame.payload
            assert metric("headrace_returned_total", reason="handed_back") == before + 3
        await until(lambda: "ada@1" not in beats.states())  # not failed; a beat may be from before
        await (await caller.submit(3, model="ada@1")).finishes()


async def test_a_fault_of_the_worker_s_own_answers_the_request(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(caller.broker, "ada")

    async def breaks(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("workers.adapters.Adapters.hold", breaks)
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3, model="ada@1")).fails("engine_failed")
        await (await caller.submit(3)).finishes()


async def test_no_store_is_no_fault_of_the_adapter(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(caller.broker, "ada")

    async def away(*_: object) -> None:
        raise errors.Unavailable("the store is away")

    async with engine() as made, serving(broker, made):
        with monkeypatch.context() as patch:
            patch.setattr(artifacts, "fetch", away)
            before = metric("headrace_returned_total", reason="handed_back")
            await (await caller.submit(3, model="ada@1")).fails("unavailable")
            assert metric("headrace_returned_total", reason="handed_back") == before + 3
        await (await caller.submit(3, model="ada@1")).finishes()


# Slots and memory


async def test_more_adapters_than_slots_take_turns_and_the_engine_skips_none(
    broker: MemoryBroker, caller: Caller
) -> None:
    config = FAST.model_copy(update={"adapter_slots": 2, "adapters_in_memory": 3, "max_num_seqs": 32})
    for number in range(6):
        await push(caller.broker, f"a{number}", files(seed=number))
    async with engine(config) as made, serving(broker, made, adapter_turn=0.05):
        calls = [await caller.submit(20, model=f"a{number % 6}@1") for number in range(48)]
        calls += [await caller.submit(20) for _ in range(6)]
        for call in calls:
            await call.finishes()
        await until(lambda: idle(made))
        assert not made.most_skipped
        assert len(made.adapters) <= 3


async def test_where_all_fit_each_is_loaded_once_and_none_swapped(
    broker: MemoryBroker, caller: Caller
) -> None:
    for number in range(4):
        await push(caller.broker, f"a{number}", files(seed=number))
    swaps = metric("headrace_adapter_swaps_total")
    async with engine(FAST.model_copy(update={"adapter_slots": 4})) as made, serving(broker, made):
        for _ in range(3):
            calls = [await caller.submit(5, model=f"a{number}@1") for number in range(4)]
            for call in calls:
                await call.finishes()
        assert sorted(made.calls) == [f"load a{number}@1" for number in range(4)]
    assert metric("headrace_adapter_swaps_total") == swaps


async def test_the_least_recently_used_makes_room_in_memory(broker: MemoryBroker, caller: Caller) -> None:
    for name in "abc":
        await push(caller.broker, name)
    config = FAST.model_copy(update={"adapter_slots": 2, "adapters_in_memory": 2})
    async with engine(config) as made, serving(broker, made):
        for name in "abac":
            await (await caller.submit(3, model=f"{name}@1")).finishes()
        assert made.calls == ["load a@1", "load b@1", "unload b@1", "load c@1"]


async def test_a_cancel_and_a_deadline_reach_a_request_that_waits(
    broker: MemoryBroker, caller: Caller
) -> None:
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made):
        made.gate.clear()
        first = await caller.submit(3, model="ada@1")
        await until(lambda: made.calls)
        late = await caller.submit(3, model="ada@1", deadline_ms=soon(0.3))
        await first.cancel()
        await first.fails("cancelled")
        await late.fails("deadline_exceeded")
        made.gate.set()
        await (await caller.submit(3, model="ada@1")).finishes()


async def test_requests_that_wait_are_handed_back_at_once_on_a_drain(
    broker: MemoryBroker, caller: Caller
) -> None:
    await push(caller.broker, "ada")
    async with (
        engine(SLOW) as first,
        engine(SLOW) as second,
        serving(broker, first, "w1", drain_timeout=60.0),
    ):
        first.gate.clear()
        call = await caller.submit(3, model="ada@1")
        await until(lambda: first.calls)
        assert (await told(caller.broker, "drain")).ok
        async with serving(broker, second, "w2"):
            await call.finishes()
            assert (await call.reach(FrameKind.HEAD)).extra["worker"] == "w2"


# Commands, wants and placement


async def test_commands_load_and_unload(broker: MemoryBroker, caller: Caller, beats: Beats) -> None:
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made):
        answer = await told(caller.broker, "load", "ada@1")
        assert answer.ok, answer
        await until(lambda: beats.states() == {"ada@1": "ready"})
        assert (await told(caller.broker, "load", "ada@1")).ok
        assert (await told(caller.broker, "unload", "ada@1")).ok
        await until(lambda: beats.states() == {"ada@1": "on_disk"})
        assert made.calls == ["load ada@1", "unload ada@1"]
        assert (await told(caller.broker, "unload", "ada@1")).ok
        for do, model in (("load", "eve@1"), ("load", ""), ("sleep", "sim")):
            answer = await told(caller.broker, do, model)
            assert not answer.ok
            assert answer.message
        garbage = Answer.model_validate_json(await caller.broker.ask(subjects.ctl("w1"), b"\xff"))
        assert not garbage.ok


async def test_a_load_that_is_told_to_one_that_sleeps_is_done_once_it_woke(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    config = FAST.model_copy(update={"sleep": True, "wake_ms": 1})
    async with engine(config) as made, serving(broker, made):
        await told(caller.broker, "sleep")
        await until(lambda: beats.newest["w1"].state == "asleep")
        assert (await told(caller.broker, "load", "ada@1")).ok
        await until(lambda: beats.states() == {"ada@1": "on_disk"})
        assert made.calls == []
        await told(caller.broker, "wake")
        await until(lambda: beats.states() == {"ada@1": "ready"})
        await (await caller.submit(model="ada@1")).finishes()


async def test_an_unload_waits_for_what_runs(broker: MemoryBroker, caller: Caller, beats: Beats) -> None:
    await push(caller.broker, "ada")
    async with engine(SLOW) as made, serving(broker, made):
        call = await caller.submit(30, model="ada@1")
        await call.reach(FrameKind.HEAD)
        assert (await told(caller.broker, "unload", "ada@1")).ok
        await until(lambda: beats.states() == {"ada@1": "draining"})
        assert made.adapters == {"ada@1"}
        await call.finishes()
        await until(lambda: beats.states() == {"ada@1": "on_disk"})


async def test_what_is_wanted_is_here_before_its_request(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made):
        for model in ("ada@1", "eve@1", "ada", "ada@7"):
            await caller.broker.publish(subjects.want("sim", model))
        await until(lambda: beats.states() == {"ada@1": "ready"})
        assert made.calls == ["load ada@1"]


async def test_what_is_only_wanted_pushes_nothing_out_that_was_just_used(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "eve")
    config = FAST.model_copy(update={"adapter_slots": 1, "adapters_in_memory": 1})
    async with engine(config) as made, serving(broker, made):
        await (await caller.submit(3, model="ada@1")).finishes()
        await caller.broker.publish(subjects.want("sim", "eve@1"))
        await until(lambda: beats.states() == {"ada@1": "ready", "eve@1": "on_disk"})
        assert (await told(caller.broker, "load", "eve@1")).ok  # a command does
        await until(lambda: beats.states() == {"ada@1": "on_disk", "eve@1": "ready"})


async def test_a_load_that_finds_no_room_is_done_once_there_is(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "eve")
    config = SLOW.model_copy(update={"adapter_slots": 1, "adapters_in_memory": 1})
    async with engine(config) as made, serving(broker, made):
        call = await caller.submit(20, model="ada@1")
        await call.reach(FrameKind.HEAD)
        assert (await told(caller.broker, "load", "eve@1")).ok
        await until(lambda: beats.states() == {"ada@1": "ready", "eve@1": "on_disk"})
        await call.finishes()
        await until(lambda: beats.states() == {"ada@1": "on_disk", "eve@1": "ready"})


@pytest.mark.parametrize("busy", [False, True])
async def test_a_version_whose_entry_was_made_anew_is_loaded_anew(
    broker: MemoryBroker, caller: Caller, busy: bool
) -> None:
    await push(caller.broker, "ada")
    other = await push(caller.broker, "eve", files(seed=5))
    async with engine(SLOW) as made, serving(broker, made):
        call = await caller.submit(20 if busy else 2, model="ada@1")
        await (call.reach(FrameKind.HEAD) if busy else call.finishes())
        anew = ModelEntry(name="ada", kind="adapter", base="sim", current=1, versions=(other,))
        await caller.broker.put(subjects.KV_CATALOGUE, "ada", anew.model_dump_json().encode())
        await (await caller.submit(2, model="ada@1")).finishes()
        await call.finishes()
        assert made.calls == ["load ada@1", "unload ada@1", "load ada@1"]
        assert made.paths[0] != made.paths[1]


async def test_a_want_that_comes_as_the_worker_ends_begins_nothing(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(caller.broker, "ada")
    close, heard = Adapters.close, asyncio.Event()

    async def late(adapters: Adapters) -> None:
        await close(adapters)
        await caller.broker.publish(subjects.want("sim", "ada@1"))
        await asyncio.wait_for(heard.wait(), LIMIT)
        assert not adapters.loading.all

    monkeypatch.setattr(Adapters, "close", late)
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3)).finishes()
        await caller.broker.subscribe(subjects.wants("sim"), lambda _: heard.set())  # after the worker


async def test_a_request_goes_to_the_worker_that_shall_have_its_adapter(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    plan = placement.Assignment(model="ada@1", workers=("w2",))
    await placement.Placements(caller.broker).put(placement.Placement(base="sim", assignments=(plan,)))
    async with engine() as first, engine() as second:
        async with serving(broker, first, "w1"):
            await caller.broker.publish(subjects.want("sim", "ada@1"))
            # Nobody else is there: after two tries it is served where it is.
            call = await caller.submit(3, model="ada@1")
            await call.finishes()
            assert call.frames[-1].epoch == 3
            assert first.calls == ["load ada@1"]
        async with serving(broker, second, "w2"):
            call = await caller.submit(3, model="ada@1")
            await call.finishes()
            assert second.calls == ["load ada@1"]


async def test_what_was_only_passed_on_has_no_past_to_be_asked_for(
    broker: MemoryBroker, caller: Caller
) -> None:
    await push(caller.broker, "ada")
    plan = placement.Assignment(model="ada@1", workers=("w2",))
    await placement.Placements(caller.broker).put(placement.Placement(base="sim", assignments=(plan,)))
    asked: list[base.Message] = []
    await broker.client().subscribe("again.>", asked.append)
    async with engine() as made, serving(broker, made, "w1"):
        call = await caller.submit(3, model="ada@1")
        await call.finishes()
        assert call.frames[-1].epoch == 3
        assert not asked


async def test_a_large_fleet_serves_a_request_where_it_is(broker: MemoryBroker, caller: Caller) -> None:
    await push(caller.broker, "ada")
    plan = placement.Assignment(model="ada@1", workers=("w2",))
    await placement.Placements(caller.broker).put(
        placement.Placement(base="sim", assignments=(plan,), replicas=10)
    )
    async with engine() as made, serving(broker, made, "w1"):
        call = await caller.submit(3, model="ada@1")
        await call.finishes()
        assert {frame.epoch for frame in call.frames} == {1}


async def test_a_request_that_is_quicker_than_the_catalogue_s_news_is_served(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.entries.Entries._changed", lambda *_: None)  # the news never come
    await push(caller.broker, "ada")
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3, model="ada@1")).finishes()


async def test_a_broken_stream_of_an_adapter_goes_on_at_another_worker(
    broker: MemoryBroker, caller: Caller
) -> None:
    await push(caller.broker, "ada")
    async with engine(SLOW) as first, engine(FAST) as second:
        async with serving(broker, first, "w1", drain_timeout=0.0):
            call = await caller.submit(100, model="ada@1")
            await call.reach(FrameKind.DATA)
            await push(caller.broker, "ada", files(seed=5))
        async with serving(broker, second, "w2"):
            await call.finishes()
            assert second.calls == ["load ada@1"]


async def test_an_engine_without_slots_serves_no_adapter(broker: MemoryBroker, caller: Caller) -> None:
    await push(caller.broker, "ada")
    async with engine(FAST.model_copy(update={"adapter_slots": 0})) as made, serving(broker, made):
        frame = await (await caller.submit(3, model="ada@1")).fails("model_not_found")
        assert b"adapter_slots" in frame.payload
        assert not (await told(caller.broker, "load", "ada@1")).ok


@pytest.mark.parametrize("lacks", [{"adapter_slots": 0}, {"max_rank": 4}])
async def test_what_one_worker_can_t_serve_goes_to_another_that_can(
    broker: MemoryBroker, caller: Caller, lacks: dict[str, int]
) -> None:
    await push(caller.broker, "ada")
    async with (
        engine(FAST.model_copy(update=lacks)) as first,
        engine() as second,
        serving(broker, first, "w1"),
        serving(broker, second, "w2"),
    ):
        for _ in range(5):
            await (await caller.submit(3, model="ada@1")).finishes()
        assert not first.calls


@pytest.mark.parametrize("lacks", [{"adapter_slots": 0}, {"max_rank": 4}])
async def test_who_can_t_serve_refuses_nothing_while_another_can_and_is_busy(
    broker: MemoryBroker, caller: Caller, beats: Beats, lacks: dict[str, int]
) -> None:
    await push(caller.broker, "ada")
    one_at_a_time = SLOW.model_copy(update={"max_num_seqs": 1})
    async with (
        engine(FAST.model_copy(update=lacks)) as first,
        engine(one_at_a_time) as second,
        serving(broker, second, "w2"),
    ):
        busy = await caller.submit(40, model="ada@1")
        await busy.reach(FrameKind.HEAD)
        async with serving(broker, first, "w1"):
            late = await caller.submit(3, model="ada@1", deadline_ms=soon(0.4))
            waits = await caller.submit(3, model="ada@1")
            await (await caller.submit(3)).finishes()
            await late.fails("deadline_exceeded")
            await waits.finishes()
            assert not first.calls
            assert beats.states() == {}
        await busy.finishes()


async def test_a_rank_that_only_this_worker_lacks_is_no_failure_of_the_adapter(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "wide", rank=128)
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3, model="wide@1")).fails("adapter_failed")
        seq = beats.newest["w1"].seq
        await until(lambda: beats.newest["w1"].seq > seq)
        assert beats.states() == {}


async def test_requests_that_wait_for_an_adapter_leave_the_engine_to_others(
    broker: MemoryBroker, caller: Caller, beats: Beats
) -> None:
    await push(caller.broker, "ada")
    await push(caller.broker, "eve")
    async with engine() as made, serving(broker, made):
        await (await caller.submit(3, model="eve@1")).finishes()
        made.gate.clear()
        calls = [await caller.submit(3, model="ada@1") for _ in range(20)]
        await until(lambda: beats.states().get("ada@1") == "loading")
        await (await caller.submit(3)).finishes()
        await (await caller.submit(3, model="eve@1")).finishes()
        assert beats.of("ada@1").waiting <= 4  # half of what the engine runs
        await until(lambda: beats.newest["w1"].credit.slots_free == 8)
        made.gate.set()
        for call in calls:
            await call.finishes()


async def test_a_heartbeat_that_does_not_fit_is_no_end_of_the_worker(
    broker: MemoryBroker, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = asyncio.Event()

    def states(_: object) -> tuple[AdapterState, ...]:
        tried.set()
        return (AdapterState(model="ada@1", state="failed", reason="x" * 2**21),)

    async with engine() as made, serving(broker, made) as it:
        with monkeypatch.context() as patch:
            patch.setattr("workers.control.Control.states", states)
            await asyncio.wait_for(tried.wait(), LIMIT)
            await (await caller.submit(3)).finishes()
        assert not it.task.done()


async def test_the_sim_engine_counts_what_it_skips() -> None:
    """What workers never let come to it: more adapters than slots."""
    made = Watched(FAST.model_copy(update={"adapter_slots": 1}))
    made.adapters |= {"a@1", "b@1"}
    body = {"prompt": "x", "max_tokens": 30}
    answers = await asyncio.gather(
        *(asgi.ask(made.app, "/v1/completions", body | {"model": model}) for model in ("a@1", "b@1", "sim"))
    )
    assert made.most_skipped == 1
    texts = [answer["choices"][0]["text"] for answer in answers]
    for text, adapter in zip(texts, ("a@1", "b@1", ""), strict=True):
        assert text == sim.text_of(sim.expected_tokens(sim.tokenize("x"), 30, adapter=adapter))
    await made.close()
