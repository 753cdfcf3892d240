"""`examples/publish_nats.py` as a user runs it: a process of its own against a real fleet."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nats
import orjson
import pytest

from broker import base, client, codec
from broker.config import BrokerConfig
from broker.messages import Frame, FrameKind
from tests.waiting import LIMIT, until
from workers.runner import Worker

EXAMPLE = Path(__file__).parents[2] / "examples" / "publish_nats.py"


async def run(nats_url: str, *arguments: str, model: str = "sim") -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    # -I: the example must run without this repository on its path.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(EXAMPLE),
        "Why is the sky blue?",
        *("--nats", nats_url, "--model", model, "--timeout", "20", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), LIMIT)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_it_streams_an_answer(nats_url: str, sim_worker: Worker) -> None:
    status, out, err = await run(nats_url, "--max-tokens", "12")
    assert status == 0, err
    assert out.strip()
    assert "stored in REQUESTS as message 1" in err
    assert "worker w1" in err
    assert orjson.loads(err.splitlines()[-1])["completion_tokens"] == 12


async def test_the_same_prompt_gives_the_same_text(nats_url: str, sim_worker: Worker) -> None:
    """The sim engine is deterministic: a lost, doubled or reordered piece would show."""
    first, second = await asyncio.gather(run(nats_url), run(nats_url))
    assert first[0] == second[0] == 0
    assert first[1] == second[1]


async def test_it_cancels(nats_url: str, sim_worker: Worker) -> None:
    status, out, err = await run(nats_url, "--max-tokens", "8000", "--cancel-after", "5")
    assert status == 0, err
    assert "499 cancelled" in err
    assert out.strip()


async def test_it_shows_what_the_engine_refuses(nats_url: str, sim_worker: Worker) -> None:
    status, out, err = await run(nats_url, "--max-tokens", "-1")
    assert (status, out) == (1, "")
    assert "max_tokens" in err


async def test_it_shows_what_the_worker_refuses(nats_url: str, sim_worker: Worker) -> None:
    status, out, err = await run(nats_url, "--base", "sim", model="org/no such.model")
    assert (status, out) == (1, "")
    assert "404 model_not_found" in err
    assert "org/no such.model" in err


async def test_it_ends_where_nobody_listens(nats_url: str, unused_port: int) -> None:
    status, _, err = await run(nats_url)  # a server without streams
    assert status == 1, err
    assert "NoStreamResponse" in err
    status, _, err = await run(f"nats://127.0.0.1:{unused_port}")
    assert status == 1
    assert "NoServers" in err


async def test_a_full_queue_is_told(nats_url: str) -> None:
    async with await client.connect(BrokerConfig(url=nats_url, max_queued=1), "setup") as broker:
        await (await broker.enqueue("req.sim.interactive.acme.sim", b"{}"))
        status, _, err = await run(nats_url)
    assert status == 1
    assert "maximum messages exceeded" in err


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish_nats", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frame(epoch: int, seq: int, kind: FrameKind, off: int, text: bytes = b"", **extra: object) -> bytes:
    return codec.encode(Frame(epoch, seq, kind, off, [7] if text else [], payload=text, extra=extra))


HEAD, BEAT, DATA, END = FrameKind.HEAD, FrameKind.BEAT, FrameKind.DATA, FrameKind.END


def passed(frames: Any, *came: bytes) -> list[bytes]:
    """What is passed on, beats left out."""
    ready = [one for data in came for one in frames.add(data)]
    return [payload or meta["kind"].encode() for meta, payload in ready if meta["kind"] != "beat"]


def test_it_orders_frames_and_drops_what_is_repeated(example: ModuleType) -> None:
    came = (
        frame(1, 0, HEAD, 0, b"a"),
        frame(1, 2, DATA, 2, b"c"),
        frame(1, 1, DATA, 1, b"b"),
        frame(1, 1, DATA, 1, b"b"),
        frame(2, 0, BEAT, 0),
        frame(2, 1, DATA, 1, b"b"),
        frame(1, 3, DATA, 3, b"late"),
        frame(2, 2, DATA, 2, b"c"),
        frame(2, 3, DATA, 3, b"d"),
        frame(2, 4, END, 4),
    )
    frames = example.Frames()
    assert passed(frames, *came) == [b"a", b"b", b"c", b"d", b"end"]
    assert not frames.gap


def test_an_attempt_that_was_given_up_may_come_to_its_end_while_the_next_one_is_mute(
    example: ModuleType,
) -> None:
    began = frame(1, 0, HEAD, 0, b"a"), frame(2, 0, BEAT, 0)
    rest = frame(1, 1, DATA, 1, b"b"), frame(1, 2, END, 2)
    assert passed(example.Frames(), *began, *rest) == [b"a", b"b", b"end"]
    assert passed(example.Frames(), *began, frame(2, 1, DATA, 1, b"B"), *rest) == [b"a", b"B"]


@pytest.mark.parametrize("wrong", [frame(2, 1, DATA, 3, b"d"), frame(2, 1, HEAD, 0, b"A")])
def test_an_answer_with_a_hole_or_begun_anew_is_lost(example: ModuleType, wrong: bytes) -> None:
    frames = example.Frames()
    passed(frames, frame(1, 0, HEAD, 0, b"a"), frame(1, 1, DATA, 1, b"b"), frame(2, 0, BEAT, 0))
    with pytest.raises(example.Lost):
        frames.add(wrong)


ANSWER = [frame(1, 0, HEAD, 0, b"a"), *(frame(1, n, DATA, n, b"b") for n in range(1, 9)), frame(1, 9, END, 9)]


class Deaf:
    """A subscription that misses one message."""

    def __init__(self, subscription: Any, misses: int) -> None:
        self.subject, self._next, self._left = subscription.subject, subscription.next_msg, misses

    async def next_msg(self, timeout: float) -> Any:
        message = await self._next(timeout=timeout)
        self._left -= 1
        return message if self._left != -1 else await self._next(timeout=timeout)


@pytest.mark.parametrize("misses", [0, 3, 9])
async def test_a_frame_that_did_not_come_is_read_from_the_journal(
    nats_url: str, example: ModuleType, monkeypatch: pytest.MonkeyPatch, misses: int
) -> None:
    monkeypatch.setattr(example, "SILENCE", 0.1)
    async with await client.connect(BrokerConfig(url=nats_url), "worker"):
        connection = await nats.connect(nats_url)
        replies = Deaf(await connection.subscribe("out.acme.box.r1"), misses)
        for data in ANSWER:
            await connection.publish("out.acme.box.r1", data)
        found: list[bytes] = []
        async for _, payload in example.received(connection, replies, example.Frames(), 10.0):
            found.append(payload)
            if not payload:
                break
        assert found == [b"a", *[b"b"] * 8, b""]
        await connection.close()


async def test_a_frame_that_is_nowhere_is_an_error_and_asked_for_before(
    nats_url: str, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "SILENCE", 0.1)
    async with await client.connect(BrokerConfig(url=nats_url), "worker") as broker:
        asked: list[base.Message] = []
        await broker.subscribe("again.acme.r1", asked.append)
        connection = await nats.connect(nats_url)
        replies = await connection.subscribe("out.acme.box.r1")
        for data in ANSWER[:3] + ANSWER[4:]:
            await connection.publish("out.acme.box.r1", data)
        found: list[bytes] = []

        async def read() -> None:
            async for _, payload in example.received(connection, replies, example.Frames(), 10.0):
                found.append(payload)

        with pytest.raises(example.Lost):
            await read()
        assert found == [b"a", b"b", b"b"]
        await until(lambda: asked)
        await connection.close()


def test_it_finds_text_however_the_stream_is_cut(example: ModuleType) -> None:
    events = (
        'data: {"choices":[{"delta":{"content":"hé"}}]}',
        ": ping",
        'data: {"choices":[]}',
        "data: [DONE]",
    )
    stream = "".join(event + "\n\n" for event in events).encode()
    for cut in range(len(stream)):
        text = example.Text()
        assert text.feed(stream[:cut]) + text.feed(stream[cut:]) == ["hé"]
