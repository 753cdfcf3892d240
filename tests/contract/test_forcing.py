"""By what an engine is made to say what another worker said already, and what it can't go on with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from broker.messages import FrameKind
from tests.contract.test_continuing import CASES, PLAIN, answered, payload
from tests.contract.test_vllm_engine import ASK, CHAT, body_for
from workers.engines import base

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:ORJSONResponse is deprecated"),
]


@pytest.fixture
def replay(vllm_engine: base.Engine) -> Any:
    """The module, which may be imported once vLLM is there."""
    from workers.engines import vllm_replay

    return vllm_replay


async def test_what_an_engine_cannot_go_on_with_is_told(
    vllm_engine: Any, replay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that decodes speculatively can't be forced, but can be given a longer prompt."""
    monkeypatch.setattr(vllm_engine._llm, "force", replay.Force.NOTHING)
    body = body_for(CHAT, ASK, 14) | PLAIN
    said = (await answered(vllm_engine, CHAT, body, []))[:5]
    assert payload(await answered(vllm_engine, CHAT, body, said))
    error = (await answered(vllm_engine, CHAT, body | CASES["penalties"][1], said))[-1]
    assert (error.kind, error.extra["code"]) == (FrameKind.ERROR, "worker_lost")


@pytest.mark.parametrize(
    ("of_engine", "of_model", "force"),
    [
        ({}, {}, "PROCESSOR"),
        ({"speculative_config": object()}, {}, "NOTHING"),
        ({}, {"runner_type": "pooling"}, "NOTHING"),
        ({"use_v2_model_runner": True}, {}, "TRACE"),
    ],
)
def test_the_engines_settings_say_how_it_can_be_forced(
    replay: Any, of_engine: dict[str, Any], of_model: dict[str, Any], force: str
) -> None:
    plain = {"runner_type": "generate", "logits_processors": None, "enable_trace_replay": False}
    model = SimpleNamespace(**plain | of_model)
    engine = {"speculative_config": None, "use_v2_model_runner": False} | of_engine
    assert replay.prepare(SimpleNamespace(model_config=model, **engine)).name == force
    assert bool(model.logits_processors) == (force == "PROCESSOR")
    assert model.enable_trace_replay == (force == "TRACE")


@pytest.mark.parametrize("force", ["PROCESSOR", "TRACE"])
async def test_each_choice_is_given_its_own_tokens(replay: Any, force: str) -> None:
    """With its own seed, as vLLM seeds them. What TRACE does in the engine needs a GPU to be seen."""
    from vllm import SamplingParams

    asked: dict[str, Any] = {}

    async def generate(prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        asked[request_id] = params
        yield SimpleNamespace(outputs=[SimpleNamespace(index=0)], finished=True)

    params = SamplingParams(n=2, seed=7, presence_penalty=0.5, max_tokens=9)
    given = {0: [5, 6], 1: [8]}
    outputs = replay.replayed(generate, {}, params, "r1", given, None, replay.Force[force])
    assert [output.finished async for output in outputs] == [False, True]
    assert [asked[name].seed for name in ("0_r1", "1_r1")] == [7, 8]
    for index, ids in given.items():
        one = asked[f"{index}_r1"]
        assert (one.trace_decode_token_ids == ids) == (force == "TRACE")
        assert (one.extra_args == {"headrace_forced": ids}) == (force == "PROCESSOR")
