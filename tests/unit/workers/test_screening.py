from __future__ import annotations

from broker.base import Message
from workers.screening import Tombstones, cancelled_at


def test_a_tombstone_counts_once() -> None:
    stones = Tombstones()
    now = 1_764_000_000_000.0
    stones.add("acme.r1", now)
    stones.add("acme.r1", now)
    assert stones.pop("acme.r1", now)
    assert not stones.pop("acme.r1", now)
    assert not stones.pop("acme.r2", now)


def test_an_id_used_again_is_not_cancelled_by_its_past() -> None:
    stones = Tombstones()
    stones.add("acme.r1", 1000.0)
    assert not stones.pop("acme.r1", 121_000.0)


def test_the_oldest_tombstones_are_forgotten() -> None:
    stones = Tombstones(limit=2)
    for key in ("a", "b", "c"):
        stones.add(key, 1000.0)
    assert [stones.pop(key, 0) for key in ("a", "b", "c")] == [False, True, True]


def test_a_cancel_tells_when_the_caller_went() -> None:
    assert cancelled_at(Message("cancel.acme.r1", b'{"at": 1764000000000}'), 1.0) == 1764000000000
    words = b"null", b'"x"', b'"-inf"', b"{}"
    for garbage in (
        b"",
        b"\xff",
        b"[]",
        b"3",
        b"{}",
        b"[" * 10_000,
        *(b'{"at": %b}' % word for word in words),
    ):
        assert cancelled_at(Message("cancel.acme.r1", garbage), 1.0) == 1.0
