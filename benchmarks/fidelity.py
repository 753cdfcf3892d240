"""One workload on a fleet of processes and in the simulator: do the simulator's figures hold?

`fidelity.toml` says what the fleet is and what it is asked. The fleet is nats-server, ingress, scheduler and
sim workers, each a process, asked over HTTP at the moments at which the simulator's requests come. A prompt is
made so that its blocks are shared as the simulated one's are. The goal: p50 and p99 of the times to the first
token, and the prefix hits, within 10 % of each other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import orjson
import uvloop

from benchmarks import fleet, quiet, results
from benchmarks.load import Connection, Stream, events, now
from broker import subjects
from ops.simulate import command, fleet_file
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile
from ops.simulate.record import Record
from ops.simulate.run import simulate

FILE = Path(__file__).with_suffix(".toml")
LEAD = 0.5
"""Seconds from the start of a replay to its first request."""
TIMEOUT = 120.0
TOKEN_BYTES = 4
"""Of the sim engine's tokens."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Times in seconds, nan where none; lengths in tokens.

    Attributes:
        ttft: as its client saw it. `queue`: what of it was spent in the queue.
        error: by what the time from the send to a worker to the first token was off the foretold.
        cached: of its prompt; -1 = it was not served.
        retry: the Retry-After of one that was refused.
    """

    ttft: float = math.nan
    queue: float = math.nan
    error: float = math.nan
    cached: int = -1
    retry: float = math.nan


def run(quick: bool) -> dict[str, Any]:
    file = fleet_file.load(FILE, {"duration": 25.0, "warmup": 5.0} if quick else {})
    calls = [dataclasses.replace(call, max_tokens=call.output) for call in command.calls(file)]
    simulated = simulate(file, command.policy(file, "lanes")[0], iter(calls))
    answers, foreign = quiet.undisturbed(functools.partial(replay, file, calls))
    counted = [number for number, call in enumerate(calls) if call.at >= file.warmup]
    shareable = [calls[number].shareable for number in counted]
    sides = {
        "simulated": _figures([_simulated(simulated, number) for number in counted], shareable),
        "measured": _figures([answers[number] for number in counted], shareable),
    }
    ratios = {
        name: sides["measured"][name] / sides["simulated"][name] for name in ("p50_ms", "p99_ms", "hit_rate")
    }
    results.say(f"  {sides}\n  {ratios}")
    return {
        "workers": file.workers[0].count,
        "requests": len(counted),
        "rate": len(counted) / (file.duration - file.warmup),
        **sides,
        "ratios": ratios,
        "cores_used_by_others": foreign,
    }


def settings(file: FleetFile) -> dict[str, object]:
    """The fleet's, as flags: those of the engine and of the dispatcher that are not the defaults."""
    (workers,) = file.workers
    return {
        f"sim__{name}": value for name, value in workers.engine.model_dump(exclude_unset=True).items()
    } | {f"dispatch__{name}": value for name, value in file.dispatch.model_dump(exclude_unset=True).items()}


def body(call: Call, block_size: int) -> dict[str, Any]:
    """A request whose prompt has the call's blocks, and what is left over of one."""
    size = block_size * TOKEN_BYTES
    blocks = [f"{each:x}".rjust(size, "-") for each in call.hashes]
    rest = call.prompt * TOKEN_BYTES - len(blocks) * size
    return {
        "model": "sim",
        "prompt": "".join(blocks) + "." * rest,
        "max_tokens": call.output,
        "stream": True,
    }


def replay(file: FleetFile, calls: Sequence[Call]) -> list[Answer]:
    """Ask all of it of a new fleet, each at its time."""
    with (
        fleet.up("sim", file.workers[0].count, **settings(file)) as up,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_replay(file, up, calls))


async def _replay(file: FleetFile, up: fleet.Running, calls: Sequence[Call]) -> list[Answer]:
    await _workers(up.nats, sum(section.count for section in file.workers))
    client = Client(up.url)
    # What each process does for the first time takes it longer.
    await asyncio.gather(*(client.ask({**WARM, "prompt": f"{n:04}"}, "interactive") for n in range(16)))
    bodies = [body(call, file.block_size) for call in calls]
    begin = now() + LEAD

    async def ask(number: int) -> Answer:
        source = file.sources[calls[number].source]
        await asyncio.sleep(begin + calls[number].at - now())
        return await client.ask(bodies[number], source.service_class, source.deadline_ms / 1000)

    return await asyncio.gather(*(ask(number) for number in range(len(calls))))


WARM = {"model": "sim", "max_tokens": 4, "stream": True}


async def _workers(url: str, count: int) -> None:
    """Until so many are heard."""
    connection = await nats.connect(url)
    heard: set[str] = set()
    async with asyncio.timeout(fleet.START):
        subscription = await connection.subscribe(subjects.ALL_HEARTBEATS)
        while len(heard) < count:
            heard.add((await subscription.next_msg(timeout=fleet.START)).subject)
    await connection.close()


class Client:
    """Asks as many at once as are due; connections are kept."""

    def __init__(self, url: str) -> None:
        self._host = url.removeprefix("http://")
        self._idle: list[Connection] = []

    async def ask(self, asked: dict[str, Any], service_class: str, deadline: float = 0.0) -> Answer:
        data = orjson.dumps(asked)
        until = f"X-Headrace-Timeout: {deadline}\r\n" if deadline else ""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nX-Priority: {service_class}\r\n{until}"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection = await self._connection()
        stream = Stream(0)
        await connection.run(stream, head.encode() + data, TIMEOUT)
        if connection.open:
            self._idle.append(connection)
        return _answer(stream)

    async def _connection(self) -> Connection:
        while self._idle:
            if (kept := self._idle.pop()).open:
                return kept
        host, port = self._host.split(":")
        _, made = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
        return made


def _answer(stream: Stream) -> Answer:
    """Raises RuntimeError where it is neither an answer nor a refusal for want of capacity."""
    head, _, _ = b"".join(data for _, data in stream.reads).partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    if " 429 " in status:
        return Answer(retry=float(headers["retry-after"]))
    if stream.broken:
        raise RuntimeError(stream.broken)
    first = next(at for at, data in events(stream.reads) if b'"text"' in data)
    told = dict(part.split(";dur=") for part in headers["server-timing"].split(", "))
    queue, ttft, predicted = (float(told[name]) / 1000 for name in ("queue", "ttft", "predicted"))
    return Answer(
        ttft=first - stream.sent,
        queue=queue,
        error=ttft - predicted,
        cached=int(headers["x-headrace-prefix-hit"].partition("/")[0]),
    )


def _simulated(record: Record, number: int) -> Answer:
    sent, first = record.sent[number], record.first[number]
    return Answer(
        ttft=first - record.at[number],
        queue=sent - record.at[number],
        error=first - sent - record.predicted[number],
        cached=record.cached[number],
        retry=record.retry[number],
    )


def _figures(answers: Sequence[Answer], shareable: Sequence[int]) -> dict[str, float]:
    served = [(answer, most) for answer, most in zip(answers, shareable, strict=True) if answer.cached >= 0]
    ttft = [answer.ttft * 1000 for answer, _ in served]
    return {
        "p50_ms": results.percentile(ttft, 50),
        "p90_ms": results.percentile(ttft, 90),
        "p99_ms": results.percentile(ttft, 99),
        "queue_p50_ms": results.percentile([answer.queue * 1000 for answer, _ in served], 50),
        "queue_p99_ms": results.percentile([answer.queue * 1000 for answer, _ in served], 99),
        "hit_rate": sum(min(answer.cached, most) for answer, most in served)
        / sum(most for _, most in served),
        "error_p90_ms": results.percentile([abs(answer.error) * 1000 for answer, _ in served], 90),
        "refused": len(answers) - len(served),
    }


if __name__ == "__main__":
    results.main("fidelity", run)
