"""Real vLLM workers that are killed, hung, or told to end in the middle of what they say: their callers see
one answer.

Six streams run on the victim at once: JSON under a schema, a tool call, characters of several tokens, and
plain text on three endpoints. The victim is struck at a moment at which the last token that has come is part
of a character. Nothing hands on but the scheduler: the ack wait is longer than any test may take.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import jsonschema
import psutil
import pytest

from broker import base, client, replies, subjects
from broker.config import BrokerConfig
from broker.messages import Heartbeat, UsageEvent
from ops import demo_model
from tests.acceptance.conftest import ROOT, START_LIMIT
from tests.acceptance.streams import NOISE, Clients, Stream, kinds, lead
from tests.integration.fleet import Fleet, Part
from tests.waiting import until
from workers import recovery

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(180)]

TOKENS = 48
EARLY = 8
"""Tokens that each stream has before the blow."""
QUIET = 0.05
"""Seconds without a byte after which all that was on its way is here. After 0.25 a worker that was stopped
takes itself for lost."""

NAMES = {"type": "array", "items": {"type": "string", "minLength": 4, "maxLength": 9}, "minItems": 6}
LIST = {
    "type": "object",
    "properties": {"names": NAMES | {"maxItems": 6}, "kind": {"enum": ["town", "river"]}},
    "required": ["names", "kind"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "strict": True, "parameters": LIST},
}
PARROTS = "🦜漢🐉字" * 5
ASK = [{"role": "user", "content": "Tell me of the mill."}]
CHAT = {"messages": ASK, "stream_options": {"include_usage": True}, "max_tokens": 400, "temperature": 0}


def chat(extra: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    return "chat", CHAT | more | {"extra_body": {"return_token_ids": True} | extra}


SCHEMA = {"type": "json_schema", "json_schema": {"name": "places", "schema": LIST, "strict": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "schema": chat({}, response_format=SCHEMA),
    "tool": chat({}, tools=[TOOL], tool_choice="required"),
    "characters": chat({"structured_outputs": {"choice": [PARROTS]}}),
    "plain": chat({"ignore_eos": True}, max_tokens=TOKENS),
    "responses": ("responses", {"input": ASK, "max_output_tokens": TOKENS, "temperature": 0}),
    "messages": ("messages", {"messages": ASK, "max_tokens": TOKENS, "extra_body": {"temperature": 0}}),
}
GREEDY = ("plain", "responses", "messages")
LAST = {
    "chat": ["[DONE]"],
    "responses": ["response.completed", "response.incomplete"],
    "messages": ["message_stop"],
}
"""Events that end a stream, one of them once."""

Streams = dict[str, Stream]


class Mill:
    """Two workers, of whom the tests kill many, and the clients of what is before them."""

    def __init__(self, fleet: Fleet, broker: base.Broker, clients: Clients) -> None:
        self.broker, self.clients = broker, clients
        self.beats: dict[str, Heartbeat] = {}
        self._fleet = fleet
        self._workers: dict[str, Part] = {}
        self._names = (f"w{number}" for number in range(1, 100))

    def on_heartbeat(self, message: base.Message) -> None:
        beat = Heartbeat.model_validate_json(message.data)
        self.beats[beat.worker] = beat

    async def pair(self) -> dict[str, Part]:
        """Two workers by their names, who have nothing to do; those that are missing are started."""
        self._workers = {name: part for name, part in self._workers.items() if part.alive}
        missing = [next(self._names) for _ in range(2 - len(self._workers))]
        self._workers |= zip(missing, await asyncio.gather(*map(self._start, missing)), strict=True)
        await until(lambda: all(self.idle(name) for name in self._workers))
        return dict(self._workers)

    async def _start(self, name: str) -> Part:
        model = demo_model.ensure(ROOT / ".data", progress=True)
        small = {"max_num_seqs": 8, "max_model_len": 1024, "kv_cache_bytes": 128 * 2**20, "hang_after": 10}
        settings = {f"vllm__{key}": value for key, value in small.items()}
        return await self._fleet.start(
            "worker",
            worker__name=name,
            worker__engine="vllm",
            worker__drain_timeout=0.1,
            broker__ack_wait=300,
            vllm__model=model,
            **settings,
        )

    def idle(self, name: str) -> bool:
        return name in self.beats and self.beats[name].credit.running == 0

    async def on(self, worker: str, case: str) -> Stream:
        """The stream of a case, on that worker: what another one takes is left, and asked again."""
        api, asked = CASES[case]
        while True:
            stream = Stream(self.clients, api, asked)
            if await stream.begin() == worker:
                return stream
            await stream.leave()

    async def usage(self, streams: Streams) -> dict[str, UsageEvent]:
        """The usage events once the queue is empty: one for each request."""

        async def empty() -> bool:
            return not await self.broker.counts(subjects.REQUESTS, subjects.ALL_REQUESTS)

        await until(empty)
        records = await self.broker.read(subjects.USAGE, subjects.ALL_USAGE)
        events = [UsageEvent.model_validate_json(record.data) for record in records]
        found = {}
        for case, stream in streams.items():
            (found[case],) = (event for event in events if event.request_id == stream.request_id)
        return found

    async def deaths(self, request_id: str) -> int:
        """Of workers under a request, as its journal tells."""
        (subject,) = await self.broker.counts(subjects.REPLIES, f"out.*.*.{request_id}")
        return len(recovery.died(await replies.journal(self.broker, subject, 0)))


@pytest.fixture(scope="module")
async def mill(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mill]:
    async with Fleet(tmp_path_factory.mktemp("mill"), start_limit=START_LIMIT) as fleet:
        config = BrokerConfig(url=fleet.nats.url, ack_wait=300)
        ingress, _ = await asyncio.gather(
            fleet.start("ingress", broker__ack_wait=300),
            # Two engines on two processors may keep a worker that is well from saying so for 0.3 s.
            # One that dispatches would never give all streams to one worker.
            fleet.start(
                "scheduler", broker__ack_wait=300, scheduler__lost_after=1.0, dispatch__enabled=False
            ),
        )
        async with await client.connect(config, "acceptance") as broker, Clients(ingress.url) as clients:
            made = Mill(fleet, broker, clients)
            await broker.subscribe(subjects.ALL_HEARTBEATS, made.on_heartbeat)
            yield made


@pytest.fixture(scope="module")
async def undisturbed(mill: Mill) -> Streams:
    for _ in range(3):  # a busy machine may disturb it
        victim, _ = await mill.pair()
        streams = await begun(mill, victim)
        await asyncio.gather(*(stream.read() for stream in streams.values()))
        if all(len(stream.epochs()) == 1 for stream in streams.values()):
            break
    for stream in streams.values():
        assert len(stream.epochs()) == 1
    return streams


async def begun(mill: Mill, worker: str) -> Streams:
    streams = await asyncio.gather(*(mill.on(worker, case) for case in CASES))
    return dict(zip(CASES, streams, strict=True))


def core(worker: Part) -> psutil.Process:
    """The EngineCore of a worker."""
    children = psutil.Process(worker.process.pid).children()
    (found,) = (child for child in children if "EngineCore" in "".join(child.cmdline()))
    return found


async def caught(mill: Mill, victim: str, process: psutil.Process, group: asyncio.TaskGroup) -> Streams:
    """The streams on the victim, read to their ends by `group`, with the process stopped in their midst."""
    for _ in range(3):
        streams = await begun(mill, victim)
        reading = [group.create_task(stream.read()) for stream in streams.values()]
        if await frozen(process, streams):
            return streams
        await asyncio.wait(reading)
    raise AssertionError("a stream had always ended before another one was within a character")


async def frozen(process: psutil.Process, streams: Streams) -> bool:
    """Stop it when every stream has begun, and one has come to the middle of a character. False: one has
    ended before, and it runs."""
    characters = streams["characters"]

    def ended() -> bool:
        return any(stream.reason for stream in streams.values())

    def due() -> bool:
        return ended() or (characters.within and min(each.tokens for each in streams.values()) >= EARLY)

    def quiet() -> bool:
        return time.monotonic() - max(stream.moved for stream in streams.values()) > QUIET

    while True:
        await until(due)
        process.suspend()
        await until(quiet)
        if characters.within and not ended():
            return True
        process.resume()
        if ended():
            return False


class Fault(NamedTuple):
    """`of` finds the process that is stopped, and killed, unless it `wakes` when others have taken over,
    `hangs` until its worker kills it, or is told to end and `hands over`."""

    of: Callable[[Part], psutil.Process]
    wakes: bool = False
    hangs: bool = False
    hands_over: bool = False


FAULTS = {
    "a hung worker": Fault(lambda worker: psutil.Process(worker.process.pid), wakes=True),
    "a hung EngineCore": Fault(core, hangs=True),
    "a killed EngineCore": Fault(core),
    "a killed worker": Fault(lambda worker: psutil.Process(worker.process.pid)),
    "a drained worker": Fault(lambda worker: psutil.Process(worker.process.pid), hands_over=True),
}

DEATHS = {"a killed worker": 1, "a drained worker": 0}
"""Which its requests tell of: one that hands them over has not died under them."""


@pytest.mark.parametrize("fault", FAULTS)
async def test_streams_go_on(
    mill: Mill, undisturbed: Streams, fault: str, record_property: Callable[[str, object], None]
) -> None:
    workers = await mill.pair()
    victim, other = workers
    process = FAULTS[fault].of(workers[victim])
    async with asyncio.TaskGroup() as group:
        streams = await caught(mill, victim, process, group)
        if FAULTS[fault].wakes:
            try:
                await until(lambda: all(len(stream.epochs()) > 1 for stream in streams.values()))
                asleep = mill.beats[victim].seq
            finally:
                process.resume()
            await until(lambda: mill.beats[victim].seq > asleep and mill.idle(victim))
        elif FAULTS[fault].hands_over:
            process.terminate()
            process.resume()
            assert await workers[victim].ended() == 0
        elif not FAULTS[fault].hangs:
            process.kill()
    usage = await mill.usage(streams)
    for case, stream in streams.items():
        event = usage[case]
        assert (event.outcome, event.status) == ("finished", 200)
        assert event.worker == other or event.epoch > 2  # it has woken up, and the other was silent for long
        assert event.completion_tokens == stream.usage
        check(case, stream, event.epoch)
        if fault in DEATHS:
            assert await mill.deaths(stream.request_id) == DEATHS[fault]
    assert FAULTS[fault].hands_over or cut_within_a_character(streams["characters"])
    report(record_property, "recovery gaps, s", {case: gap(stream) for case, stream in streams.items()})
    for case in GREEDY:
        told = await drift(mill, streams[case].text, undisturbed[case].text)
        report(record_property, case, told)
        assert told["lead"] <= NOISE


async def drift(mill: Mill, text: str, undisturbed: str) -> dict[str, Any]:
    """Where two greedy answers part, if they do, and by how much the tokens of each are not the likeliest."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, undisturbed, strict=False))
    return {
        "differs from character": None if text == undisturbed else len(list(alike)),
        "lead": await lead(mill.clients, ASK, text),
        "lead in the undisturbed run": await lead(mill.clients, ASK, undisturbed),
    }


def check(case: str, stream: Stream, epoch: int) -> None:
    """One answer from its beginning to its one end, which a later epoch wrote than the beginning.

    `epoch` is that of the last delivery: a worker that is taken for lost may be handed what it runs.
    """
    places = [event.place for event in stream.events]
    assert places == sorted(set(places))
    assert len(stream.epochs()) > 1
    assert max(stream.epochs()) <= epoch
    ends = LAST[CASES[case][0]]
    found = kinds(stream.events)
    assert [kind for kind in found if kind in ends] == [found[-1]]
    if stream.ids:
        assert stream.usage == len(stream.ids)
    match case:
        case "schema":
            jsonschema.validate(json.loads(stream.text), LIST)
            assert stream.reason == "stop"
        case "tool":
            assert stream.tool == "get_weather"
            jsonschema.validate(json.loads(stream.text), LIST)
            assert stream.reason == "tool_calls"
        case "characters":
            assert stream.text == PARROTS
            assert stream.reason == "stop"
        case _:
            assert stream.text
            assert stream.usage == TOKENS
            assert stream.reason in ("length", "max_output_tokens", "max_tokens")


def cut_within_a_character(stream: Stream) -> bool:
    """What the first worker said of it ends in a token without a text."""
    chunks = [json.loads(event.data) for event in stream.events if event.place[0] == min(stream.epochs())]
    (choice,) = chunks[-1]["choices"]
    return bool(choice["token_ids"]) and not choice["delta"].get("content")


def gap(stream: Stream) -> float:
    """Seconds from the last event of the first worker to the first of the next."""
    first = next(n for n, event in enumerate(stream.events) if event.place[0] > min(stream.epochs()))
    return round(stream.events[first].at - stream.events[first - 1].at, 3)


def report(record_property: Callable[[str, object], None], name: str, value: object) -> None:
    record_property(name, value)
    print(f"{name}: {value}")  # noqa: T201
