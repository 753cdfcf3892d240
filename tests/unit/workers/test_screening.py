from __future__ import annotations

import time

from broker import replies
from broker.base import Message
from workers.screening import Tombstones, cancelled_at


def test_a_tombstone_counts_once() -> None:
    stones = Tombstones()
    stones.add("acme.r1")
    stones.add("acme.r1")
    now = time.time() * 1000
    assert stones.pop("acme.r1", now)
    assert not stones.pop("acme.r1", now)
    assert not stones.pop("acme.r2", now)


def test_an_id_used_again_is_not_cancelled_by_its_past() -> None:
    stones = Tombstones()
    stones.add("acme.r1")
    assert not stones.pop("acme.r1", time.time() * 1000 + 120_000)


def test_the_oldest_tombstones_are_forgotten() -> None:
    stones = Tombstones(limit=2)
    for key in ("a", "b", "c"):
        stones.add(key)
    assert [stones.pop(key, 0) for key in ("a", "b", "c")] == [False, True, True]


def test_a_cancel_tells_when_the_caller_went() -> None:
    assert cancelled_at(Message("cancel.acme.r1", b'{"at": 1764000000000}')) == 1764000000000
    now = replies.now_ms()
    for garbage in (b"", b"\xff", b"[]", b"3", b"{}", b'{"at": null}', b'{"at": "x"}', b"[" * 10_000):
        assert now <= cancelled_at(Message("cancel.acme.r1", garbage)) <= replies.now_ms()
