"""When a worker counts as full."""

from __future__ import annotations

from ingress.load import Load


def test_a_worker_is_full_after_a_while_without_room() -> None:
    load = Load()
    assert not load.full("w", 0)
    load.observe("w", True, 0)
    assert not load.full("w", 0.5)
    assert load.full("w", 2.5)


def test_a_moment_of_room_between_two_requests_ends_nothing() -> None:
    load = Load()
    load.observe("w", True, 0)
    for at in range(1, 50):
        load.observe("w", False, at / 10)
        load.observe("w", True, at / 10 + 0.001)
    assert load.full("w", 5)


def test_room_ends_it() -> None:
    load = Load()
    load.observe("w", True, 0)
    load.observe("w", False, 5)
    assert load.full("w", 5)
    assert not load.full("w", 5.2)


def test_who_left_is_forgotten() -> None:
    load = Load()
    load.observe("w", True, 0)
    load.forget("w")
    assert load.share("w", 9) == 0
