from __future__ import annotations

import logging
from typing import Any

import pytest

from broker.base import Message
from broker.fleet import Fleet
from broker.messages import Credit, Heartbeat, ModelCard


def beat(worker: str = "w1", **more: Any) -> Message:
    card = ModelCard(id="llama", base="llama", context_tokens=4096, paths=("/v1/completions",))
    told: dict[str, Any] = {
        "worker": worker,
        "engine": "sim",
        "base": "llama",
        "models": (card,),
        "started_ms": 1,
        "seq": 0,
        "state": "serving",
        "credit": Credit(requests=3),
    }
    return Message(f"fleet.{worker}", Heartbeat(**(told | more)).model_dump_json().encode())


def test_the_newest_heartbeat_counts() -> None:
    fleet = Fleet(lost_after=0.3)
    fleet.observe(beat(seq=1), now=10.0)
    fleet.observe(beat(seq=2, state="draining"), now=10.1)
    fleet.observe(beat("w2"), now=10.1)
    assert [(b.worker, b.seq, b.state) for b in fleet.live(10.2)] == [
        ("w1", 2, "draining"),
        ("w2", 0, "serving"),
    ]


def test_who_falls_silent_is_lost_once() -> None:
    fleet = Fleet(lost_after=0.3)
    fleet.observe(beat("w1"), now=10.0)
    fleet.observe(beat("w2"), now=10.2)
    assert fleet.expire(10.25) == []
    assert [b.worker for b in fleet.live(10.31)] == ["w2"]
    assert [b.worker for b in fleet.expire(10.31)] == ["w1"]
    assert fleet.expire(10.31) == []
    fleet.observe(beat("w1"), now=11.0)
    assert [b.worker for b in fleet.live(11.0)] == ["w1"]


def test_who_says_goodbye_is_not_lost() -> None:
    fleet = Fleet(lost_after=0.3)
    fleet.observe(beat(), now=10.0)
    fleet.observe(beat(state="gone"), now=10.1)
    assert list(fleet.live(10.1)) == []
    assert fleet.expire(99.0) == []


def test_models_are_those_of_the_living() -> None:
    fleet = Fleet(lost_after=0.3)
    adapter = ModelCard(id="ada", base="llama")
    fleet.observe(beat("w1", models=(adapter,)), now=10.0)
    fleet.observe(beat("w2"), now=10.2)
    assert set(fleet.models(10.2)) == {"llama", "ada"}
    assert set(fleet.models(10.4)) == {"llama"}


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"worker": 3}'])
def test_garbage_is_logged_and_left_out(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(lost_after=0.3)
    fleet.observe(beat(), now=10.0)
    with caplog.at_level(logging.WARNING):
        assert fleet.observe(Message("fleet.w1", data), now=10.1) is None
    assert "fleet.w1 is unreadable" in caplog.text
    assert [b.worker for b in fleet.live(10.1)] == ["w1"]
