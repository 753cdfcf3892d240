"""Rendezvous hashing (highest random weight): which workers a model would rather have. Pure.

A weight depends on the model and the worker alone. So a worker that comes or goes changes nothing between
the others, and every scheduler finds the same ones.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

PRIME = (1 << 61) - 1


@lru_cache(maxsize=65536)
def point(name: str) -> int:
    """A name as a number from 1 to 2^61 - 2."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (PRIME - 1) + 1


def weight(model: int, worker: int) -> int:
    """Of two `point`s; the highest wins.

    One multiplication where a hash of the pair would cost ten times as much: a thousand workers times
    hundreds of models are weighed in one plan. Workers' points are random, and so is their order when
    all are multiplied by a model's.
    """
    return model * worker % PRIME
