from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstate import prefix

SEED = prefix.seed("salt", "model")
texts = st.text(max_size=12)


def bytes_of(blocks: int) -> st.SearchStrategy[bytes]:
    """Prompts up to so many blocks long; few letters, so that blocks are alike."""
    return st.lists(st.sampled_from([b"a" * 256, b"b" * 256, b"c"]), max_size=2 * blocks).map(b"".join)


@given(bytes_of(5), bytes_of(5))
def test_prompts_share_the_hashes_of_the_full_blocks_that_both_begin_with(one: bytes, other: bytes) -> None:
    first, second = prefix.chain(one, SEED), prefix.chain(other, SEED)
    for depth in range(1, max(len(first), len(second)) + 1):
        same = one[: depth * prefix.BLOCK] == other[: depth * prefix.BLOCK]
        full = min(len(one), len(other)) >= depth * prefix.BLOCK
        assert (first[:depth] == second[:depth] and len(first[:depth]) == depth) == (same and full)


@given(st.integers(0, 70 * prefix.BLOCK))
def test_only_full_blocks_are_hashed_and_at_most_the_limit(length: int) -> None:
    hashes = prefix.chain(b"x" * length, SEED)
    assert len(hashes) == min(prefix.LIMIT, length // prefix.BLOCK)
    assert len(set(hashes)) == len(hashes)
    assert all(0 <= each < 2**64 for each in hashes)


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_a_chain_is_of_one_salt_and_one_model(one: tuple[str, str], other: tuple[str, str]) -> None:
    prompt = b"x" * prefix.BLOCK
    same = prefix.chain(prompt, prefix.seed(*one)) == prefix.chain(prompt, prefix.seed(*other))
    assert same == (one == other)


def test_hashes_are_the_same_in_every_process() -> None:
    assert prefix.chain(b"x" * 1024, SEED) == (5596252622444825081, 14454679697490229794)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=prefix.LIMIT).map(tuple))
def test_the_header_tells_the_hashes(hashes: tuple[int, ...]) -> None:
    text = prefix.encode(hashes)
    assert prefix.decode(text) == hashes
    assert text.isascii()
    assert not any(character.isspace() for character in text)


@given(
    st.text() | st.text("AQ=/ +", max_size=24) | st.binary(max_size=40).map(lambda raw: raw.decode("latin-1"))
)
def test_a_header_that_was_never_encoded_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert prefix.encode(prefix.decode(text)) == text


@pytest.mark.parametrize("text", ["AAAA", "AAAAAAAAAAB=", "AAAAAAAAAAA", "é", prefix.encode([1] * 65)])
def test_headers_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        prefix.decode(text)
