from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from tests import asgi
from tests.waiting import until
from workers.config import SimConfig
from workers.engines import sim
from workers.engines.sim_answer import StopScan

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
PROMPT = sim.tokenize(sim.chat_prompt([("system", "Be brief."), ("user", "Hello there")]))


@asynccontextmanager
async def engine(**changes: Any) -> AsyncIterator[sim.SimEngine]:
    made = await sim.start(SimConfig.model_validate({"beta0": 0.2, "beta1": 0} | changes))
    try:
        yield made
    finally:
        await made.close()


def expected(n: int, choice: int = 0, prompt: list[int] = PROMPT) -> str:
    return sim.text_of(sim.expected_tokens(prompt, n, choice))


async def chat(made: sim.SimEngine, **more: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await asgi.ask(made.app, CHAT, {"messages": MESSAGES} | more)
    return answer


# --- the language ---


@given(
    st.lists(st.integers(0, 2**17 - 1), min_size=1), st.integers(0, 20), st.integers(0, 20), st.integers(0, 9)
)
def test_prompt_and_output_as_a_prompt_go_on_with_the_same_stream(
    prompt: list[int], done: int, more: int, choice: int
) -> None:
    whole = sim.expected_tokens(prompt, done + 1 + more, choice)
    assert sim.expected_tokens(prompt + whole[: done + 1], more) == whole[done + 1 :]


@given(st.lists(st.integers(0, 2**17 - 1), min_size=1))
def test_choices_differ_from_their_first_token(prompt: list[int]) -> None:
    firsts = [sim.expected_tokens(prompt, 1, choice)[0] for choice in range(8)]
    assert len(set(firsts)) == 8


@given(st.text(), st.text())
def test_a_prefix_of_a_text_has_the_same_tokens_but_its_last(text: str, more: str) -> None:
    kept = sim.tokenize(text)[:-1]
    assert sim.tokenize(text + more)[: len(kept)] == kept


def test_the_text_numbers_its_tokens_and_needs_no_escaping() -> None:
    text = expected(3)
    assert [part.split(":")[0] for part in text.split()] == ["t0", "t1", "t2"]
    assert text.isascii()
    assert not set(text) & set('"\\')


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1), min_size=1),
)
def test_text_is_cut_before_the_first_stop_string_wherever_tokens_end(
    tokens: list[str], stops: list[str]
) -> None:
    scan, shown = StopScan(tuple(stops), 0), ""
    for token in tokens:
        text, stopped = scan.feed(token)
        shown += text
        if stopped:
            break
    else:
        shown += scan.flush()
    text = "".join(tokens)
    # A scanner stops at the first token that completes a stop string, not at the leftmost of a longer text.
    for end in range(len(tokens) + 1):
        text = "".join(tokens[:end])
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            text = text[: min(found)]
            break
    assert shown == text


# --- the answers ---


@pytest.mark.anyio
async def test_each_endpoint_answers_with_the_tokens_its_prompt_decides() -> None:
    async with engine() as made:
        assert (await chat(made, max_tokens=5))["choices"][0]["message"]["content"] == expected(5)
        messages = await asgi.ask(made.app, "/v1/messages", {"messages": MESSAGES, "max_tokens": 5})
        assert messages["content"] == [{"type": "text", "text": expected(5)}]
        body = {"instructions": "Be brief.", "input": "Hello there", "max_output_tokens": 5}
        response = await asgi.ask(made.app, "/v1/responses", body)
        assert response["output"][0]["content"][0]["text"] == expected(5)
        prompt = sim.tokenize("Hello")
        for given_prompt in ("Hello", prompt):
            answer = await asgi.ask(made.app, COMPLETIONS, {"prompt": given_prompt, "max_tokens": 5})
            assert answer["choices"][0]["text"] == expected(5, prompt=prompt)
        assert (await asgi.ask(made.app, "/tokenize", {"messages": MESSAGES}))["tokens"] == PROMPT


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/responses", {"input": "Hello there", "max_output_tokens": 9}, "response.output_text.delta"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9}, "content_block_delta"),
    ],
)
async def test_streamed_events_hold_the_text_of_the_whole(path: str, body: Any, kind: str) -> None:
    async with engine() as made:
        async with asgi.request(made.app, path, body | {"stream": True}) as call:
            events = [event async for event in call.events()]
        whole = await asgi.ask(made.app, path, body)
    deltas = [event["delta"] for event in events if event["type"] == kind]
    text = "".join(delta if isinstance(delta, str) else delta["text"] for delta in deltas)
    assert len(deltas) == 9
    if path == "/v1/responses":
        assert text == whole["output"][0]["content"][0]["text"]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"]["usage"]["output_tokens"] == 9
    else:
        assert text == whole["content"][0]["text"]
        assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]


@pytest.mark.anyio
async def test_given_token_ids_skip_the_template_and_go_on_from_there() -> None:
    async with engine() as made:
        done = sim.expected_tokens(PROMPT, 7)
        answer = await chat(made, kv_transfer_params={"prompt_token_ids": PROMPT + done}, max_tokens=5)
        assert expected(7) + answer["choices"][0]["message"]["content"] == expected(12)
        # Without a limit the continuation ends where the whole answer would have.
        answer = await chat(made, kv_transfer_params={"prompt_token_ids": PROMPT + done})
        assert expected(7) + answer["choices"][0]["message"]["content"] == expected(64)
        assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.anyio
async def test_several_prompts_and_choices_each_have_their_index() -> None:
    async with engine() as made:
        body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 4}
        answer = await asgi.ask(made.app, COMPLETIONS, body)
    one, two = sim.tokenize("one"), sim.tokenize("two")
    texts = [expected(4, choice, prompt) for prompt in (one, two) for choice in (0, 1)]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.anyio
async def test_a_stop_string_ends_the_answer_but_not_before_min_tokens() -> None:
    async with engine() as made:
        answer = await chat(made, max_tokens=20, stop=[" t3:"])
        assert answer["choices"][0]["message"]["content"] == expected(3)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 4
        answer = await chat(made, max_tokens=20, stop=[" t3:"], min_tokens=5)
        assert answer["choices"][0]["message"]["content"] == expected(20)
        async with asgi.request(
            made.app, CHAT, {"messages": MESSAGES, "stop": " t3:", "stream": True}
        ) as call:
            choices = [event["choices"][0] async for event in call.events()]
        assert "".join(choice["delta"]["content"] for choice in choices) == expected(3)
        assert made.stats().running == 0


@pytest.mark.anyio
async def test_preempted_requests_still_send_exactly_their_tokens() -> None:
    async with engine(kv_blocks=16, block_size=4, context_tokens=64, max_num_batched_tokens=64) as made:
        bodies = [{"prompt": f"number {n}", "max_tokens": 50} for n in range(6)]
        answers = await asyncio.gather(*(asgi.ask(made.app, COMPLETIONS, body) for body in bodies))
        stats = made.stats()
    for body, answer in zip(bodies, answers, strict=True):
        assert answer["choices"][0]["text"] == expected(50, prompt=sim.tokenize(str(body["prompt"])))
    assert stats.preemptions > 0
    assert stats.kv_tokens_free == stats.kv_tokens_total
    assert stats.kv_block_tokens == 4


@pytest.mark.anyio
@pytest.mark.parametrize(
    "extra",
    [{"logprobs": True}, {"echo": True}, {"stop": 5}, {"n": True}, {"stream": "yes"}, {"min_tokens": -1}],
)
async def test_what_is_not_simulated_or_of_a_wrong_type_is_refused_by_name(extra: dict[str, Any]) -> None:
    async with engine() as made, asgi.request(made.app, CHAT, {"messages": MESSAGES} | extra) as call:
        answer = await call.json()
    assert call.status == 400
    assert answer["error"]["param"] == next(iter(extra))


@pytest.mark.anyio
async def test_past_the_context_the_error_says_by_how_much() -> None:
    async with engine(context_tokens=64) as made:
        for body, words in [
            ({"prompt": [1] * 60, "max_tokens": 5}, "5 > 64 - 60"),
            ({"prompt": [1] * 64}, "maximum context length is 64 tokens"),
        ]:
            async with asgi.request(made.app, COMPLETIONS, body) as call:
                assert words in (await call.json())["error"]["message"]
            assert call.status == 400


@pytest.mark.anyio
async def test_a_body_past_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engines.asgi.MAX_BODY", 100)
    async with engine() as made, asgi.request(made.app, CHAT, b"x" * 101) as call:
        assert "100 bytes" in (await call.json())["error"]["message"]
    assert call.status == 413


# --- the pace ---


@pytest.mark.anyio
async def test_on_its_own_clock_a_request_takes_ttft_and_itl_and_others_wait_for_a_slot() -> None:
    async with engine(ttft_ms=20, itl_ms=5, max_num_seqs=1) as made:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with (
            asgi.request(made.app, CHAT, {"messages": MESSAGES, "max_tokens": 3}) as first,
            asgi.request(made.app, CHAT, {"messages": MESSAGES, "max_tokens": 3}) as second,
        ):
            await first.json()
            assert loop.time() - begun >= 0.028
            assert (made.stats().running, made.stats().waiting) == (1, 0)
            assert second.tap.first_token_at is None
            answer = await second.json()
            assert answer["choices"][0]["message"]["content"] == expected(3)
            assert loop.time() - begun >= 0.058
        assert made.stats().running == 0


@pytest.mark.anyio
async def test_a_slow_reader_gets_what_has_gathered_in_one_body() -> None:
    async with engine() as made:
        body = {"messages": MESSAGES, "max_tokens": 30, "stream": True}
        app_may_send = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            async def held(message: Any) -> None:
                await app_may_send.wait()
                await send(message)

            await made.app(scope, receive, held)

        async with asgi.request(slow, CHAT, body) as call:
            await until(lambda: made.stats().steps == 30)
            app_may_send.set()
            events = [event async for event in call.events()]
    assert len(events) == 31
    assert len(call.parts) == 1


@pytest.mark.anyio
async def test_close_ends_running_requests_with_the_reason() -> None:
    async with engine() as made:
        async with asgi.request(
            made.app, CHAT, {"messages": MESSAGES, "max_tokens": 5000, "stream": True}
        ) as call:
            await anext(call.chunks())
            await made.close()
            with pytest.raises(errors.EngineFailed):
                await call.ended()
        async with asgi.request(made.app, CHAT, {"messages": MESSAGES}) as call:
            with pytest.raises(errors.EngineFailed):
                await call.ended()


@pytest.mark.anyio
async def test_served_alone_it_answers_over_http_and_stops_when_told() -> None:
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(sim.serve(SimConfig(beta0=1), "127.0.0.1", 0, stop, url.set_result))
    try:
        async with httpx.AsyncClient(base_url=await url) as client:
            answer = await client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 4})
            assert answer.json()["choices"][0]["message"]["content"] == expected(4)
            assert (await client.get("/health")).status_code == 200
            assert (await client.get(CHAT)).status_code == 405
    finally:
        stop.set()
        await server


def test_importing_it_loads_no_model_library() -> None:
    code = "import sys, workers.engines.sim; print({'torch', 'vllm', 'numpy', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
