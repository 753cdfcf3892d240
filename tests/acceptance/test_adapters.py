"""Adapters with real vLLM: pushed as files, served by version, rolled over and back; bad ones refused alone.

They are asked for over NATS, by the names under which they are queued.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from broker import artifacts, entries, errors, objects, replies, subjects
from broker.messages import FrameKind, Request
from ops import demo_model
from tests.acceptance.conftest import ADAPTER_SLOTS, MODEL, ROOT, Fleet
from tests.pushing import files, push
from tests.waiting import LIMIT, until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.timeout(300)]

PATH = "/v1/completions"
START = "Once upon a time"


def strong(seed: int) -> dict[str, bytes]:
    """An adapter that no one takes for its base, nor for one of another seed."""
    shapes = demo_model.ensure(ROOT / ".data", progress=True)
    return files(8, seed, shapes, targets=("q_proj", "v_proj", "up_proj", "down_proj"), lora_alpha=160)


class Stream:
    """A running answer. `said` its text so far, `models` who says that it gave it."""

    def __init__(self, stream: replies.Stream) -> None:
        self._stream = stream
        self.said = ""
        self.models: set[str] = set()
        self.code = ""

    async def more(self) -> None:
        for frame in await self._stream.next(1.0):
            if frame.kind is FrameKind.ERROR:
                self.code = str(frame.extra["code"])
                continue
            for event in frame.payload.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    told = orjson.loads(event.removeprefix(b"data: "))
                    self.models.add(told["model"])
                    self.said += "".join(choice["text"] for choice in told["choices"])

    async def begun(self) -> None:
        async with asyncio.timeout(LIMIT):
            while not self.said:
                await self.more()

    async def end(self) -> str:
        async with asyncio.timeout(2 * LIMIT):
            while not self._stream.finished:
                await self.more()
        return self.said


class Asker:
    def __init__(self, fleet: Fleet, mailbox: replies.Mailbox) -> None:
        self.broker = fleet.broker
        self._mailbox = mailbox

    async def start(self, model: str, tokens: int = 16, prompt: str = START) -> Stream:
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        name = uuid.uuid4().hex
        request = Request(
            subject=subjects.RequestSubject(MODEL, "standard", "acme", model),
            request_id=name,
            reply_to=subjects.reply("acme", self._mailbox.name, name),
            path=PATH,
            body=orjson.dumps(body),
        )
        stream = self._mailbox.open("acme", name)
        await (await self.broker.enqueue(str(request.subject), request.body, request.headers()))
        return Stream(stream)

    async def text(self, model: str, tokens: int = 16, prompt: str = START) -> str:
        stream = await self.start(model, tokens, prompt)
        text = await stream.end()
        assert not stream.code, stream.code
        assert stream.models == {model}
        return text

    async def fails(self, model: str) -> str:
        stream = await self.start(model)
        assert not await stream.end()
        return stream.code

    async def push(self, name: str, content: dict[str, bytes]) -> str:
        version = await push(self.broker, name, content, base_model=MODEL)
        return entries.versioned(name, version.number)


@pytest.fixture
async def asker(fleet: Fleet) -> AsyncIterator[Asker]:
    async with replies.Mailbox(fleet.broker, uuid.uuid4().hex) as mailbox:
        yield Asker(fleet, mailbox)


def alike(one: str, other: str) -> int:
    """Characters up to the first that differs: bf16 sums, and so greedy words, depend on what runs beside."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


async def test_two_adapters_and_their_base_each_say_their_own(asker: Asker) -> None:
    models = [MODEL, await asker.push("a-one", strong(1)), await asker.push("a-two", strong(2))]
    texts = {model: await asker.text(model) for model in models}
    assert len(set(texts.values())) == 3
    # And so side by side, in one step of the engine.
    together = await asyncio.gather(*(asker.text(model) for model in models))
    for model, text in zip(models, together, strict=True):
        assert max(models, key=lambda each: alike(texts[each], text)) == model


async def test_a_new_version_does_not_get_into_running_streams_and_a_rollback_is_the_old_one(
    asker: Asker,
) -> None:
    old = await asker.push("rolling", strong(3))
    alone = await asker.text(old, 60)
    running = [await asker.start(old, 60) for _ in range(2)]
    for stream in running:
        await stream.begun()
    new = await asker.push("rolling", strong(4))
    other = await asker.text(new, 60)
    assert other != alone
    for stream in running:
        text = await stream.end()
        assert stream.models == {old}
        assert alike(text, alone) > alike(text, other)

    def rolled_back(entry: entries.ModelEntry | None) -> entries.ModelEntry:
        assert entry is not None
        return entry.model_copy(update={"current": 1})

    entry = await entries.change(asker.broker, "rolling", rolled_back)
    assert entry is not None
    current = entries.versioned("rolling", entry.current)
    assert alike(await asker.text(current, 60), alone) > alike(other, alone)


async def test_bad_artifacts_are_refused_alone_while_others_stream_on(asker: Asker, fleet: Fleet) -> None:
    beside = await asker.start(MODEL, 200)
    good = await asker.push("good", strong(5))
    assert await asker.text(good)
    content = strong(6)
    bad = {
        "garbage": content | {artifacts.WEIGHTS: b"\xff" * 4096},
        "truncated": content | {artifacts.WEIGHTS: content[artifacts.WEIGHTS][:4096]},
        "pickle": content | {artifacts.WEIGHTS: b"\x80\x04cos\nsystem\n(S'true'\ntR."},
        "no-json": content | {artifacts.CONFIG: b"{"},
        "other-base": files(8, 6),
    }
    for name, spoilt in bad.items():
        assert await asker.fails(await asker.push(name, spoilt)) == errors.AdapterFailed.code, name
    damaged = await push(asker.broker, "damaged", content, base_model=MODEL)
    weights = next(file for file in damaged.files if file.name == artifacts.WEIGHTS)
    await objects.put(asker.broker, subjects.ARTIFACTS, weights.object, b"y" * weights.size)
    assert await asker.fails("damaged@1") == errors.AdapterFailed.code
    assert await asker.fails("never@1") == errors.UnknownModel.code
    assert await asker.text(good)
    assert await beside.end()
    assert not beside.code
    await until(fleet.idle)


async def test_more_adapters_than_slots_are_all_served_and_the_engine_skips_none(
    asker: Asker, fleet: Fleet
) -> None:
    models = [await asker.push(f"many-{number}", strong(20 + number)) for number in range(3 * ADAPTER_SLOTS)]
    skipped = await fleet.sample("headrace_engine_skipped_total")
    swaps = await fleet.sample("headrace_adapter_swaps_total")
    asked = [model for _ in range(3) for model in models] + [MODEL] * 3
    streams = [await asker.start(model, 24, f"Number {number}:") for number, model in enumerate(asked)]
    for model, stream in zip(asked, streams, strict=True):
        assert await stream.end()
        assert stream.models == {model}
    assert await fleet.sample("headrace_engine_skipped_total") == skipped
    assert await fleet.sample("headrace_adapter_swaps_total") >= swaps + len(models) - ADAPTER_SLOTS
    await until(fleet.idle)
