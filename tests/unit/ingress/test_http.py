"""Reading a request's body: whole, too large, too slow, abandoned."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import errors
from ingress import http
from ingress.http import ClientGone, Receive


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


async def test_the_parts_are_joined() -> None:
    for parts in ([b""], [b"abc"], [b"ab", b"", b"c"]):
        receive, left = receiving(*parts)
        assert await http.read_body({}, receive, 3, 1) == b"".join(parts)
        assert not left


@pytest.mark.parametrize("headers", [{}, {b"content-length": b"4"}])
async def test_a_larger_one_is_read_to_its_end_and_refused(headers: dict[bytes, bytes]) -> None:
    """Or its sender, still sending, would never read the answer."""
    for parts in ([b"abcd"], [b"ab", b"cd"], [b"abcd", b"e", b"f"]):
        receive, left = receiving(*parts)
        with pytest.raises(errors.TooLarge, match="3 bytes"):
            await http.read_body(headers, receive, 3, 1)
        assert not left


async def test_a_boundless_one_is_cut_off() -> None:
    part = b"x" * 2**20

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": part, "more_body": True}

    with pytest.raises(errors.TooLarge):
        await http.read_body({}, receive, 3, 30)


async def test_a_client_that_leaves_has_nobody_to_answer() -> None:
    receive, _ = receiving(b"ab", ends=False)
    with pytest.raises(ClientGone):
        await http.read_body({}, receive, 3, 1)


async def test_a_slow_one_is_given_up() -> None:
    with pytest.raises(errors.BodyTimeout, match=r"0\.01 s"):
        await http.read_body({}, asyncio.Event().wait, 3, 0.01)  # type: ignore[arg-type]
