"""Which frames are published again: the latest, of each reply in order."""

from __future__ import annotations

import gc

from broker.tail import Tail

ONE, OTHER = "out.acme.box.r1", "out.acme.box.r2"


def test_it_keeps_each_replys_frames_in_order() -> None:
    tail = Tail(10, 1000)
    for number in range(3):
        tail.add(ONE, b"%d" % number, now=number)
        tail.add(OTHER, b"x", now=number)
    assert tail.keys(now=3) == ["acme.r1", "acme.r2"]
    assert tail.of("acme.r1") == [(ONE, b"0"), (ONE, b"1"), (ONE, b"2")]
    assert tail.of("acme.r3") == []


def test_it_forgets_with_time() -> None:
    tail = Tail(10, 1000)
    tail.add(ONE, b"1", now=0)
    tail.add(OTHER, b"2", now=5)
    assert tail.keys(now=10) == ["acme.r1", "acme.r2"]
    assert tail.keys(now=12) == ["acme.r2"]
    assert tail.keys(now=20) == []
    assert tail.of("acme.r2") == []


def test_it_forgets_the_oldest_past_its_size() -> None:
    tail = Tail(10, 100)
    for number in range(4):
        tail.add(ONE, b"%d" % number * 40, now=0)
    assert [data[:1] for _, data in tail.of("acme.r1")] == [b"2", b"3"]
    tail.add(OTHER, b"x" * 101, now=0)
    assert tail.keys(now=0) == []


def test_a_reply_under_two_subjects_is_one() -> None:
    tail = Tail(10, 1000)
    elsewhere = "out.acme.other.r1"
    tail.add(ONE, b"1", now=0)
    tail.add(elsewhere, b"2", now=5)
    assert tail.keys(now=6) == ["acme.r1"]
    assert tail.of("acme.r1") == [(ONE, b"1"), (elsewhere, b"2")]
    assert tail.keys(now=12) == ["acme.r1"]
    assert tail.of("acme.r1") == [(elsewhere, b"2")]


def test_it_gives_the_garbage_collector_nothing_to_do() -> None:
    tail = Tail(10, 10**6)
    tail.add(ONE, b"x", now=0.0)
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        for number in range(1000):
            tail.add(ONE, b"%d" % number, now=number / 1000)
        assert gc.get_count()[0] - before < 100
    finally:
        gc.enable()
