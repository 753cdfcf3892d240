"""A pool's instance with real processes that behave badly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.messages import Answer, Command, ModelCard
from ops import child, instance
from ops.instance import Instance, Tell
from ops.pool_file import Base
from tests.waiting import until

DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{}time.sleep(99)"
READY = (
    "import os, sys, time\n"
    "os.write(int(sys.argv[sys.argv.index('--ready-fd') + 1]), b'{\"metrics\": \"m\"}\\n')\n"
    "time.sleep(99)"
)
Make = Callable[..., Instance]


async def unreachable(worker: str, command: Command) -> Answer | None:
    return None


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    def made(code: str, tell: Tell = unreachable) -> Instance:
        program = tmp_path / "program.py"
        program.write_text(code)
        monkeypatch.setattr(child, "PROGRAM", (str(program),))
        monkeypatch.setattr(instance, "GRACE", 0.1)
        monkeypatch.setattr(instance, "RETRY", 0.05)
        card = ModelCard(id="b", base="b")
        it = Base("b", 10, 1, 8, True, False, 1.0, card, {})
        return Instance(it, "w", [], tmp_path / "w.log", 0.1, tell, lambda: None)

    return made


def state(it: Instance) -> str:
    """As no checker takes for fixed."""
    return it.state


async def ends(it: Instance) -> None:
    if state(it) not in ("cold", "failed"):
        it.stop("the test ends")
    await it.ended()


async def test_a_start_that_hangs_has_failed_however_long_its_end_takes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "PAUSE", 0.05)  # shorter than its end takes
    deaf = tmp_path / "deaf"
    it = make(DEAF.format(f"open({str(deaf)!r}, 'w').close()\n"))
    pauses = []
    for _ in range(3):
        it.start("requests wait")
        await until(deaf.exists)
        assert it.pid is not None
        it.overdue(0, 99)
        assert state(it) == "draining"
        assert it.failing, "nobody counts on it while it ends"
        await it.ended()
        deaf.unlink()
        assert state(it) == "failed"
        assert "starting took more than" in it.reason
        pauses.append(it.seat(None, False, 0, False).not_before - it.since)
    assert pauses[0] > 0
    assert pauses[2] > 3 * pauses[0], "each pause is longer than the one before it"


async def test_one_that_is_stopped_in_order_has_not_failed(make: Make) -> None:
    it = make(READY)
    it.start("requests wait")
    await until(lambda: state(it) == "hot")
    it.stop("idle")
    await it.ended()
    assert state(it) == "cold"
    assert not it.failing


async def test_one_that_failed_is_counted_on_again_once_it_served(make: Make) -> None:
    it = make("raise SystemExit(3)")
    it.start("requests wait")
    await until(lambda: state(it) == "failed")
    assert it.failing
    assert "status 3" in it.reason
    make(READY)
    it.start("requests wait")
    assert it.failing, "a start is no promise yet"
    await until(lambda: state(it) == "hot" and not it.failing)
    await ends(it)


@pytest.mark.parametrize("where", ["rotate", "run"])
async def test_what_can_t_even_be_begun_gives_its_place_free(
    make: Make, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = make("")
    if where == "rotate":  # a directory lies where the log before goes
        (tmp_path / "w.log").write_text("")
        (tmp_path / "w.log.1" / "x").mkdir(parents=True)
    else:
        monkeypatch.setattr("sys.executable", "nul\0byte")
    it.start("requests wait")
    await it.ended()
    assert state(it) == "failed"
    assert "could not be run" in it.reason
    assert it.pid is None
    assert it.seat(None, False, 0, False).held == 0


async def test_failing_starts_leave_no_files_open(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    it = make("")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        it.start("requests wait")
        await it.ended()
        assert state(it) == "failed"
    assert len(os.listdir("/proc/self/fd")) == before


async def hot(make: Make, tell: Tell) -> Instance:
    it = make(READY, tell)
    it.start("requests wait")
    await until(lambda: state(it) == "hot")
    return it


async def test_a_lost_command_is_told_again_and_sleep_stays_on(make: Make) -> None:
    told: list[str] = []

    async def second(worker: str, command: Command) -> Answer | None:
        told.append(command.do)
        return None if len(told) % 2 else Answer(ok=True)

    it = await hot(make, second)
    it.sleep("idle")
    await until(lambda: told == ["sleep", "sleep"])
    assert state(it) == "draining"
    it.heard("asleep")
    assert state(it) == "warm"
    it.wake("requests wait")
    await until(lambda: told[2:] == ["wake", "wake"])
    it.heard("serving")
    assert state(it) == "hot"
    assert it.seat(None, False, 0, False).can_sleep
    await ends(it)


async def test_one_that_never_answers_is_ended_and_no_longer_told(make: Make) -> None:
    it = await hot(make, unreachable)
    it.sleep("idle")

    def overdue() -> bool:
        it.overdue(0, 99)
        return state(it) == "failed"

    await until(overdue)
    await it.ended()
    assert it.seat(None, False, 0, False).can_sleep


async def test_a_refusal_to_sleep_has_it_stopped_from_then_on(make: Make) -> None:
    async def refused(worker: str, command: Command) -> Answer | None:
        return Answer(ok=False, message="no")

    it = await hot(make, refused)
    it.sleep("idle")
    await until(lambda: state(it) == "cold")
    await it.ended()
    assert not it.seat(None, False, 0, False).can_sleep


async def test_a_worker_that_others_had_sleep_is_seen_to(make: Make) -> None:
    it = await hot(make, unreachable)
    it.heard("asleep")
    assert state(it) == "warm", "requests that wait for it wake it"
    it.heard("serving")
    assert state(it) == "hot", "and it takes its memory"
    await ends(it)
