"""`headrace models` and `headrace adapters` as an operator runs them, and what an ingress shows at once."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker import artifacts, base, client, entries, subjects
from broker.config import BrokerConfig
from broker.messages import AdapterState, Credit, Heartbeat, ModelCard
from broker.server import NatsServer
from tests.adapters import safetensors, write_adapter
from tests.integration.reading import connected
from tests.integration.serving import ingress
from tests.waiting import LIMIT, until


async def headrace(url: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "ops", *arguments, "--nats", url],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(LIMIT):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err
    return process.returncode, out.decode(), err.decode()


async def done(url: str, *arguments: str) -> str:
    """What a command that succeeds prints."""
    status, out, err = await headrace(url, *arguments)
    assert status == 0, err
    return out


async def refused(url: str, *arguments: str) -> str:
    """Why a command fails."""
    status, out, err = await headrace(url, *arguments)
    assert (status, out) == (1, "")
    return err


@asynccontextmanager
async def beating(broker: base.Broker, **facts: Any) -> AsyncIterator[None]:
    """A worker of base `llama`, as far as others hear of it."""

    async def beat() -> None:
        seq = 0
        while True:
            seq += 1
            card = ModelCard(id="llama", base="llama", context_tokens=8192, paths=("/v1/chat/completions",))
            told = Heartbeat(
                worker="w1",
                engine="sim",
                base="llama",
                models=(card,),
                started_ms=1,
                seq=seq,
                state="serving",
                credit=Credit(),
                max_rank=16,
                **facts,
            )
            await broker.publish(subjects.heartbeat("w1"), told.model_dump_json().encode())
            await asyncio.sleep(0.1)

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


async def models(http: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in (await http.get("/v1/models")).json()["data"]}


async def test_an_adapter_from_push_to_rollback_is_shown_at_once(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    config, url = BrokerConfig(url=nats_server.url), nats_server.url
    first = write_adapter(tmp_path / "1", base="org/Llama")
    second = write_adapter(tmp_path / "2", seed=1, rank=4, base="llama")
    wide = write_adapter(tmp_path / "3", rank=32, base="llama")
    state = AdapterState(model="support@1", state="ready", running=2)
    async with (
        await client.connect(config, "worker") as broker,
        beating(broker, adapters=(state,), slots=4),
        ingress(config) as address,
        connected(address) as http,
    ):
        assert "take 16 at most" in await refused(url, "adapters", "push", "support", str(wide))
        out = await done(url, "adapters", "push", "support", str(first), "--source", "run 1")
        assert out.startswith("support has version 1: rank 8 on llama, ")
        assert out.endswith("\nsupport means version 1\n")

        async def means(number: int) -> bool:
            return (await models(http)).get("support", {}).get("version") == number

        await until(lambda: means(1))
        shown = (await models(http))["support"]
        assert (shown["parent"], shown["root"], shown["serving"]) == ("llama", "support@1", True)
        out = await done(url, "adapters", "push", "support", str(second), "--base", "llama")
        assert "support has version 2: rank 4" in out
        await until(lambda: means(2))
        assert "support is version 1 already" in await done(
            url, "adapters", "push", "support", str(first), "--no-activate"
        )
        assert await done(url, "adapters", "rollback", "support") == "support means version 1, and meant 2\n"
        await until(lambda: means(1))

        (row,) = (await done(url, "adapters", "list")).splitlines()[1:]
        assert row.split()[:5] == ["support", "llama", "1", "1,2", "8"]
        assert row.endswith("1 ready")
        told = json.loads(await done(url, "adapters", "show", "support", "--json"))
        assert told["loaded"]["1"]["w1"]["running"] == 2
        assert [version["source"] for version in told["versions"]] == ["run 1", ""]
        found = await entries.read(broker, "support")
        assert found is not None
        into = tmp_path / "into"
        into.mkdir()
        await artifacts.fetch(broker, found.versions[1], into)

        assert "'support' means version 1" in await refused(url, "adapters", "remove", "support", "1")
        assert await done(url, "adapters", "remove", "support", "2") == "removed: support@2\n"
        assert await done(url, "adapters", "remove", "support") == "removed: support@1\n"
        await until(lambda: gone(http, "support"))
        stream = subjects.objects(subjects.ARTIFACTS)
        assert await broker.counts(stream, subjects.all_objects(subjects.ARTIFACTS)) == {}
        assert (await headrace(url, "adapters", "sweep", "--age", "0"))[0] == 0


async def gone(http: httpx.AsyncClient, name: str) -> bool:
    return name not in await models(http)


async def test_the_catalogue_changes_while_an_ingress_serves(nats_server: NatsServer, tmp_path: Path) -> None:
    config, url = BrokerConfig(url=nats_server.url), nats_server.url
    keys = {"acme": "k-acme-0123456789abcdef", "umbrella": "k-umbrella-0123456789abcdef"}
    async with (
        await client.connect(config, "worker") as broker,
        beating(broker),
        ingress(config, api_keys=keys) as address,
        connected(address) as http,
    ):
        refusal = await http.get("/v1/models")
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (401, "invalid_api_key")
        http.headers["Authorization"] = f"Bearer {keys['acme']}"
        await until(lambda: shows(http, "llama"))
        await done(url, "adapters", "push", "support", str(write_adapter(tmp_path, base="llama")))
        flags = ["--capabilities", "chat,tools", "--languages", "en-GB,de", "--price-input", "0.1"]
        await done(url, "models", "set", "llama", *flags, "--price-output", "0.4", "--context", "4096")
        await done(url, "models", "alias", "help", "support@1=90", "llama=10")
        await done(url, "models", "router", "auto", "llama", "support")
        await until(lambda: shows(http, "auto"))
        shown = await models(http)
        assert shown["llama"]["price"] == {"input": 0.1, "cached": 0.1, "output": 0.4}
        assert (shown["support"]["languages"], shown["support"]["max_model_len"]) == (["en", "de"], 4096)
        assert shown["help"]["targets"] == [
            {"model": "support@1", "weight": 90},
            {"model": "llama", "weight": 10},
        ]
        await done(url, "models", "set", "help", "--tenants", "umbrella")
        await until(lambda: gone(http, "help"))
        hidden = await http.get("/v1/models/help")
        assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "model_not_found")
        assert "help" not in hidden.json()["error"]["message"].partition("known models: ")[2]
        other = {"Authorization": f"Bearer {keys['umbrella']}"}
        assert (await http.get("/v1/models/help", headers=other)).json()["kind"] == "alias"

        assert "auto, help lead to support" in await refused(url, "adapters", "remove", "support")
        await done(url, "models", "alias", "helper", "help")
        assert "helper need help" in await refused(url, "models", "remove", "help")
        await done(url, "models", "remove", "helper")
        await done(url, "models", "remove", "help")
        assert "nothing is declared of 'help'" in await refused(url, "models", "remove", "help")
        assert (await done(url, "models", "remove", "llama")).endswith("its workers serve it as before\n")
        names = [line.split()[0] for line in (await done(url, "models", "list")).splitlines()[1:4]]
        assert names == ["llama", "support", "auto"]
        assert json.loads((await done(url, "models", "list", "--json")).splitlines()[0])["name"] == "llama"


async def shows(http: httpx.AsyncClient, name: str) -> bool:
    return name in await models(http)


async def test_a_push_that_is_killed_leaves_no_version_and_a_sweep_its_files(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    config, url = BrokerConfig(url=nats_server.url), nats_server.url
    large = write_adapter(tmp_path, rank=64, base="llama", targets=("q_proj",))
    stem, size = "base_model.model.model.layers.0.self_attn.q_proj", 100_000
    halves = {"A": (64, size), "B": (size, 64)}
    tensors = {f"{stem}.lora_{half}.weight": (shape, bytes(256 * size)) for half, shape in halves.items()}
    (large / artifacts.WEIGHTS).write_bytes(safetensors(tensors))
    stream, chunks = subjects.objects(subjects.ARTIFACTS), subjects.all_object_chunks(subjects.ARTIFACTS)
    async with await client.connect(config, "fleet") as broker:
        await done(url, "models", "set", "llama", "--declare")
        push = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "ops", "adapters", "push", "support", str(large), "--nats", url]
        )

        async def begun() -> bool:
            return sum((await broker.counts(stream, chunks)).values()) > 40

        await until(begun)
        push.kill()
        assert await push.wait() < 0
        assert await entries.read(broker, "support") is None
        assert "0 objects" in (await headrace(url, "adapters", "sweep"))[2]  # it might go on yet
        assert await begun()
        assert (await headrace(url, "adapters", "sweep", "--age", "0"))[0] == 0
        assert await broker.counts(stream, subjects.all_objects(subjects.ARTIFACTS)) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["models", "set", "nobody", "--context", "1"], "there is no model 'nobody'; there are: none"),
        (["models", "alias", "a", "nobody"], "there is no model 'nobody'"),
        (["models", "alias", "a", "a"], "there is no model 'a'"),
        (["models", "alias", "auto", "a"], "'auto' leaves the choice to Headrace"),
        (["models", "show", "nobody"], "there is no model 'nobody'"),
        (["adapters", "show", "nobody"], "there is no adapter 'nobody'"),
        (["adapters", "rollback", "nobody"], "there is no adapter 'nobody'"),
        (["adapters", "remove", "nobody"], "there is no adapter 'nobody'"),
        (["adapters", "push", "a", "/nonexistent"], "/nonexistent can't be read"),
    ],
)
async def test_a_mistake_is_told_in_one_line(nats_url: str, arguments: list[str], says: str) -> None:
    async with await client.connect(BrokerConfig(url=nats_url), "fleet"):
        told = await refused(nats_url, *arguments)
    assert says in told
    assert told.count("\n") == 1


async def test_an_entry_that_can_not_be_read_is_told_and_can_be_removed(nats_url: str) -> None:
    async with await client.connect(BrokerConfig(url=nats_url), "newer release") as broker:
        await broker.put(subjects.KV_CATALOGUE, "odd", b'{"kind":"new"}')
        told = await headrace(nats_url, "models", "list")
        assert told == (0, "", "headrace models: entries that can't be read: odd\n")
        assert "nothing was removed" in await refused(nats_url, "adapters", "sweep")
        assert "--force removes it" in await refused(nats_url, "models", "remove", "odd")
        assert await done(nats_url, "models", "remove", "odd", "--force") == "odd: removed\n"
        assert await entries.read_all(broker) == ({}, [])


async def test_a_server_without_a_fleet_is_told(nats_url: str) -> None:
    assert (await refused(nats_url, "models", "list")).count("\n") == 1
    assert (await refused(nats_url, "adapters", "list")).count("\n") == 1
