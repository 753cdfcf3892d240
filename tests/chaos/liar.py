"""What a worker might say that is not so, of its room and of its requests, and what is no message at all."""

from __future__ import annotations

import random
from collections.abc import Iterator

from broker import subjects
from broker.messages import Cached, Credit, Heartbeat, News

EVERY = 0.05
"""Seconds from one lie to the next: two for each true heartbeat."""

_MUCH = 10**30
_CREDITS = (
    Credit(requests=_MUCH, slots_free=_MUCH, slots_total=_MUCH, step_tokens=_MUCH, kv_tokens_free=_MUCH),
    Credit(slots_free=1000, slots_total=1000, step_tokens=2048, kv_tokens_free=10**6, kv_tokens_total=10**6),
    Credit(slots_free=-5, step_tokens=-5, kv_tokens_free=-_MUCH, held=-_MUCH, prefill_tokens_held=-1),
    Credit(kv_tokens_total=1000, kv_block_tokens=-_MUCH),
    Credit(),
)
_GARBAGE = b"", b"[]", b"\xff{", b'{"worker": 7}', b"9" * 10_000


def lies(true: Heartbeat, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """Subject and data of message after message in the name of the worker of that heartbeat, for ever."""
    heartbeat = subjects.heartbeat(true.worker)
    news, held, cached = (of(true.worker) for of in (subjects.credit, subjects.held, subjects.cached))
    while True:
        credit, seq = dice.choice(_CREDITS), dice.randrange(20_000)
        beat = true.model_copy(update={"credit": credit, "dispatched": (1, dice.randrange(_MUCH))})
        told = News(
            worker=true.worker,
            credit=credit,
            dispatched=(dice.choice((dice.randrange(100), true.dispatched[0])), dice.randrange(_MUCH)),
            first=((seq, -3),),
            done=((seq, -1, _MUCH, dice.randrange(-_MUCH, _MUCH)),),
        )
        yield heartbeat, beat.model_dump_json().encode()
        yield news, told.model_dump_json().encode()
        blocks = Cached(
            worker=true.worker,
            started_ms=true.started_ms,
            number=dice.randrange(_MUCH),
            whole=dice.random() < 0.5,
        )
        yield cached, blocks.model_dump_json().encode()
        yield dice.choice((heartbeat, news, held, cached)), dice.choice(_GARBAGE)
