"""The language that the simulated model speaks: every next token is known beforehand.

A token is a function of all token ids before it (their CRC-32), so whoever holds the prompt can say
what the model must answer, a token lost, doubled or out of place shows, and prompt plus output, given
as a new prompt, goes on with the very same stream. An adapter's tokens differ from its base's by its name. An
output token also carries its own number:

    bit 30: 1 = output | bits 12-29: its number from 0, modulo 2**18 | bits 0-11: the hash

A prompt token has 17 bits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

OUTPUT = 1 << 30
MAX_OUTPUT = 1 << 18
MAX_CHOICES = 1 << 12
_NUMBER = MAX_OUTPUT - 1
_HASH = MAX_CHOICES - 1
# Knuth's multiplicative hash: 2**32 over the golden ratio.
_GOLDEN = 2654435761
_pack_one = struct.Struct("<I").pack


def tokenize(text: str) -> list[int]:
    """Four UTF-8 bytes a token: a prefix of the text has the same tokens, but for its last one."""
    data = text.encode("utf-8", "surrogatepass")
    count = -(-len(data) // 4)
    words = struct.unpack(f"<{count}I", data.ljust(4 * count, b"\0"))
    return [(word * _GOLDEN & 0xFFFFFFFF) >> 15 for word in words]


def chat_prompt(messages: Iterable[tuple[str, str]]) -> str:
    """The chat template: (role, content) pairs, then the turn of the assistant."""
    return "".join(f"<|{role}|>{content}\n" for role, content in messages) + "<|assistant|>"


def text_of(token_ids: Iterable[int]) -> str:
    """Output token 3 reads ` t3:0af`. Plain ASCII, nothing that JSON would escape."""
    return "".join(map(text_of_token, token_ids))


def text_of_token(token: int) -> str:
    if token & OUTPUT:
        return f" t{token >> 12 & _NUMBER}:{token & _HASH:03x}"
    return f" p{token:x}"


class Continuation:
    """What follows a sequence of token ids, for one of `n` choices, as `adapter` says it; "" = the base.

    Raises ValueError when `token_ids` is empty or holds what is no token.
    """

    __slots__ = ("_choice", "_crc", "_number")

    def __init__(self, token_ids: list[int], choice: int = 0, adapter: str = "") -> None:
        if not token_ids:
            raise ValueError("there is no token to go on from")
        try:
            self._crc = zlib.crc32(struct.pack(f"<{len(token_ids)}I", *token_ids), salt_of(adapter))
        except struct.error as exc:
            raise ValueError(f"not a list of token ids: {exc}") from exc
        last = token_ids[-1]
        self._number = (last >> 12 & _NUMBER) + 1 if last & OUTPUT else 0
        # Only the first token knows the choice; each later one follows from that.
        self._choice = choice

    @property
    def number(self) -> int:
        """Number of the next output token."""
        return self._number

    def take(self, count: int) -> list[int]:
        """The next `count` tokens."""
        ids = []
        for _ in range(count):
            digest = ((self._crc * _GOLDEN & 0xFFFFFFFF) >> 20) + self._choice & _HASH
            token = OUTPUT | (self._number & _NUMBER) << 12 | digest
            self._crc = zlib.crc32(_pack_one(token), self._crc)
            self._number += 1
            self._choice = 0
            ids.append(token)
        return ids


def salt_of(adapter: str) -> int:
    """What sets an adapter's tokens and KV blocks apart from the base's and from any other's."""
    return zlib.crc32(adapter.encode("utf-8", "surrogatepass")) if adapter else 0


def expected_tokens(prompt_ids: list[int], n: int, choice: int = 0, adapter: str = "") -> list[int]:
    """The first `n` tokens of the answer to `prompt_ids`; `adapter` as it is served, `<name>@<version>`."""
    return Continuation(prompt_ids, choice, adapter).take(n)
