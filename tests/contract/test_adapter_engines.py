"""What every engine that serves adapters does with them, the real one and the simulated."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker import artifacts, errors
from ops import demo_model
from tests import asgi
from tests.adapters import safetensors, write_adapter
from tests.contract.conftest import ROOT
from tests.waiting import until
from workers.config import SimConfig, VllmConfig
from workers.engines import base, http, sim, vllm

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SLOTS = 2

VLLM = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@dataclass(frozen=True)
class Made:
    engine: base.Engine
    shapes: Path | None


@asynccontextmanager
async def sim_made() -> AsyncIterator[Made]:
    engine = await sim.start(SimConfig(beta0=1, max_num_seqs=8, adapter_slots=SLOTS, max_rank=16))
    yield Made(engine, None)
    await engine.close()


@asynccontextmanager
async def vllm_made() -> AsyncIterator[Made]:
    model = demo_model.ensure(ROOT / ".data", progress=True)
    config = VllmConfig(model=str(model), max_num_seqs=8, adapter_slots=SLOTS, max_rank=16)
    engine = await vllm.start(config.model_copy(update={"kv_cache_bytes": 64 * 2**20}))
    yield Made(engine, model)
    await engine.close()


@pytest.fixture(scope="module", params=["sim", pytest.param("vllm", marks=VLLM)], ids=["sim", "vllm"])
async def made(request: pytest.FixtureRequest, anyio_backend: object) -> AsyncIterator[Made]:
    async with (sim_made if request.param == "sim" else vllm_made)() as engine:
        yield engine


@pytest.fixture
def engine(made: Made) -> base.Engine:
    return made.engine


@pytest.fixture
def written(made: Made, tmp_path: Path) -> Callable[..., Path]:
    """A new adapter's directory."""
    numbers: Iterator[int] = itertools.count()

    def write(**more: Any) -> Path:
        targets = ("q_proj", "v_proj", "up_proj", "down_proj")
        return write_adapter(
            tmp_path / str(next(numbers)), made.shapes, targets=targets, lora_alpha=160, **more
        )

    return write


async def said(engine: base.Engine, model: str, tokens: int = 12) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0}
    text: str = (await asgi.ask(engine.app, COMPLETIONS, body))["choices"][0]["text"]
    return text


def alike(one: str, other: str) -> int:
    """Characters up to the first that differs."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


async def test_an_adapter_says_something_else_until_it_is_unloaded(
    engine: base.Engine, written: Callable[..., Path]
) -> None:
    assert (engine.adapter_slots, engine.max_rank) == (SLOTS, 16)
    assert engine.adapters_in_memory >= SLOTS
    before = await said(engine, engine.base)
    for number in (1, 2):
        await engine.load_adapter(f"ada@{number}", written(seed=number), 8)
    texts = [await said(engine, model) for model in (engine.base, "ada@1", "ada@2")]
    assert texts[0] == before
    assert len(set(texts)) == 3
    for number in (1, 2):
        await engine.unload_adapter(f"ada@{number}")
        async with asgi.request(engine.app, COMPLETIONS, {"model": f"ada@{number}", "prompt": "x"}) as call:
            await call.json()
        assert call.status == 404
    await engine.unload_adapter("ada@1")  # one that is not loaded is fine
    assert await said(engine, engine.base) == before
    assert not engine.died.done()


async def test_a_name_that_comes_again_has_the_new_weights(
    engine: base.Engine, written: Callable[..., Path]
) -> None:
    await engine.load_adapter("eve@1", written(seed=3), 8)
    old = await said(engine, "eve@1")
    await engine.unload_adapter("eve@1")
    await engine.load_adapter("fay@1", written(seed=4), 8)
    assert await said(engine, "fay@1") != old
    await engine.unload_adapter("fay@1")


async def test_requests_of_several_models_at_once_do_not_mix(
    engine: base.Engine, written: Callable[..., Path]
) -> None:
    models = [engine.base, "one@1", "two@1"]
    for number, model in enumerate(models[1:]):
        await engine.load_adapter(model, written(seed=10 + number), 8)
    alone = [await said(engine, model) for model in models]
    assert len(set(alone)) == 3
    together = await asyncio.gather(*(said(engine, model) for model in models * 2))
    for text, model in zip(together, models * 2, strict=True):
        # bf16 sums, and so greedy words, depend a little on what runs beside.
        nearest = max(models, key=lambda each: alike(alone[models.index(each)], text))
        assert nearest == model
    assert engine.name == "vllm" or together == alone * 2
    # Also in the step after the prefill, beside one that is in the middle of its answer.
    long = asyncio.create_task(said(engine, models[1], 60))
    await until(lambda: engine.stats().running)
    assert alike(await said(engine, engine.base), alone[0]) > alike(alone[1], alone[0])
    await long
    for model in models[1:]:
        await engine.unload_adapter(model)


def no_config(path: Path) -> None:
    (path / artifacts.CONFIG).unlink()


def no_weights(path: Path) -> None:
    (path / artifacts.WEIGHTS).unlink()


def garbage(path: Path) -> None:
    (path / artifacts.WEIGHTS).write_bytes(b"\xff" * 1000)


def cut_off(path: Path) -> None:
    weights = path / artifacts.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])


def pickled(path: Path) -> None:
    (path / artifacts.WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")


def wide(path: Path) -> None:
    config = json.loads((path / artifacts.CONFIG).read_bytes())
    (path / artifacts.CONFIG).write_text(json.dumps(config | {"r": 64}))


@pytest.mark.parametrize("spoil", [no_config, no_weights, garbage, cut_off, pickled, wide])
async def test_a_bad_adapter_fails_and_nobody_else_notices(
    engine: base.Engine, written: Callable[..., Path], spoil: Callable[[Path], None]
) -> None:
    await engine.load_adapter("good@1", written(seed=5), 8)
    texts = [await said(engine, model) for model in (engine.base, "good@1")]
    bad = written(seed=6)
    spoil(bad)
    with pytest.raises(errors.AdapterFailed):
        await engine.load_adapter("bad@1", bad, 8)
    async with asgi.request(engine.app, COMPLETIONS, {"model": "bad@1", "prompt": "x"}) as call:
        await call.json()
    assert call.status == 404
    assert [await said(engine, model) for model in (engine.base, "good@1")] == texts
    await engine.unload_adapter("good@1")


@pytest.mark.parametrize("wrong", ["shape", "modules"])
async def test_weights_of_another_base_fail_or_do_nothing_to_others(
    engine: base.Engine, written: Callable[..., Path], wrong: str
) -> None:
    if engine.name == "sim":
        pytest.skip("it reads no weights")
    before = await said(engine, engine.base)
    path = written(seed=7)
    if wrong == "shape":
        write_adapter(path)  # tiny shapes
    else:
        stem = "base_model.model.model.layers.0.self_attn.no_proj"
        tensors = {f"{stem}.lora_{part}.weight": ((8, 8), b"\0" * 256) for part in "AB"}
        (path / artifacts.WEIGHTS).write_bytes(safetensors(tensors))
    with pytest.raises(errors.AdapterFailed):
        await engine.load_adapter("other@1", path, 8)
    assert await said(engine, engine.base) == before
    await engine.load_adapter("good@1", written(seed=8), 8)
    assert await said(engine, "good@1") != before
    await engine.unload_adapter("good@1")
    assert not engine.died.done()


async def test_more_adapters_than_slots_are_skipped_which_the_stats_tell(
    engine: base.Engine, written: Callable[..., Path]
) -> None:
    """Workers never let it come to that."""
    models = [f"m{number}@1" for number in range(SLOTS + 1)]
    for number, model in enumerate(models):
        await engine.load_adapter(model, written(seed=20 + number), 8)
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, engine.stats().skipped)

    engine.on_change = look
    await asyncio.gather(*(said(engine, model, 8) for model in models))
    engine.on_change = None
    assert most == 1
    await until(lambda: not engine.stats().running)
    for model in models:
        await engine.unload_adapter(model)


async def test_an_engine_without_slots_refuses(anyio_backend: object, tmp_path: Path) -> None:
    engine = await sim.start(SimConfig(adapter_slots=0))
    with pytest.raises(errors.AdapterFailed):
        await engine.load_adapter("ada@1", write_adapter(tmp_path), 8)
    await engine.close()
    assert http.HttpEngine.adapter_slots == 0
