"""A worker without an engine: prebuilt reply frames at a set pace, to load an ingress to its limit.

A real worker spends more on a token than ingress does, so on two cores it would be the one measured.
This one heartbeats, pulls and acknowledges like a worker, and publishes bytes that are made once:
frames carry nothing that differs between requests but their subject.

    python -m benchmarks.frame_source NATS_URL TOKENS ITL_MS
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from dataclasses import dataclass

import orjson
import uvloop

from broker import base, client, codec, subjects
from broker.config import BrokerConfig
from broker.messages import Credit, Frame, FrameKind, Heartbeat, ModelCard, ServiceClass, parse_request

MODEL = "frames"
CREDIT = 1024
"""Requests asked for ahead; more than any benchmark here keeps open."""
TICK = 0.001
BEAT = 0.1


def sse(delta: dict[str, str], **extra: object) -> bytes:
    """One event of the size that an engine sends."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [choice],
        **extra,
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def frames(tokens: int) -> list[bytes]:
    """Every frame of a stream of `tokens` one-token events, encoded."""
    head = {"status": 200, "headers": {"content-type": "text/event-stream; charset=utf-8"}, "worker": MODEL}
    built = [Frame(1, 0, FrameKind.HEAD, payload=sse({"role": "assistant", "content": ""}), extra=head)]
    built += [
        Frame(1, n + 1, FrameKind.DATA, off=n, ids=[n], payload=sse({"content": f" word{n}"}))
        for n in range(tokens)
    ]
    usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens}
    last = b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n"
    built.append(Frame(1, tokens + 1, FrameKind.DATA, off=tokens, payload=last))
    built.append(Frame(1, tokens + 2, FrameKind.END, off=tokens, extra={"usage": usage}))
    return [codec.encode(frame) for frame in built]


@dataclass(slots=True)
class _Stream:
    delivery: base.Delivery
    subject: str
    next: int
    due: float


async def serve(url: str, tokens: int, itl: float) -> None:
    """Answer every request with `tokens` frames, one each `itl` seconds, until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    encoded = frames(tokens)
    streams: list[_Stream] = []
    broker = await client.connect(BrokerConfig(url=url), MODEL)
    async with broker:

        def take(delivery: base.Delivery) -> None:
            request = parse_request(delivery.subject, dict(delivery.headers or {}), delivery.data)
            streams.append(_Stream(delivery, request.reply_to, 0, time.perf_counter()))

        pullers = [await broker.pull(MODEL, cls, take, lambda: None) for cls in ServiceClass]
        beats = itertools.count()
        beat_due = 0.0
        print("ready", flush=True)
        while not stop.is_set():
            now = time.perf_counter()
            if now >= beat_due:
                beat_due = now + BEAT
                await broker.publish(subjects.heartbeat(MODEL), _heartbeat(next(beats)))
                for puller in pullers:
                    await puller.ask(CREDIT - puller.outstanding)
            for stream in streams:
                if stream.due <= now:
                    stream.due += itl
                    await broker.publish(stream.subject, encoded[stream.next])
                    stream.next += 1
                    if stream.next == len(encoded):
                        await stream.delivery.ack()
            streams = [stream for stream in streams if stream.next < len(encoded)]
            await asyncio.sleep(TICK)


def _heartbeat(seq: int) -> bytes:
    card = ModelCard(id=MODEL, base=MODEL, context_tokens=8192, paths=("/v1/chat/completions",))
    beat = Heartbeat(
        worker=MODEL,
        engine="sim",
        base=MODEL,
        models=(card,),
        started_ms=0,
        seq=seq,
        state="serving",
        credit=Credit(requests=CREDIT, slots_free=CREDIT, slots_total=CREDIT),
    )
    return beat.model_dump_json().encode()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000))
