"""The commands and the server configuration of `docs/nats.md`, carried out.

The `nats` CLI is no Python package: its arguments are read here and sent by nats-py, so what is shown is that
the subjects, headers and bodies are right.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shlex
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from broker import client, codec, server
from broker.config import BrokerConfig
from broker.messages import TERMINAL, FrameKind
from tests.waiting import LIMIT
from workers.config import SimConfig, WorkerConfig
from workers.engines import sim
from workers.runner import Worker

TEXT = (Path(__file__).parents[2] / "docs" / "nats.md").read_text(encoding="utf-8")
MODEL = "SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> dict[str, list[str]]:
    """Arguments of the first `nats <verb>` of each verb."""
    found: dict[str, list[str]] = {}
    for block in blocks("sh"):
        words = shlex.split(block.replace("\\\n", " "))
        if words[0] == "nats":
            found.setdefault(words[1], words[2:])
    return found


def _parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("subject")
    parser.add_argument("body", nargs="?", default="")
    parser.add_argument("-H", action="append", default=[], dest="headers")
    parser.add_argument("--raw", action="store_true")
    return parser


@asynccontextmanager
async def fleet(url: str) -> AsyncIterator[None]:
    """One worker that serves the model of the examples."""
    stop = asyncio.Event()
    async with await client.connect(BrokerConfig(url=url), "worker") as broker:
        engine = await sim.start(SimConfig(model=MODEL, ttft_ms=2, itl_ms=1))
        worker = Worker(WorkerConfig(drain_timeout=1), broker, engine)
        serving = asyncio.create_task(worker.run(stop))
        try:
            yield
        finally:
            stop.set()
            await serving
            await engine.close()


async def ask(connection: Client, more: dict[str, str] | None = None, **changed: object) -> bytes:
    """The documented request, its body changed by `changed`; JetStream's acknowledgement."""
    asked = _parser().parse_args(commands()["request"])
    headers = dict(header.split(":", 1) for header in asked.headers) | (more or {})
    body = json.dumps(json.loads(asked.body) | changed).encode()
    return (await connection.request(asked.subject, body, timeout=LIMIT, headers=headers)).data


async def test_the_commands_get_an_answer_and_cancel_one(nats_url: str) -> None:
    listening = _parser().parse_args(commands()["sub"])
    cancel = _parser().parse_args(commands()["pub"])
    connection = await nats.connect(nats_url)
    try:
        async with fleet(nats_url):
            frames = await connection.subscribe(listening.subject)
            acknowledged = json.loads(await ask(connection, max_tokens=8000))
            assert {key: acknowledged[key] for key in ("stream", "seq")} == json.loads(blocks("json")[0])
            kinds = [codec.decode((await frames.next_msg(LIMIT)).data).kind]
            assert kinds[0] in (FrameKind.BEAT, FrameKind.HEAD)
            while FrameKind.DATA not in kinds:
                kinds.append(codec.decode((await frames.next_msg(LIMIT)).data).kind)
            await connection.publish(cancel.subject, cancel.body.encode())
            while (frame := codec.decode((await frames.next_msg(LIMIT)).data)).kind not in TERMINAL:
                pass
            assert frame.extra["code"] == "cancelled"
    finally:
        await connection.close()


LARGE_BODIES = '"$O.payloads.C.*", "$O.payloads.M.*", '


@pytest.fixture(params=[""])
async def guarded_port(
    anyio_backend: object,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    unused_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[int]:
    """A server with the documented users; the parameter is what a tenant may publish to beside that."""
    monkeypatch.setenv("HEADRACE_PASSWORD", "one")
    monkeypatch.setenv("ACME_PASSWORD", "two")
    config = tmp_path / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:{unused_port}"\njetstream {{ store_dir: "{tmp_path}" }}\n'
        + blocks("conf")[0].replace("publish: [", f"publish: [{request.param}")
    )
    process = await asyncio.create_subprocess_exec(
        server.binary(), "-c", str(config), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield unused_port
    finally:
        process.terminate()
        await process.wait()


async def test_the_permissions_hold_a_tenant_to_its_own(guarded_port: int) -> None:
    refusals: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(exc: Exception) -> None:
        if "permissions violation" in str(exc).lower():
            refusals.put_nowait(str(exc).lower())

    address = f"127.0.0.1:{guarded_port}"
    acme = await nats.connect(
        f"nats://acme:two@{address}", inbox_prefix="_INBOX_acme", error_cb=on_error, reconnect_time_wait=0.1
    )
    try:
        async with fleet(f"nats://headrace:one@{address}"):
            frames = await acme.subscribe("out.acme.>")
            own = {"Nats-Msg-Id": "acme:1", "Reply-To": "out.acme.shell.1", "Path": "/v1/chat/completions"}
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
            subject = f"req.{MODEL}.standard.acme.{MODEL}"
            await acme.request(subject, json.dumps(body).encode(), timeout=LIMIT, headers=own)
            kinds = [codec.decode((await frames.next_msg(LIMIT)).data).kind]
            while kinds[-1] not in TERMINAL:
                kinds.append(codec.decode((await frames.next_msg(LIMIT)).data).kind)
            assert kinds[-1] is FrameKind.END

            foreign = own | {"Nats-Msg-Id": "acme:2", "Reply-To": "out.other.shell.1"}
            heard: asyncio.Queue[str] = asyncio.Queue()
            operator = await nats.connect(f"nats://headrace:one@{address}")
            try:

                async def on_message(message: Msg) -> None:
                    heard.put_nowait(message.subject)

                await operator.subscribe("out.other.>", cb=on_message)
                await operator.subscribe("dead.>", cb=on_message)
                await operator.flush()
                await acme.request(subject, b"{}", timeout=LIMIT, headers=foreign)
                # The letter comes after the frame would have.
                assert await asyncio.wait_for(heard.get(), LIMIT) == "dead.malformed_message"
            finally:
                await operator.close()

            for attempt in ("req.m.standard.other.m", "cancel.other.1", "out.acme.shell.1", "$JS.API.INFO"):
                await acme.publish(attempt, b"")
                assert attempt.lower() in await asyncio.wait_for(refusals.get(), LIMIT)
            for attempt in ("out.other.>", "out.>", "_INBOX.>", "req.>"):
                await acme.subscribe(attempt)
                assert attempt.lower() in await asyncio.wait_for(refusals.get(), LIMIT)
    finally:
        await acme.close()


@pytest.mark.parametrize("guarded_port", [LARGE_BODIES], indirect=True)
async def test_a_tenant_stores_a_large_body_by_bare_publishes_and_reads_none(guarded_port: int) -> None:
    assert all(subject in TEXT for subject in ("`$O.payloads.C.*`", "`$O.payloads.M.*`"))
    refusals: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(exc: Exception) -> None:
        if "permissions violation" in str(exc).lower():
            refusals.put_nowait(str(exc).lower())

    address = f"127.0.0.1:{guarded_port}"
    acme = await nats.connect(
        f"nats://acme:two@{address}", inbox_prefix="_INBOX_acme", error_cb=on_error, reconnect_time_wait=0.1
    )
    try:
        async with fleet(f"nats://headrace:one@{address}"):
            body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 20_000}], "max_tokens": 4}
            data = json.dumps(body).encode()
            chunks = [data[:9000], data[9000:]]
            for chunk in chunks:
                await acme.request("$O.payloads.C.n1", chunk, timeout=LIMIT)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            described = {
                "name": "acme.u1",
                "bucket": "payloads",
                "nuid": "n1",
                "size": len(data),
                "chunks": len(chunks),
                "digest": f"SHA-256={digest}",
            }
            place = "$O.payloads.M." + base64.urlsafe_b64encode(b"acme.u1").decode()
            told = json.dumps(described).encode()
            await acme.request(place, told, timeout=LIMIT, headers={"Nats-Rollup": "sub"})

            frames = await acme.subscribe("out.acme.>")
            own = {"Nats-Msg-Id": "acme:1", "Reply-To": "out.acme.shell.1", "Path": "/v1/chat/completions"}
            subject = f"req.{MODEL}.standard.acme.{MODEL}"
            await acme.request(subject, b"", timeout=LIMIT, headers=own | {"Body-Object": "acme.u1"})
            while (frame := codec.decode((await frames.next_msg(LIMIT)).data)).kind not in TERMINAL:
                pass
            assert frame.kind is FrameKind.END, frame.payload
            assert frame.extra["usage"]["prompt_tokens"] > 5000

            for attempt in (
                "STREAM.MSG.GET.OBJ_payloads",
                "DIRECT.GET.OBJ_payloads",
                "STREAM.PURGE.OBJ_payloads",
            ):
                await acme.publish(f"$JS.API.{attempt}", b"")
                assert attempt.lower() in await asyncio.wait_for(refusals.get(), LIMIT)
            await acme.subscribe("$O.payloads.>")
            assert "$o.payloads" in await asyncio.wait_for(refusals.get(), LIMIT)
    finally:
        await acme.close()
