"""The real engine continues what another worker began: a stream cut anywhere goes on unharmed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
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
GRAMMAR = 'root ::= verb " " noun " " noun\nverb ::= "find" | "feed"\nnoun ::= [a-z]{5}'
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


_VARIES = ("created", "created_at", "input_tokens")
"""From run to run: dates, and what the prefix cache held, as `cache_...` and `..._details` do too."""

_ROUGHLY = ("logprob", "top_logprobs")
"""What bf16 sums make of it depends on what else is in the batch: `logprobs_of` compares the numbers."""

_ONCE = ("name",)
"""What only the first piece of a tool call brings, with as many of its arguments as there were by then."""

_PIECES = ("content", "text", "delta", "arguments", "token_ids")
"""What comes a piece an event, and may come in fewer: strings, and lists of tokens and their logprobs."""


def told(answer: bytes) -> dict[int, list[Any]]:
    """The events of each choice, in order, so that what is said twice shows. Pieces that follow each other
    are joined; what differs from run to run is left out. Raises when it differs within one, or when its
    events are not numbered on."""
    for key in (rb"created", rb"created_at"):
        assert len(set(re.findall(rb'"%s":(\d+)' % key, answer))) <= 1
    numbers = [int(number) for number in re.findall(rb'"sequence_number":(\d+)', answer)]
    assert numbers == list(range(len(numbers)))
    answer = re.sub(rb'"sequence_number":\d+', b'"sequence_number":0', answer)
    answer = re.sub(rb'[0-9a-f]{16,32}(?=")', b"NAME", answer)
    found: dict[int, list[Any]] = {}
    for event in answer.split(b"\n\n"):
        data = event.partition(b"data: ")[2]
        value: Any = stable(orjson.loads(data)) if data.startswith(b"{") else data
        choices = value.get("choices") if isinstance(value, dict) else None
        said = found.setdefault(choices[0]["index"] if choices else 0, [])
        try:
            said.append(joined(said.pop(), value) if said else value)
        except Apart as exc:
            said += exc.args
    return found


def stable(value: Any) -> Any:
    if isinstance(value, list):
        return [stable(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: stable(item)
        for key, item in value.items()
        if key not in _VARIES + _ROUGHLY and not key.startswith("cache_") and not key.endswith("_details")
    }


def logprobs_of(answer: bytes) -> list[float]:
    """Of each token that was said, in order."""
    found: list[float] = []
    for data in re.findall(rb"data: (\{.*)", answer):
        for choice in orjson.loads(data).get("choices", []):
            found += [said["logprob"] for said in (choice.get("logprobs") or {}).get("content", [])]
    return found


class Apart(Exception):
    """Two events, `args`, say more than pieces of the same."""


def joined(before: Any, after: Any) -> Any:
    """One event for two of which each brings a piece of the same, and nothing else. Raises Apart."""
    pieces: list[Any] = []
    try:
        event = _join(before, after, "", pieces)
    except ValueError:
        pieces.clear()
    if not any(pieces):
        raise Apart(before, after)  # one event twice is none of pieces
    return event


def _join(before: Any, after: Any, key: str, pieces: list[Any]) -> Any:
    match before, after:
        case (dict(), dict()) if before.get("finish_reason") is None and (
            before.keys() >= after.keys() or after.get("finish_reason")
        ):
            more = {name: value for name, value in after.items() if name not in before}
            both = before.keys() & after.keys()
            return before | more | {name: _join(before[name], after[name], name, pieces) for name in both}
        case (None, str()) if key == "finish_reason":
            pieces.append(True)  # its last piece, which may be empty, may come by itself or with others
            return after
        case (str(), str()) | (list(), list()) if key in _PIECES:
            pieces.append(before and after)
            return before + after
        case (list(), list()) if len(before) == len(after):
            return [_join(*pair, "", pieces) for pair in zip(before, after, strict=True)]
        case _ if before == after and not isinstance(before, dict) and key not in _ONCE:
            return before
    raise ValueError


PLAIN = {"stream": True, "temperature": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (CHAT, {"stream_options": {"include_usage": True}}),
    "completion": (COMPLETIONS, {"return_token_ids": True}),
    "responses": (RESPONSES, {}),
    "messages": (MESSAGES, {}),
    "schema": (CHAT, {"response_format": SCHEMA, "max_tokens": 30}),
    "a regular expression": (CHAT, {"structured_outputs": {"regex": r"[a-f]{6}-\d{4}"}, "max_tokens": 30}),
    "a grammar": (CHAT, {"structured_outputs": {"grammar": GRAMMAR}, "max_tokens": 30}),
    "tools it may call": (CHAT, {"tools": [WEATHER]}),
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


EXTENDED = {"plain", "tools it may call", "completion", "responses", "messages", "a repetition penalty"}
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
            assert logprobs_of(payload(frames)) == pytest.approx(logprobs_of(payload(whole)), abs=0.25)
        else:
            drifted.append(cut)
    record_property("drifted after cuts", drifted)
    assert not drifted or case in EXTENDED


def chunk(content: str, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason} | more
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
LOGPROB = {"token": "b"}


def test_pieces_are_joined_however_the_answer_was_cut() -> None:
    ends = chunk("", "stop") + USAGE + b"data: [DONE]\n\n"
    assert told(chunk("a") + chunk("b") + ends) == told(chunk("ab") + ends)
    assert told(chunk("a") + chunk("b", "stop", stop_reason=2)) == told(chunk("ab", "stop", stop_reason=2))


def call(arguments: str, **more: Any) -> bytes:
    calls = [{"index": 0, "function": {"arguments": arguments} | more}]
    choice = {"index": 0, "delta": {"tool_calls": calls}, "finish_reason": None}
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"


def test_the_arguments_of_a_call_are_joined_however_many_came_with_its_name() -> None:
    whole = told(call("{", name="f") + call('"a"') + call(":1}"))
    assert whole == told(call('{"a"', name="f") + call(":1}"))
    assert whole != told(call("{", name="f") + call('"a"', name="f") + call(":1}"))
    assert whole != told(call("{", name="f") + call('"a"') * 2 + call(":1}"))


def test_logprobs_are_those_of_the_tokens_said() -> None:
    said = [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.0}]}]
    assert logprobs_of(chunk("a", logprobs={"content": said}) + chunk("", "stop", logprobs=None) + USAGE) == [
        -0.5
    ]


@pytest.mark.parametrize(
    ("right", "twice"),
    [
        (chunk("a") + chunk("", "stop"), chunk("a") + chunk("", "stop") * 2),
        (chunk("a") + chunk("b", "stop"), chunk("a") + chunk("b", "stop") * 2),
        (chunk("b", logprobs={"content": [LOGPROB]}), chunk("b", logprobs={"content": [LOGPROB] * 2})),
        (USAGE, USAGE * 2),
        (chunk(""), chunk("") * 2),
    ],
)
def test_what_is_said_twice_shows(right: bytes, twice: bytes) -> None:
    assert told(right) != told(twice)


def test_events_that_are_not_numbered_on_show() -> None:
    told(b'data: {"sequence_number":0}\n\ndata: {"sequence_number":1}\n\n')
    with pytest.raises(AssertionError):
        told(b'data: {"sequence_number":0}\n\ndata: {"sequence_number":2}\n\n')


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
