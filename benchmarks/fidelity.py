"""One workload on a fleet of processes and in the simulator: do the simulator's figures hold?

The fleet is nats-server, ingress, scheduler and sim workers, each a process, asked over HTTP when the
simulator's requests come. A prompt is made so that its blocks are shared as the simulated one's are.
`fidelity.toml` says what the fleet is and what it is asked. The goal: p50 and p99 of the times to the first
token, and the prefix hits, within 10 % of each other.

`refusals.toml` asks for more than can be in time. Who is refused asks again at once, without a deadline, and
learns how long it would have waited. The goal: most were told so within 25 %.
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
from broker import errors, subjects
from broker.messages import Dispatch
from ops.simulate import command, fleet_file
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile
from ops.simulate.policies import Policy
from ops.simulate.run import simulate
from scheduler.dispatch.types import Decision, Item, Shed, WorkerState

FOLDER = Path(__file__).parent
TENANT = "anonymous"
"""Who asks without a key. Nobody has a share to be held to here."""
RIGHT = 0.25
"""A wait was foretold right if it was by no more off the one that came."""
LEAD = 0.5
"""Seconds from the start of a replay to its first request."""
TIMEOUT = 120.0
TOKEN_BYTES = 4
"""Of the sim engine's tokens."""
REFUSED = (errors.Overloaded.status, errors.DeadlineExceeded.status)
WARM = {"model": "sim", "max_tokens": 4, "stream": True}


@dataclass(frozen=True, slots=True)
class Answer:
    """Times in seconds, nan where none; lengths in tokens.

    Attributes:
        ttft: as its client saw it; of one that was refused, from when it asked again.
        queue: what of it was spent in the queue.
        error: by what the time to the first token was off the foretold, on the worker's side.
        cached: of its prompt.
        told: after how long one that was refused was told to ask again; 0 = not told, its deadline passed.
    """

    ttft: float
    queue: float
    error: float
    cached: int
    told: float = math.nan


def run(quick: bool) -> dict[str, Any]:
    shorter = {"duration": 25.0, "warmup": 5.0} if quick else {}
    found: dict[str, Any] = {"foreign": []}
    for name, figures in (("fidelity", _figures), ("refusals", _told)):
        file = fleet_file.load(FOLDER / f"{name}.toml", shorter)
        asked = calls(file)
        answers, foreign = quiet.undisturbed(functools.partial(replay, file, asked))
        counted = [number for number, call in enumerate(asked) if call.at >= file.warmup]
        found[name] = {
            side: figures([of[number] for number in counted], [asked[number] for number in counted])
            for side, of in (("simulated", simulated(file, asked)), ("measured", answers))
        }
        found["foreign"].append(foreign)
        results.say(f"  {name}: {found[name]}")
    both = found["fidelity"]
    ratios = {key: both["measured"][key] / both["simulated"][key] for key in ("p50_ms", "p99_ms", "hit_rate")}
    results.say(f"  measured by simulated: {ratios}")
    return {
        "workers": file.workers[0].count,
        **both,
        "ratios": ratios,
        "refusals": found["refusals"],
        "cores_used_by_others": max(found["foreign"]),
    }


def calls(file: FleetFile) -> list[Call]:
    """What is asked. Their clients name the length of the answer."""
    return [dataclasses.replace(call, max_tokens=call.output, tenant=TENANT) for call in command.calls(file)]


# The simulator


class Insisting:
    """A dispatcher whose clients ask again without a deadline as soon as they are refused.

    Attributes:
        told: by request, when it was refused and what it was told.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._items: dict[int, Item] = {}
        self.told: dict[int, tuple[float, float]] = {}

    def arrive(self, item: Item, now: float) -> None:
        self._items[item.key] = item
        self._policy.arrive(item, now)

    def state(self, state: WorkerState, now: float) -> None:
        self._policy.state(state, now)

    def first(self, key: int, now: float, cached_tokens: int) -> None:
        self._policy.first(key, now, cached_tokens)

    def finish(
        self, key: int, now: float, prompt_tokens: int, cached_tokens: int, output_tokens: int
    ) -> None:
        self._policy.finish(key, now, prompt_tokens, cached_tokens, output_tokens)

    def returned(self, key: int, now: float) -> None:
        self._policy.returned(key, now)

    def decide(self, now: float) -> Sequence[Decision]:
        out: list[Decision] = []
        while True:
            decided = self._policy.decide(now)
            refused = [each for each in decided if isinstance(each, Shed)]
            out += [each for each in decided if not isinstance(each, Shed)]
            for each in refused:
                self.told[each.key] = now, each.retry_after_s
                again = dataclasses.replace(self._items[each.key], arrived=now, deadline=math.inf)
                self._policy.arrive(again, now)
            if not refused:
                return out

    def next_due(self, now: float) -> float:
        return self._policy.next_due(now)


def simulated(file: FleetFile, asked: Sequence[Call]) -> list[Answer]:
    policy = Insisting(command.policy(file, "lanes")[0])
    record = simulate(file, policy, iter(asked))
    found = []
    for number, call in enumerate(asked):
        came, told = policy.told.get(number, (call.at, math.nan))
        sent, first = record.sent[number], record.first[number]
        error = first - sent - record.predicted[number]
        found.append(Answer(first - came, sent - came, error, record.cached[number], told))
    return found


# The fleet


def settings(file: FleetFile) -> dict[str, object]:
    """The fleet's, as flags: those of the engine and of the dispatcher that are not the defaults."""
    (workers,) = file.workers
    engine, dispatch = (of.model_dump(exclude_unset=True) for of in (workers.engine, file.dispatch))
    return (
        {f"sim__{key}": value for key, value in engine.items()}
        | {f"dispatch__{key}": value for key, value in dispatch.items()}
        | {"ingress__keepalive": TIMEOUT}
    )  # an answer's head tells of its first token where it comes with it


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


def replay(file: FleetFile, asked: Sequence[Call]) -> list[Answer]:
    """Ask all of it of a new fleet, each at its time."""
    with (
        fleet.up("sim", file.workers[0].count, **settings(file)) as up,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_replay(file, up, asked))


async def _replay(file: FleetFile, up: fleet.Running, asked: Sequence[Call]) -> list[Answer]:
    await _ready(up.nats, file.workers[0].count)
    client = Client(up.url)
    # What each process does for the first time takes it longer.
    await asyncio.gather(*(client.ask({**WARM, "prompt": f"{n:04}"}, "interactive") for n in range(16)))
    bodies = [body(call, file.block_size) for call in asked]
    begin = now() + LEAD

    async def ask(number: int) -> Answer:
        source = file.sources[asked[number].source]
        await asyncio.sleep(begin + asked[number].at - now())
        return await client.ask(bodies[number], source.service_class, source.deadline_ms / 1000)

    return await asyncio.gather(*(ask(number) for number in range(len(asked))))


async def _ready(url: str, count: int) -> None:
    """Until so many workers are heard, and a scheduler hands requests out."""
    connection = await nats.connect(url)
    heard: set[str] = set()
    beats = await connection.subscribe(subjects.ALL_HEARTBEATS)
    words = await connection.subscribe(subjects.DISPATCH)
    async with asyncio.timeout(fleet.START):
        while len(heard) < count:
            heard.add((await beats.next_msg(timeout=fleet.START)).subject)
        while not Dispatch.model_validate_json((await words.next_msg(timeout=fleet.START)).data).bases:
            pass
    await connection.close()


class Client:
    """Asks as many at once as are due; connections are kept."""

    def __init__(self, url: str) -> None:
        self._host = url.removeprefix("http://")
        self._idle: list[Connection] = []

    async def ask(self, asked: dict[str, Any], service_class: str, deadline: float = 0.0) -> Answer:
        """Raises RuntimeError where it is neither answered nor refused for its deadline."""
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
        status, headers = _head(stream)
        if deadline and status in REFUSED:
            told = float(headers.get("retry-after-ms", 0)) / 1000
            return dataclasses.replace(await self.ask(asked, service_class), told=told)
        if stream.broken or status != 200:
            raise RuntimeError(stream.broken or f"status {status}")
        first = next(at for at, data in events(stream.reads) if b'"text"' in data)
        parts = dict(part.split(";dur=") for part in headers["server-timing"].split(", "))
        return Answer(
            ttft=first - stream.sent,
            queue=float(parts["queue"]) / 1000,
            error=(float(parts["ttft"]) - float(parts["predicted"])) / 1000,
            cached=int(headers["x-headrace-prefix-hit"].partition("/")[0]),
        )

    async def _connection(self) -> Connection:
        while self._idle:
            if (kept := self._idle.pop()).open:
                return kept
        host, port = self._host.split(":")
        _, made = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
        return made


def _head(stream: Stream) -> tuple[int, dict[str, str]]:
    """Status and headers; 0 where there are none."""
    head, _, _ = b"".join(data for _, data in stream.reads).partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    return int(status.split()[1]) if status else 0, headers


# Figures


def _figures(answers: Sequence[Answer], asked: Sequence[Call]) -> dict[str, float]:
    ttft = [1000 * answer.ttft for answer in answers]
    queue = [1000 * answer.queue for answer in answers]
    off = [1000 * abs(answer.error) for answer in answers]
    shared = sum(min(answer.cached, call.shareable) for answer, call in zip(answers, asked, strict=True))
    return {
        "requests": len(answers),
        **{f"p{p}_ms": results.percentile(ttft, p) for p in (50, 90, 99)},
        "queue_p99_ms": results.percentile(queue, 99),
        "hit_rate": shared / sum(call.shareable for call in asked),
        "error_p90_ms": results.percentile(off, 90),
    }


def _told(answers: Sequence[Answer], asked: Sequence[Call]) -> dict[str, float]:
    """Of those that were refused."""
    told = [(answer.told, answer.ttft) for answer in answers if not math.isnan(answer.told)]
    ratios = [foretold / came for foretold, came in told]
    return {
        "requests": len(answers),
        "refused": len(told),
        "told_p50_s": results.percentile([foretold for foretold, _ in told], 50),
        "waited_p50_s": results.percentile([came for _, came in told], 50),
        "right": sum(abs(ratio - 1) <= RIGHT for ratio in ratios) / len(ratios),
        **{f"ratio_p{p}": results.percentile(ratios, p) for p in (10, 50, 90)},
    }


if __name__ == "__main__":
    results.main("fidelity", run)
