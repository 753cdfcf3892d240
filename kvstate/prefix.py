"""Hashes of a prompt's prefix blocks: what two requests have in common, one cache can share. Pure."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence

BLOCK = 512
"""Bytes of canonical prompt in a block."""

BLOCK_TOKENS = BLOCK // 4
"""Tokens in a block, by the estimate that is used wherever no engine has counted."""

LIMIT = 64
"""Blocks that are named; what comes after them is not told apart."""


def seed(salt: str, model: str) -> bytes:
    """Where a chain begins: tenants with different salts share nothing, nor do different models.

    An adapter is a model of its own, since engines key their blocks by it.
    """
    key = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    return hashlib.blake2b(model.encode(), key=key, digest_size=16).digest()


def chain(prompt: bytes, seed: bytes) -> tuple[int, ...]:
    """64-bit hashes of the first full blocks of `prompt`, each of everything up to its block's end."""
    hashes, link = [], seed
    for start in range(0, min(len(prompt), LIMIT * BLOCK) - BLOCK + 1, BLOCK):
        link = hashlib.blake2b(link + prompt[start : start + BLOCK], digest_size=8).digest()
        hashes.append(int.from_bytes(link, "big"))
    return tuple(hashes)


def encode(hashes: Sequence[int]) -> str:
    """The form for a header: base64 of 8 bytes a hash."""
    return base64.b64encode(struct.pack(f">{len(hashes)}Q", *hashes)).decode()


def read(header: str) -> tuple[int, ...]:
    """`decode`, of what a publisher sent: what can't be read is as if it were not there."""
    try:
        return decode(header) if header else ()
    except ValueError:
        return ()


def decode(text: str, most: int = LIMIT) -> tuple[int, ...]:
    """What `encode` made `text` of. Raises ValueError if that is not up to `most` hashes."""
    raw = base64.b64decode(text, validate=True)
    if len(raw) % 8 or len(raw) > 8 * most:
        raise ValueError(f"{len(raw)} bytes are not up to {most} hashes of 8")
    hashes = struct.unpack(f">{len(raw) // 8}Q", raw)
    if encode(hashes) != text:
        raise ValueError("not the base64 of whole bytes")
    return hashes
