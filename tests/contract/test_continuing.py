"""The real engine continues what another worker began: a stream cut anywhere goes on unharmed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from broker import codec, replies, subjects
from broker.base import Delivery
from broker.config import BrokerConfig
from broker.memory import MemoryBroker
from broker.messages import Frame, FrameKind, Request, ServiceClass
from tests import asgi
from tests.contract.test_vllm_engine import ASK, CHAT, COMPLETIONS, MESSAGES, RESPONSES, WEATHER, body_for
from tests.workbench import serving
from workers.engines import base

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:ORJSONResponse is deprecated"),
]

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
FORCED = {"type": "function", "function": {"name": "get_weather"}}
PARROTS = [{"role": "user", "content": "Parrots, please:"}]


@pytest.fixture
def engine(vllm_engine: base.Engine) -> base.Engine:
    return vllm_engine


async def answered(engine: base.Engine, path: str, body: dict[str, Any], said: list[Frame]) -> list[Frame]:
    """The frames that a caller is handed of a request whose first worker died after it `said` that."""
    broker = MemoryBroker(BrokerConfig())
    async with replies.Mailbox(broker, "box") as mailbox:
        request = Request(
            subject=subjects.RequestSubject(engine.base, "standard", "acme", engine.base),
            request_id="r1",
            reply_to=subjects.reply("acme", "box", "r1"),
            path=path,
            body=orjson.dumps(body),
        )
        stream = mailbox.open("acme", "r1")
        await (await broker.enqueue(str(request.subject), request.body, request.headers()))
        if said:
            await die(broker, engine, request, said)
        frames: list[Frame] = []
        async with serving(broker, engine), asyncio.timeout(60):
            while not stream.finished:
                frames += await stream.next(1.0)
        return frames


async def die(broker: MemoryBroker, engine: base.Engine, request: Request, said: list[Frame]) -> None:
    taken: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
    puller = await broker.pull(engine.base, ServiceClass.STANDARD, taken.set_result, lambda: None)
    await puller.ask(1)
    delivery = await taken
    for frame in said:
        await broker.publish(request.reply_to, codec.encode(frame))
    await puller.close()
    await delivery.nak()


def payload(frames: list[Frame]) -> bytes:
    assert frames[-1].kind is FrameKind.END, frames[-1].payload
    assert [frame.kind for frame in frames].count(FrameKind.HEAD) == 1
    return b"".join(frame.payload for frame in frames if frame.kind is not FrameKind.BEAT)


def ids(frames: list[Frame]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for frame in frames:
        for index, more in [(0, frame.ids), *((index, more) for index, _, more in frame.choices)]:
            if more:
                found.setdefault(index, []).extend(more)
    return found


def told(answer: bytes) -> dict[tuple[str, ...], list[Any]]:
    """What an answer says, by choice and place: texts joined, for they may come in fewer pieces; without
    what differs from run to run. Raises when it differs within one."""
    for key in (rb"created", rb"created_at"):
        assert len(set(re.findall(rb'"%s":(\d+)' % key, answer))) <= 1
    assert answer.count(b"data: [DONE]") <= 1
    answer = re.sub(rb'[0-9a-f]{16,32}(?=")', b"NAME", answer)
    found: dict[tuple[str, ...], list[Any]] = {}
    for event in answer.split(b"\n\n"):
        data = event.partition(b"data: ")[2]
        value: Any = orjson.loads(data) if data.startswith(b"{") else {"raw": data.decode()}
        choices = value.get("choices")
        for place, leaf in leaves(value, (str(choices[0]["index"] if choices else 0),)):
            if isinstance(leaf, str) and place[-1] in ("content", "text", "delta", "arguments"):
                found[place] = ["".join([*found.get(place, []), leaf])]
            elif leaf not in found.setdefault(place, []):
                found[place].append(leaf)
    return found


def leaves(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Without dates, numbers of events, and what the prefix cache held."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item, place)
    elif isinstance(value, dict):
        for key, item in value.items():
            varies = ("created", "created_at", "input_tokens", "sequence_number")
            if key not in varies and not key.startswith("cache_") and not key.endswith("_details"):
                yield from leaves(item, (*place, key))
    else:
        yield place, value


PLAIN = {"stream": True, "temperature": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (CHAT, {"stream_options": {"include_usage": True}}),
    "completion": (COMPLETIONS, {"return_token_ids": True}),
    "responses": (RESPONSES, {}),
    "messages": (MESSAGES, {}),
    "schema": (CHAT, {"response_format": SCHEMA, "max_tokens": 30}),
    "a tool call": (CHAT, {"tools": [WEATHER], "tool_choice": FORCED, "max_tokens": 30}),
    "penalties": (CHAT, {"presence_penalty": 0.7, "frequency_penalty": 0.7}),
    "logprobs": (CHAT, {"logprobs": True, "top_logprobs": 2}),
    "a stop string": (CHAT, {"stop": [" help"], "min_tokens": 2}),
    "sampled, seeded": (CHAT, {"temperature": 1.0, "seed": 7}),
    "three choices": (
        CHAT,
        {"temperature": 1.0, "seed": 7, "n": 3, "stream_options": {"include_usage": True}},
    ),
    "a repetition penalty": (CHAT, {"repetition_penalty": 1.2}),
}


EXTENDED = {"plain", "completion", "responses", "messages", "a repetition penalty"}
"""Continued by a longer prompt, whose bf16 sums may round otherwise than a decode's: a token may differ."""


@pytest.mark.parametrize("case", CASES)
async def test_an_answer_cut_anywhere_goes_on(
    engine: base.Engine, case: str, record_property: Callable[[str, object], None]
) -> None:
    path, more = CASES[case]
    body = body_for(path, ASK, 14) | PLAIN | more
    whole = await answered(engine, path, body, [])
    said, drifted = whole[:-1], []
    for cut in sorted({1, 2, len(said) // 2, len(said) - 2, len(said) - 1, len(said)}):
        frames = await answered(engine, path, body, said[:cut])
        known = ids(said[:cut])
        assert {index: ids(frames)[index][: len(given)] for index, given in known.items()} == known
        if ids(frames) == ids(whole):
            assert told(payload(frames)) == told(payload(whole)), f"cut after frame {cut}"
        else:
            drifted.append(cut)
    record_property("drifted after cuts", drifted)
    assert not drifted or case in EXTENDED


async def test_an_answer_is_cut_at_whole_characters_alone(engine: base.Engine) -> None:
    """Each cut within a character, too, shows the rest of it and nothing else."""
    body = body_for(COMPLETIONS, PARROTS, 16) | PLAIN | {"return_token_ids": True}
    answer = "🦜漢🐉"
    given = await asgi.ask(engine.app, "/tokenize", {"model": engine.base, "prompt": answer})
    only = {str(token): 100 for token in given["tokens"]}
    body |= {"logit_bias": only, "temperature": 1.0, "seed": 3, "max_tokens": 16}
    whole = await answered(engine, COMPLETIONS, body, [])
    assert len(ids(whole)[0]) == 16
    for cut in range(1, len(whole) - 1):
        frames = await answered(engine, COMPLETIONS, body, whole[:cut])
        assert ids(frames) == ids(whole)
        assert text(frames) == text(whole), f"cut after frame {cut}"


def text(frames: list[Frame]) -> str:
    data = [event.removeprefix(b"data: ") for event in payload(frames).split(b"\n\n")]
    return "".join(orjson.loads(d)["choices"][0]["text"] for d in data if d.startswith(b"{"))
