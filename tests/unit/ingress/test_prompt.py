"""What the dispatcher is told of a prompt."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from ingress import prompt
from kvstate import prefix

SYSTEM = {"role": "system", "content": "You are a clerk. " * 100}


def hashes(model: str = "llama", **body: Any) -> tuple[int, ...]:
    found = prompt.hashes(body, len(orjson.dumps(body)), model)
    return prefix.decode(found) if found else ()


def chat(*texts: str, **more: Any) -> tuple[int, ...]:
    return hashes(messages=[SYSTEM, *({"role": "user", "content": text} for text in texts)], **more)


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next(
        (n for n, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1),
        min(len(one), len(other)),
    )


def test_one_beginning_has_one_chain() -> None:
    one, other = chat("a" * 5000), chat("b" * 5000)
    assert len(one) == len(other) == (1700 + 5000) // prefix.BLOCK
    assert shared(one, other) == 1700 // prefix.BLOCK


def test_a_conversation_goes_on_from_its_own_beginning() -> None:
    first = chat("a" * 2000)
    assert chat("a" * 2000, "and then?" * 100)[: len(first)] == first


def test_what_is_no_part_of_the_prompt_changes_nothing() -> None:
    assert chat("a" * 900, temperature=0.1, stream=True) == chat("a" * 900, max_tokens=7)


@pytest.mark.parametrize(
    "change", [{"tools": [{"type": "function"}]}, {"cache_salt": "s"}, {"model": "support@3"}]
)
def test_what_caches_are_apart_by_makes_another_chain(change: dict[str, Any]) -> None:
    assert shared(chat("a" * 900), chat("a" * 900, **change)) == 0


def test_a_role_is_told_apart_from_a_text() -> None:
    texts = [{"role": role, "content": "x" * 2000} for role in ("user", "assistant")]
    assert shared(hashes(messages=texts[:1]), hashes(messages=texts[1:])) == 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * 2000},
        {"prompt": ["a" * 2000]},
        {"input": "a" * 2000},
        {"system": "a" * 2000, "messages": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 2000}]}]},
    ],
)
def test_every_form_of_a_prompt_is_read(body: dict[str, Any]) -> None:
    assert len(hashes(**body)) >= 2000 // prefix.BLOCK


def test_no_more_is_hashed_than_a_header_holds() -> None:
    assert len(hashes(prompt="a" * 10**6)) == prefix.LIMIT
    assert len(hashes(messages=[SYSTEM] * 1000)) == prefix.LIMIT


def test_parts_of_a_very_large_body_are_not_written_anew() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x" * 2**21}}]}
    assert hashes(messages=[image]) == ()


@pytest.mark.parametrize(
    "body", [{}, {"messages": None}, {"messages": [None, 3]}, {"prompt": [1, 2]}, {"input": {}}]
)
def test_what_is_short_or_no_prompt_has_no_hashes(body: dict[str, Any]) -> None:
    assert prompt.hashes(body, 10, "llama") == ""


@pytest.mark.parametrize(
    ("body", "bound"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 9, "max_tokens": 7}, 9),
        ({"max_output_tokens": 3}, 3),
        ({"max_tokens": 10**30}, 999_999_999),
        ({"max_tokens": True}, 0),
        ({"max_tokens": "7"}, 0),
        ({"max_tokens": -1}, 0),
        ({}, 0),
    ],
)
def test_the_bound_of_an_answer(body: dict[str, Any], bound: int) -> None:
    assert prompt.budget(body) == bound
