"""Headrace without its journal and without what recovers from losses: only there to be measured against.

    python -m benchmarks.bare OFF PART ...      as `headrace PART ...`, in this process and its children

OFF names what is left out, with commas between, or is `nothing`:

journal     The stream REPLIES stores no frame, and nobody waits until it has.
recovery    A worker does not tell what it holds, does not look whether another has taken its request over,
            and takes no round trip to the broker before an acknowledgement. No process keeps what it
            published to publish it again. A scheduler neither stands for leader nor watches for lost workers.
            An ingress does not note in the journal that a request waits.
numbers     Frames do not name their tokens and carry no offsets; the ingress takes them as they come, without
            a look at epoch, number or token, and gives its events no ids.

What stays: the durable queue with its acknowledgements, cancels, frame numbers, usage events, heartbeats (the
registry and the credit are made of them), subscriptions that nobody publishes to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
from typing import Any

from nats.js import api

from broker import replies, subjects, tail, topology
from broker.assembler import Assembler
from broker.config import BrokerConfig
from broker.messages import TERMINAL, Frame
from ingress import exchange, sse
from ops import child, cli
from scheduler import guard
from workers import held, job

ALL = ("journal", "recovery", "numbers")

_NOWHERE = "bare.nowhere"
"""A subject that nobody publishes to."""

_streams = topology.streams


def _without_replies(config: BrokerConfig) -> list[api.StreamConfig]:
    return [
        dataclasses.replace(stream, subjects=[_NOWHERE]) if stream.name == subjects.REPLIES else stream
        for stream in _streams(config)
    ]


def _nothing(*_: object, **__: object) -> None:
    return None


async def _told(*_: object) -> None:
    return None


async def _ours(*_: object, **__: object) -> bool:
    return True


async def _for_ever(*_: object) -> None:
    await asyncio.Event().wait()


def _as_it_comes(assembler: Assembler, frame: Frame) -> list[Frame]:
    assembler.finished = frame.kind in TERMINAL
    return [frame]


INSTEAD: dict[str, tuple[tuple[Any, str, object], ...]] = {
    "nothing": (),
    "journal": (
        (topology, "streams", _without_replies),
        (replies.Writer, "_publish_last", replies.Writer._publish),
        (replies.Writer, "kept", _told),
    ),
    "recovery": (
        (held.Held, "take", _nothing),
        (held.Held, "drop", _nothing),
        (held.Held, "tell", _told),
        (job.Job, "_ours", _ours),
        (job.Touch, "lost", False),
        (tail.Tail, "add", _nothing),
        (guard.Guard, "on_heartbeat", _nothing),
        (guard.Guard, "on_held", _nothing),
        (guard.Guard, "run", _for_ever),
        (exchange.Exchange, "_note_left", lambda *_: math.inf),
    ),
    "numbers": (
        (replies.Writer, "_number", _nothing),
        (Assembler, "feed", _as_it_comes),
        (sse, "numbered", lambda frame, after=None: frame.payload),
    ),
}


def leave_out(off: str) -> None:
    """Leave the parts named in `off` out of this process and of those that `headrace up` starts in it."""
    for part in off.split(","):
        for owner, name, instead in INSTEAD[part]:
            getattr(owner, name)  # what is not there any more would not be left out
            setattr(owner, name, instead)
    child.PROGRAM = ("-m", "benchmarks.bare", off)


if __name__ == "__main__":
    leave_out(sys.argv.pop(1))
    sys.exit(cli.main())
