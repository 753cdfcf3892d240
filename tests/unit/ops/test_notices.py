"""What `headrace up` says, and how often."""

from __future__ import annotations

import logging

import pytest

from broker.base import Message
from broker.messages import Command, Dispatch, ServiceClass, Steps
from ops.notices import Notices


def word(*steps: Steps) -> Message:
    told = Dispatch(scheduler="s1", epoch=1, bases=("sim",), steps=steps)
    return Message("dispatch", told.model_dump_json().encode())


def pool(ms: float, workers: int = 2, *classes: ServiceClass) -> Steps:
    return Steps(base="sim", classes=classes or (ServiceClass.BATCH,), workers=workers, tokens=512, ms=ms)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "ops.notices")
    return caplog


def test_steps_are_told_when_they_are_other_ones(heard: pytest.LogCaptureFixture) -> None:
    notices = Notices()
    for steps in ((), (pool(30),), (pool(31),), (pool(44),), (), (pool(46),), (pool(46, 3),), (pool(15, 3),)):
        notices.on_dispatch(word(*steps))
    assert [record.getMessage() for record in heard.records] == [
        f"batch requests: {workers} workers, whose steps take up to 512 prompt tokens and {ms:.1f} ms"
        for workers, ms in ((2, 30), (2, 46), (3, 46), (3, 15))
    ]


def test_pools_are_told_one_by_one(heard: pytest.LogCaptureFixture) -> None:
    notices = Notices()
    shared = pool(9, 1, ServiceClass.INTERACTIVE, ServiceClass.STANDARD)
    notices.on_dispatch(word(shared, pool(30)))
    notices.on_dispatch(word(pool(9, 1, *ServiceClass)))
    notices.on_dispatch(word(shared, pool(30)))
    said = [record.getMessage().partition(":")[0] for record in heard.records]
    assert said == [
        "interactive, standard requests",
        "batch requests",
        "interactive, standard, batch requests",
        "interactive, standard requests",
        "batch requests",
    ]


def test_of_commands_it_tells_what_is_taken_back(heard: pytest.LogCaptureFixture) -> None:
    notices = Notices()
    for do in ("drain", "preempt", "load"):
        command = Command(do=do, request="acme.r%2E1", reason="request 7, interactive, needs its room")
        notices.on_command(Message("ctl.w%2E1", command.model_dump_json().encode()))
    (record,) = heard.records
    assert record.getMessage().endswith("and to go on later: request 7, interactive, needs its room")
    assert vars(record)["worker"] == "w.1"
    assert vars(record)["request"] == "acme.r%2E1"


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"do": "dance"}'])
def test_garbage_is_nothing_to_tell(heard: pytest.LogCaptureFixture, data: bytes) -> None:
    notices = Notices()
    notices.on_dispatch(Message("dispatch", data))
    notices.on_command(Message("ctl.w1", data))
    assert not heard.records
