"""A light SSE load generator: closed-loop streams over raw sockets, in a process of its own.

Record now, decode later: while streams run, a read costs one `(time, bytes)` append, so that the load
takes little of the cores it shares with the servers under test. Everything is decoded after the last
stream ends, and each stream is checked: status 200, `[DONE]`, and exactly the tokens it asked for. A
broken server can't look fast.

TTFT runs from the write of the request to the read that completes the first event with text in it. A
chunk that only names the role bears no text and does not count, whoever sends it.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import orjson
import uvloop

LAST_CHUNK = b"0\r\n\r\n"
now = time.perf_counter  # uvloop's own clock moves in steps of 1 ms


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. Times in seconds.

    Attributes:
        streams: streams open at once; each sends its next request when its last one has ended.
        requests: requests in all.
        spread: streams start evenly over this time, not in one burst.
        think: mean pause of a stream between two requests (exponential), so that streams stay spread.
        one_event_per_token: the server sends each token as an event of its own (the sim does; vLLM
            may join tokens), so events are checked too.
        extra: further fields of the request body.
        each: those of single requests, by number, of the first ones; `max_tokens` among them counts.
    """

    url: str
    model: str
    streams: int
    requests: int
    max_tokens: int
    spread: float = 0.0
    think: float = 0.0
    timeout: float = 120.0
    one_event_per_token: bool = True
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    each: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Result:
    """What came back. Times in seconds.

    Attributes:
        wall: first request to last byte.
        cpu: CPU time this load took meanwhile.
        ttft: one for each good stream.
        gaps: between consecutive events with text, of all good streams.
        latency: request to last byte, one for each good stream.
        prompt_tokens, cached_tokens: of good streams, as the server counts them.
        events: events with text, of good streams.
        failures: why each bad stream is bad.
        digest: of every stream's text, by prompt: equal for two servers that say the same.
    """

    wall: float = 0.0
    cpu: float = 0.0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    events: int = 0
    failures: list[str] = field(default_factory=list)
    digest: str = ""


@dataclass(slots=True)
class Stream:
    """One request and the reads that answered it."""

    number: int
    sent: float = 0.0
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    broken: str = ""


class Connection(asyncio.Protocol):
    """A keep-alive connection that carries one stream at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._stream: Stream | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports don't inherit from it

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            return
        reads = stream.reads
        reads.append((now(), data))
        if len(reads) == 1 and not data.startswith(b"HTTP/1.1 200"):
            self._finish("status: " + data[:400].decode("latin-1"))
            return
        if len(data) < len(LAST_CHUNK):  # the last chunk itself, cut between two reads
            data = b"".join(part for _, part in reads[-len(LAST_CHUNK) :])
        if data.endswith(LAST_CHUNK):
            self._finish("")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._finish(f"connection lost: {exc!r}")

    def _finish(self, broken: str) -> None:
        if self._stream is not None and self._done is not None:
            self._stream.broken = broken
            if not self._done.done():
                self._done.set_result(None)
        self._stream = self._done = None
        if broken:
            self.close()

    @property
    def open(self) -> bool:
        return self._transport is not None

    async def run(self, stream: Stream, request: bytes, timeout: float) -> None:
        assert self._transport is not None
        self._stream = stream
        self._done = done = self._loop.create_future()
        stream.sent = now()
        self._transport.write(request)
        try:
            async with asyncio.timeout(timeout):
                await done
        except TimeoutError:
            self._finish(f"no end within {timeout} s")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def prompt(number: int) -> str:
    """A prompt that names its request, so that a mixed-up stream is noticed."""
    return f"Request {number}: tell me about the mill race and the wheel it drives."


def _own(load: Load, number: int) -> dict[str, Any]:
    return load.each[number] if number < len(load.each) else {}


def request_bytes(load: Load, number: int) -> bytes:
    body = orjson.dumps(
        {
            "model": load.model,
            "messages": [{"role": "user", "content": prompt(number)}],
            "max_tokens": load.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **load.extra,
            **_own(load, number),
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(load.url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _drive(load: Load) -> tuple[list[Stream], float, float]:
    """Run the load; returns the streams, wall time and own CPU time."""
    loop = asyncio.get_running_loop()
    target = urlsplit(load.url)
    host, port = target.hostname or "127.0.0.1", target.port or 80
    requests = [request_bytes(load, number) for number in range(load.requests)]
    streams = [Stream(number) for number in range(load.requests)]
    numbers = iter(range(load.requests))
    dice = random.Random(load.seed)

    async def slot(connection: Connection, delay: float) -> None:
        await asyncio.sleep(delay)
        for number in numbers:
            if not connection.open:
                _, connection = await loop.create_connection(Connection, host, port)
            await connection.run(streams[number], requests[number], load.timeout)
            if load.think:
                await asyncio.sleep(dice.expovariate(1 / load.think))
        connection.close()

    connections = [(await loop.create_connection(Connection, host, port))[1] for _ in range(load.streams)]
    gc.collect()
    gc.disable()
    started, cpu = now(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for index, connection in enumerate(connections):
            group.create_task(slot(connection, load.spread * index / load.streams))
    cpu = time.process_time() - cpu
    gc.enable()
    ended = max((stream.reads[-1][0] for stream in streams if stream.reads), default=now())
    return streams, ended - started, cpu


def events(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The `data:` events of a chunked HTTP answer, each with the time of the read that completed it."""
    raw, body, in_head = bytearray(), bytearray(), True
    for at, data in reads:
        raw += data
        if in_head:
            end = raw.find(b"\r\n\r\n")
            if end < 0:
                continue
            del raw[: end + 4]
            in_head = False
        while (line := raw.find(b"\r\n")) >= 0:
            size = int(raw[:line], 16)
            if len(raw) < line + 2 + size + 2:
                break
            body += raw[line + 2 : line + 2 + size]
            del raw[: line + 2 + size + 2]
        while (end := body.find(b"\n\n")) >= 0:
            event = bytes(body[:end])
            del body[: end + 2]
            _, found, data = (b"\n" + event).partition(b"\ndata: ")  # a comment may stand before it
            if found:
                yield at, data.partition(b"\n")[0]  # Headrace adds an id


def _text(event: dict[str, Any]) -> str:
    return "".join(
        choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in event["choices"]
    )


def _judge(stream: Stream, load: Load, result: Result) -> str:
    """Add a good stream to `result`; returns its text. Raises ValueError when it is not good."""
    if stream.broken:
        raise ValueError(stream.broken)
    times: list[float] = []
    words: list[str] = []
    tokens, done, asked = -1, False, _own(load, stream.number).get("max_tokens", load.max_tokens)
    for at, data in events(stream.reads):
        if data == b"[DONE]":
            done = True
            continue
        event = orjson.loads(data)
        if "error" in event:
            raise ValueError(f"error event: {data.decode()}")
        if usage := event.get("usage"):
            tokens, prompted = usage["completion_tokens"], usage["prompt_tokens"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if text := _text(event):
            times.append(at)
            words.append(text)
    if not done or tokens != asked or not times:
        raise ValueError(f"{tokens} tokens of {asked}, done={done}, {len(times)} events")
    if load.one_event_per_token and len(times) != tokens:
        raise ValueError(f"{len(times)} events with text for {tokens} tokens")
    result.ttft.append(times[0] - stream.sent)
    result.gaps.extend(after - before for before, after in itertools.pairwise(times))
    result.latency.append(stream.reads[-1][0] - stream.sent)
    result.tokens += tokens
    result.prompt_tokens += prompted
    result.cached_tokens += cached
    result.events += len(times)
    return "".join(words)


def run(load: Load) -> Result:
    """Run `load` in this process."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        streams, wall, cpu = runner.run(_drive(load))
    result = Result(wall=wall, cpu=cpu)
    digest = hashlib.sha256()
    for stream in streams:
        try:
            digest.update(_judge(stream, load, result).encode())
        except (ValueError, KeyError, TypeError) as exc:
            result.failures.append(f"request {stream.number}: {exc}")
    result.digest = digest.hexdigest()
    return result


def measure(load: Load, core: int | None = None) -> Result:
    """Run `load` in a process of its own, on one core if `core` names it."""
    command = [sys.executable, "-m", "benchmarks.load"]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    limit = load.spread + load.timeout * (1 + load.requests // load.streams)
    # A file, not a pipe: results of over 64 KiB came back cut off there now and then.
    with tempfile.TemporaryFile() as answer:
        asked = orjson.dumps(asdict(load))
        subprocess.run(command, input=asked, stdout=answer, timeout=limit, check=True)
        answer.seek(0)
        return Result(**orjson.loads(answer.read()))


if __name__ == "__main__":
    answer = run(Load(**orjson.loads(sys.stdin.buffer.read())))
    with open(1, "wb", closefd=False) as out:  # buffered even under PYTHONUNBUFFERED: no partial writes
        out.write(orjson.dumps(asdict(answer)))
