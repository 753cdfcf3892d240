"""`docs/asyncapi.yaml` against the code and against what really goes over the wire."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import orjson
import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError
from nats.aio.client import Client
from nats.aio.msg import Msg
from pydantic import BaseModel
from pydantic_asyncapi.v3 import AsyncAPI
from referencing import Registry
from referencing.jsonschema import DRAFT7

from broker import client, codec, errors, messages, subjects
from broker.config import BrokerConfig
from broker.messages import LAST_EPOCH, TERMINAL, Frame, FrameKind
from kvstate import prefix
from kvstate.blocks import Blocks
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.waiting import LIMIT, until
from workers.job import Touch
from workers.runner import Worker

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[2] / "docs" / "asyncapi.yaml").read_text(encoding="utf-8")
)
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
MESSAGES: dict[str, Any] = DOCUMENT["components"]["messages"]
REGISTRY: Registry[Any] = Registry().with_resource("urn:headrace", DRAFT7.create_resource(DOCUMENT))
SUBJECT = "req.sim.standard.acme.sim"


def check(schema: dict[str, Any], value: object) -> None:
    """Raises jsonschema.ValidationError."""
    pointer = {"$ref": "urn:headrace" + schema["$ref"]}
    Draft7Validator(pointer, registry=REGISTRY).validate(value)


def check_message(name: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
    """A message as it was on the wire, against its entry in the document."""
    message = MESSAGES[name]
    line, _, rest = payload.partition(b"\n")
    framed = "frame" in message.get("contentType", "")
    check(message["payload"], orjson.loads(line if framed else payload))
    if "headers" in message:
        check(message["headers"], dict(headers or {}))
    if "x-after-line" in message:
        check(message["x-after-line"], orjson.loads(rest))


def walk(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from walk(child)


# The document by itself


def test_it_is_asyncapi_3() -> None:
    AsyncAPI.model_validate(DOCUMENT)


def test_every_reference_leads_somewhere() -> None:
    for node in walk(DOCUMENT):
        if "$ref" in node:
            place: Any = DOCUMENT
            for part in node["$ref"].removeprefix("#/").split("/"):
                assert part in place, node["$ref"]
                place = place[part]


def test_every_schema_is_a_schema() -> None:
    for schema in SCHEMAS.values():
        Draft7Validator.check_schema(schema)


def test_every_parameter_of_an_address_is_explained() -> None:
    for channel in DOCUMENT["channels"].values():
        named = re.findall(r"\{(\w+)\}", channel["address"] or "")
        assert named == list(channel.get("parameters", {}))


# The document against the code


def _address(channel: str, *names: str) -> str:
    template: str = DOCUMENT["channels"][channel]["address"]
    tokens = iter(map(subjects.token, names))
    return re.sub(r"\{\w+\}", lambda _: next(tokens), template)


def test_addresses_are_the_subjects_that_the_code_builds() -> None:
    names = "a.b", "batch", "c d", "e*"
    assert _address("requests", *names) == str(subjects.RequestSubject(*names))
    assert _address("replies", *names[:3]) == subjects.reply(*names[:3])
    assert _address("cancels", *names[:2]) == subjects.cancel(*names[:2])
    assert _address("repeats", *names[:2]) == subjects.again(subjects.reply("a.b", "box", "batch"))
    assert _address("takeovers", *names[:2]) == subjects.taken("a%2Eb.batch")
    assert _address("fleet", "a.b") == subjects.heartbeat("a.b")
    assert _address("held", "a.b") == subjects.held("a.b")
    assert _address("cached", "a.b") == subjects.cached("a.b")
    assert _address("inventory", "a.b") == subjects.inventory("a.b")
    assert _address("roster", "a.b") == subjects.roster("a.b")
    assert _address("dispatch") == subjects.DISPATCH
    assert _address("explanations") == subjects.EXPLAIN
    assert _address("runs", "a.b") == subjects.run("a.b")
    assert _address("credits", "a.b") == subjects.credit("a.b")
    assert _address("commands", "a.b") == subjects.ctl("a.b")
    assert _address("wants", *names[:2]) == subjects.want(*names[:2])
    assert _address("pools", "a.b") == subjects.pool("a.b")
    assert _address("usage", *names[:2]) == subjects.usage(*names[:2])
    assert _address("dead", "a.b") == subjects.dead("a.b")


def test_the_classes_are_all_there() -> None:
    documented = DOCUMENT["channels"]["requests"]["parameters"]["class"]["enum"]
    assert documented == list(messages.ServiceClass)


def test_the_frame_kinds_are_all_there() -> None:
    kinds = {schema["allOf"][-1]["properties"]["kind"]["const"] for schema in _frame_metas()}
    assert kinds == set(SCHEMAS["FrameMeta"]["properties"]["kind"]["enum"]) == set(FrameKind)
    assert kinds == set(DOCUMENT["channels"]["replies"]["messages"])


def _frame_metas() -> list[dict[str, Any]]:
    return [schema for name, schema in SCHEMAS.items() if name.endswith("Meta") and "allOf" in schema]


def test_every_error_code_has_its_status() -> None:
    documented = {
        entry["properties"]["code"]["const"]: entry["properties"]["status"]["const"]
        for entry in SCHEMAS["ErrorStatus"]["oneOf"]
    }
    assert documented == {kind.code: kind.status for kind in _tree(errors.HeadraceError)}


def _tree(root: type[errors.HeadraceError]) -> Iterator[type[errors.HeadraceError]]:
    if root.__module__ == errors.__name__:
        yield root
    for child in root.__subclasses__():
        yield from _tree(child)


@pytest.mark.parametrize(
    "model",
    [
        messages.Heartbeat,
        messages.Held,
        messages.UsageEvent,
        messages.DeadLetter,
        messages.Command,
        messages.Answer,
        messages.PoolBeat,
        messages.News,
        messages.Cached,
        messages.Dispatch,
        messages.Sent,
    ],
)
def test_payload_schemas_are_the_models_own(model: type[BaseModel]) -> None:
    own = _untitled(
        model.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    )
    parts = own.pop("$defs", {})
    assert {model.__name__: own, **parts} == {name: SCHEMAS[name] for name in (model.__name__, *parts)}


def _untitled(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _untitled(child) for key, child in node.items() if key != "title"}
    return [_untitled(child) for child in node] if isinstance(node, list) else node


def test_the_request_headers_are_those_that_are_read() -> None:
    documented = SCHEMAS["RequestHeaders"]
    assert set(documented["properties"]) == {
        subjects.MSG_ID,
        subjects.REPLY_TO,
        subjects.PATH,
        subjects.TENANT,
        subjects.REQUEST_ID,
        subjects.DEADLINE,
        subjects.TRACEPARENT,
        subjects.BODY_OBJECT,
        subjects.ASKED,
        subjects.PREFIX,
        subjects.BUDGET,
    }
    for left_out in documented["properties"]:
        rest = {
            "Request-Id": "r1",
            "Body-Object": "acme.r1",
            "Asked-Model": "sim",
            "Prefix": "",
            "Budget": "7",
        }
        head = _headers("r1", Deadline="1", traceparent="00", Tenant="acme", **rest)
        del head[left_out]
        if left_out in documented["required"]:
            with pytest.raises(errors.MalformedMessage):
                messages.parse_request(SUBJECT, head, b"")
        else:
            messages.parse_request(SUBJECT, head, b"")


def test_the_examples_are_what_they_show() -> None:
    for name, message in MESSAGES.items():
        for example in message.get("examples", []):
            check_message(name, orjson.dumps(example["payload"]), example["headers"])
            messages.parse_request(SUBJECT, example["headers"], b"")


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("Error", b'{"epoch":1,"seq":0,"kind":"error","off":0,"status":500,"code":"cancelled","at":1}\n{}'),
        ("Error", b'{"epoch":1,"seq":0,"kind":"error","off":0,"status":499,"code":"cancelled","at":1}\n{}'),
        ("Data", b'{"epoch":1,"seq":0,"kind":"end","off":0}\n'),
        ("Data", b'{"epoch":1,"seq":0,"kind":"data"}\n'),
        (
            "Head",
            b'{"epoch":1,"seq":0,"kind":"head","off":0,"status":200,"headers":{"a":1},"worker":"w","at":1}\n',
        ),
        ("Heartbeat", b'{"worker":"w"}'),
        ("Held", b'{"started_ms":1,"number":1,"take":[[1]]}'),
        ("Acknowledgement", b'{"stream":"REQUESTS"}'),
        ("Cancel", b'{"seq":0}'),
    ],
)
def test_it_refuses_what_is_something_else(name: str, payload: bytes) -> None:
    with pytest.raises(ValidationError):
        check_message(name, payload)


# Real messages


def _headers(request: str, **more: str) -> dict[str, str]:
    needed = {
        "Nats-Msg-Id": f"acme:{request}",
        "Reply-To": f"out.acme.box.{request}",
        "Path": "/v1/chat/completions",
    }
    return {**needed, **more}


def _chat(**more: object) -> bytes:
    question = [{"role": "user", "content": "Hello"}]
    return orjson.dumps({"model": "sim", "messages": question, "stream": True, "max_tokens": 8, **more})


class Wire:
    """A bare connection that publishes as a direct publisher does and hears all that is said."""

    def __init__(self, connection: Client) -> None:
        self.connection = connection
        self.heard: list[Msg] = []
        self._news = asyncio.Condition()

    async def on_message(self, message: Msg) -> None:
        async with self._news:
            self.heard.append(message)
            self._news.notify_all()

    async def publish(self, body: bytes, headers: dict[str, str], subject: str = SUBJECT) -> Msg:
        """JetStream's acknowledgement, as it came."""
        return await self.connection.request(subject, body, timeout=LIMIT, headers=headers)

    def frames(self, request: str) -> list[Frame]:
        return [codec.decode(msg.data) for msg in self.heard if msg.subject == f"out.acme.box.{request}"]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT), self._news:
            await self._news.wait_for(condition)

    async def until_said(self, *wanted: str) -> None:
        """Wait for a message under each of these subjects."""
        async with asyncio.timeout(LIMIT), self._news:
            await self._news.wait_for(lambda: set(wanted) <= {msg.subject for msg in self.heard})

    async def until_frame(self, request: str, *kinds: FrameKind) -> list[Frame]:
        async with asyncio.timeout(LIMIT), self._news:
            await self._news.wait_for(lambda: any(frame.kind in kinds for frame in self.frames(request)))
        return self.frames(request)

    async def ended(self, request: str) -> Frame:
        return (await self.until_frame(request, *TERMINAL))[-1]


@pytest.fixture
async def wire(nats_url: str) -> AsyncIterator[Wire]:
    connection = await nats.connect(nats_url)
    try:
        wire = Wire(connection)
        for root in (
            "req",
            "out",
            "cancel",
            "again",
            "taken",
            "fleet",
            "held",
            "usage",
            "dead",
            "run",
            "credit",
            "cached",
        ):
            await connection.subscribe(f"{root}.>", cb=wire.on_message)
        await connection.subscribe("dispatch", cb=wire.on_message)
        await connection.flush()
        yield wire
    finally:
        await connection.close()


@asynccontextmanager
async def scheduling(nats_url: str, **settings: float) -> AsyncIterator[None]:
    stop, ready = asyncio.Event(), asyncio.Event()
    async with await client.connect(BrokerConfig(url=nats_url), "scheduler") as broker:
        scheduler = Scheduler(SchedulerConfig(**settings), broker)
        serving = asyncio.create_task(scheduler.run(stop, lambda _: ready.set()))
        try:
            await asyncio.wait_for(ready.wait(), LIMIT)
            yield
        finally:
            stop.set()
            await serving


def _name_of(message: Msg) -> str:
    root = message.subject.partition(".")[0]
    if root == "out":
        return codec.decode(message.data).kind.capitalize()
    names = {
        "req": "Request",
        "cancel": "Cancel",
        "again": "Again",
        "taken": "Taken",
        "fleet": "Heartbeat",
        "held": "Held",
        "dispatch": "Dispatch",
        "run": "Run",
        "credit": "News",
        "cached": "Cached",
        "usage": "Usage",
        "dead": "DeadLetter",
    }
    return names[root]


async def test_what_goes_over_the_wire_is_what_is_documented(
    wire: Wire, nats_url: str, sim_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.job._BEAT_AFTER", 0.0)  # every request then has a beat
    acks = [
        await wire.publish(_chat(), _headers("streamed")),
        await wire.publish(_chat(), _headers("streamed")),
        await wire.publish(_chat(n=3), _headers("several", Deadline=str(int(time.time() * 1000) + 60_000))),
        await wire.publish(_chat(stream=False), _headers("whole", traceparent="00-ab-cd-01")),
        await wire.publish(b'{"model":"sim"}', _headers("refused-by-the-engine")),
        await wire.publish(_chat(), _headers("late", Deadline="1")),
        await wire.publish(_chat(), _headers("unknown"), "req.sim.batch.acme.nobody"),
        await wire.publish(_chat(), _headers("elsewhere", Path="/v1/nowhere")),
        await wire.publish(_chat(max_tokens=8000), _headers("endless")),
    ]
    for name in ("streamed", "several", "whole", "refused-by-the-engine"):
        assert (await wire.ended(name)).kind is FrameKind.END
    for name, code in (
        ("late", "deadline_exceeded"),
        ("unknown", "model_not_found"),
        ("elsewhere", "invalid_request"),
    ):
        assert (await wire.ended(name)).extra["code"] == code

    await wire.until_frame("endless", FrameKind.DATA)
    await wire.connection.publish("cancel.acme.endless", orjson.dumps({"at": time.time() * 1000}))
    assert (await wire.ended("endless")).extra["code"] == "cancelled"
    said = len(wire.frames("streamed"))
    await wire.connection.publish("again.acme.streamed", b"{}")
    await wire.until(lambda: len(wire.frames("streamed")) == 2 * said)

    with monkeypatch.context() as late:
        late.setattr(Touch, "lost", True)  # the worker may have been taken for lost
        acks.append(await wire.publish(_chat(), _headers("doubtful")))
        assert (await wire.ended("doubtful")).kind is FrameKind.END

    async with scheduling(nats_url, sweep=0.05, orphan_after=0):
        acks.append(await wire.publish(_chat(), _headers("orphan"), "req.typo.batch.acme.sim"))
        orphaned = await wire.ended("orphan")
        assert (orphaned.epoch, orphaned.extra["code"]) == (LAST_EPOCH, "model_not_found")
        await until(lambda: sim_worker._dispatched.active and not sim_worker._pullers)
        acks.append(await wire.publish(_chat(), _headers("handed-out", Budget="8")))
        assert (await wire.ended("handed-out")).kind is FrameKind.END
        sim_worker._caching._blocks = told = Blocks()  # as of an engine that tells
        told.stored([1], None, [1], 1, [()])
        told.ran([1], [1], prefix.BLOCK)
        await wire.until_said("dispatch", "run.w1", "credit.w1", "cached.w1")

    requests = [msg for msg in wire.heard if msg.subject.startswith("req.")]
    await wire.publish(b"garbage", {"Reply-To": "out.acme.box.malformed"})
    assert (await wire.ended("malformed")).extra["code"] == "malformed_message"
    await wire.until_said("dead.malformed_message", "usage.acme.sim", "usage.acme.nobody", "fleet.w1")

    heard = requests + [msg for msg in wire.heard if not msg.subject.startswith("req.")]
    for message in heard:
        check_message(_name_of(message), message.data, message.headers)
    assert {_name_of(message) for message in heard} == set(MESSAGES) - {
        "Acknowledgement",
        "Command",
        "Answer",
        "PoolBeat",
    }
    assert any(frame.choices for frame in wire.frames("several"))
    for ack in acks:
        check_message("Acknowledgement", ack.data)
    assert [orjson.loads(ack.data).get("duplicate", False) for ack in acks[:2]] == [False, True]


async def test_a_cancel_that_names_the_sequence_takes_a_request_from_the_queue(
    wire: Wire, nats_url: str
) -> None:
    async with scheduling(nats_url, orphan_after=3600):
        ack = orjson.loads((await wire.publish(_chat(), _headers("queued"))).data)
        cancel = orjson.dumps({"at": time.time() * 1000, "seq": ack["seq"]})
        await wire.connection.publish("cancel.acme.queued", cancel)
        assert (await wire.ended("queued")).extra["code"] == "cancelled"
    for message in wire.heard:
        check_message(_name_of(message), message.data, message.headers)


async def test_a_refused_publish_is_acknowledged_as_documented(wire: Wire, nats_url: str) -> None:
    async with await client.connect(BrokerConfig(url=nats_url, max_queued=1), "setup"):
        await wire.publish(_chat(), _headers("first"))
        refused = await wire.publish(_chat(), _headers("second"))
    check_message("Acknowledgement", refused.data)
    fault = orjson.loads(refused.data)["error"]
    assert fault["err_code"] == 10077
    assert fault["description"].startswith("maximum")
