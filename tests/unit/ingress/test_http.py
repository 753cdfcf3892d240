"""Reading a request's body: whole, too large, too slow, abandoned."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import errors
from ingress import http
from ingress.http import ClientGone, Receive, Turn
from tests.waiting import until


def receiving(*parts: bytes, ends: bool = True) -> tuple[Receive, list[dict[str, Any]]]:
    """What an ASGI server hands out, and what of it has not been read."""
    last = len(parts) - 1
    left: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": not ends or n < last}
        for n, part in enumerate(parts)
    ]
    if not ends:
        left.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    return receive, left


def turn(places: asyncio.Semaphore | None = None, large: int = 1_000) -> Turn:
    return Turn(places or asyncio.Semaphore(1), large)


async def test_the_parts_are_joined() -> None:
    for parts in ([b""], [b"abc"], [b"ab", b"", b"c"]):
        receive, left = receiving(*parts)
        assert await http.read_body({}, receive, 3, 1, turn()) == b"".join(parts)
        assert not left


@pytest.mark.parametrize("headers", [{}, {b"content-length": b"4"}])
async def test_a_larger_one_is_read_to_its_end_and_refused(headers: dict[bytes, bytes]) -> None:
    """Or its sender, still sending, would never read the answer."""
    for parts in ([b"abcd"], [b"ab", b"cd"], [b"abcd", b"e", b"f"]):
        receive, left = receiving(*parts)
        with pytest.raises(errors.TooLarge, match="3 bytes"):
            await http.read_body(headers, receive, 3, 1, turn())
        assert not left


async def test_a_boundless_one_is_cut_off() -> None:
    part = b"x" * 2**20

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": part, "more_body": True}

    with pytest.raises(errors.TooLarge):
        await http.read_body({}, receive, 3, 30, turn())


async def test_a_client_that_leaves_has_nobody_to_answer() -> None:
    receive, _ = receiving(b"ab", ends=False)
    with pytest.raises(ClientGone):
        await http.read_body({}, receive, 3, 1, turn())


async def test_a_slow_one_is_given_up() -> None:
    with pytest.raises(errors.BodyTimeout, match=r"0\.01 s"):
        await http.read_body({}, asyncio.Event().wait, 3, 0.01, turn())  # type: ignore[arg-type]


async def test_a_large_one_waits_for_its_turn_unread() -> None:
    places = asyncio.Semaphore(1)
    first, second = turn(places, 3), turn(places, 3)
    assert await http.read_body({}, receiving(b"ab", b"cd")[0], 9, 1, first) == b"abcd"
    receive, left = receiving(b"ab", b"cd", b"ef")
    reading = asyncio.create_task(http.read_body({}, receive, 9, 10, second))
    await until(places.locked)
    await until(lambda: len(left) == 1)
    assert await http.read_body({}, receiving(b"ab", b"c")[0], 9, 1, turn(places, 3)) == b"abc"  # a small one
    assert len(left) == 1
    assert not reading.done()
    first.end()
    first.end()  # gives back one place only
    assert await asyncio.wait_for(reading, 10) == b"abcdef"
    assert places.locked()


async def test_a_declared_length_waits_before_the_first_byte_and_not_for_ever() -> None:
    places = asyncio.Semaphore(0)
    receive, left = receiving(b"ab", b"cd")
    with pytest.raises(errors.BodyTimeout):
        await http.read_body({b"content-length": b"4"}, receive, 9, 0.01, turn(places, 3))
    assert len(left) == 1
