"""Who hands a worker its requests."""

from __future__ import annotations

import pytest

from broker.base import Message
from broker.messages import Dispatch, Sent
from tests.waiting import until
from workers import dispatched
from workers.dispatched import Dispatched


class Ear(Dispatched):
    def __init__(self) -> None:
        self.changes: list[bool] = []
        super().__init__("llama", lambda: self.changes.append(self.active))

    def told(self, epoch: int, *bases: str) -> None:
        beat = Dispatch(scheduler="s1", epoch=epoch, bases=bases)
        self.hear(Message("dispatch", beat.model_dump_json().encode()))


def sent(epoch: int, number: int) -> Sent:
    return Sent(epoch=epoch, number=number)


def took(ear: Ear, epoch: int, number: int) -> bool:
    note = sent(epoch, number)
    may = ear.take(note)
    if may:
        ear.taken(note)
    return may


async def test_it_is_dispatched_to_while_a_scheduler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatched, "SILENCE", 0.05)
    ear = Ear()
    ear.told(1, "mistral")
    assert ear.changes == []
    ear.told(1, "mistral", "llama")
    ear.told(1, "mistral", "llama")
    assert ear.changes == [True]
    await until(lambda: ear.changes == [True, False])  # it fell silent
    ear.told(1, "llama")
    ear.told(1)
    assert ear.changes == [True, False, True, False]
    ear.close()


async def test_who_has_lost_the_lead_is_not_heard() -> None:
    ear = Ear()
    ear.told(7, "llama")
    ear.told(5)
    assert ear.active
    assert not ear.take(sent(5, 9))
    assert took(ear, 7, 1)
    assert ear.last == (7, 1)
    ear.close()


async def test_a_scheduler_that_nobody_contradicts_is_heard_whatever_its_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broker that was restarted without replicas counts anew."""
    monkeypatch.setattr(dispatched, "SILENCE", 0.02)
    ear = Ear()
    ear.told(70, "llama")
    took(ear, 70, 3)
    await until(lambda: not ear.active)
    ear.told(2, "llama")
    assert ear.active
    assert took(ear, 2, 1)
    assert ear.last == (2, 1)
    ear.close()


async def test_what_one_dispatcher_sent_is_not_counted_for_the_next() -> None:
    ear = Ear()
    ear.told(1, "llama")
    took(ear, 1, 12)
    ear.told(2, "llama")
    assert ear.last == (2, 0)
    took(ear, 2, 14)
    took(ear, 2, 13)  # overtaken on its way
    assert ear.last == (2, 14)
    ear.close()


async def test_what_was_still_coming_from_one_dispatcher_is_not_counted_for_the_next() -> None:
    """Its body is read from the queue as the lead changes hands."""
    ear = Ear()
    ear.told(1, "llama")
    slow = sent(1, 1000)
    assert ear.take(slow)
    ear.told(2, "llama")
    assert took(ear, 2, 3)
    assert ear.last == (2, 3)
    ear.taken(slow)
    assert ear.last == (2, 3)
    assert took(ear, 2, 4)
    assert ear.last == (2, 4)
    ear.close()


async def test_who_sends_after_a_newer_one_has_lost_the_lead() -> None:
    ear = Ear()
    ear.told(1, "llama")
    assert took(ear, 2, 5)
    assert not ear.take(sent(1, 6))
    ear.told(1, "llama")
    assert ear.last == (2, 5)
    ear.close()


async def test_what_is_not_counted_holds_nothing_up() -> None:
    ear = Ear()
    ear.told(1, "llama")
    assert ear.take(sent(1, 0))
    assert took(ear, 1, 4)
    assert ear.last == (1, 4)
    ear.close()


async def test_a_request_that_comes_before_the_first_word_counts() -> None:
    ear = Ear()
    assert took(ear, 3, 1)
    ear.told(3, "llama")
    assert ear.last == (3, 1)
    ear.close()


async def test_what_has_come_and_is_not_taken_yet_is_not_told() -> None:
    """Its body is read from the queue first, and those behind it have theirs."""
    ear = Ear()
    ear.told(1, "llama")
    notes = [sent(1, number) for number in (4, 7, 9)]
    for note in notes:
        ear.take(note)
    assert ear.last == (1, 0)
    ear.taken(notes[1])
    assert ear.last == (1, 3)
    ear.taken(notes[0])
    assert ear.last == (1, 8)
    ear.taken(notes[2])
    assert ear.last == (1, 9)
    ear.close()


async def test_what_is_unreadable_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ear = Ear()
    for data in (b"", b"[]", b'{"scheduler": "s1", "epoch": "x", "bases": []}'):
        ear.hear(Message("dispatch", data))
    assert ear.changes == []
    assert caplog.text.count("unreadable") == 3
