"""What a worker's KV room is thought to hold, and will."""

from __future__ import annotations

import pytest

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.running import Running, Sent
from scheduler.dispatch.types import WorkerState
from tests.unit.scheduler.dispatch.world import item

CLASS = ServiceClass.INTERACTIVE
STEP = DispatchConfig().step


def worker(kv_total: int) -> Running:
    """In slot 0, with nothing to do."""
    running = Running(DispatchConfig(ceilings={CLASS: 1.0}))
    running.join(0)
    running.state(0, WorkerState("w", 0.0, 512, 64, 0, 0, kv_total, kv_total), 0)
    return running


def begin(running: Running, key: int, prompt: int = 100, at: float = 0.0) -> Sent:
    """It is sent, and has its first token at once."""
    sent = Sent(item(key, prompt=prompt, max_tokens=0), 0, at, 0.0, 0.0, 0, first=at)
    running.add(sent)
    return sent


def end(running: Running, key: int, output: int, at: float) -> None:
    sent = running.pop(key)
    assert sent is not None
    running.learn(sent, output, at)


def history(running: Running, lengths: list[int], step: float = STEP) -> None:
    for output in lengths:
        begin(running, -1)
        end(running, -1, output, (output - 1) * step)


def fits(running: Running, prompt: int, at: float) -> bool:
    return running.fits(0, item(-2, prompt=prompt, max_tokens=0), CLASS, at)


def test_the_forecast_of_many_is_as_long_as_they_will_be() -> None:
    running = worker(100_000)
    history(running, [100, 1900] * 100)
    key = 0
    while fits(running, 10, 0.0):
        begin(running, key := key + 1, prompt=10)
    # When the short ones have ended, half of them hold 1,910 tokens each.
    assert key == pytest.approx(95_000 / 955, rel=0.1)


def test_who_outlives_the_forecast_holds_what_it_has_made() -> None:
    running = worker(10_000)
    history(running, [100] * 50)
    for key in range(8):
        begin(running, key)
    assert fits(running, 1000, 0.0)
    assert not fits(running, 1000, 1000 * STEP)  # 8 * 1,100 tokens are there


@pytest.mark.parametrize("real", [STEP / 10, STEP * 10])
def test_outputs_grow_as_fast_as_those_that_ended(real: float) -> None:
    running = worker(10_000)
    history(running, [100] * 50, real)
    for key in range(8):
        begin(running, key)
    assert fits(running, 6000, 100 * real)
    assert not fits(running, 2000, 1000 * real)


def test_prompts_are_as_long_as_engines_have_counted() -> None:
    running = worker(10_000)
    history(running, [1] * 50)
    begin(running, 1, prompt=6000)
    assert not fits(running, 6000, 0.0)
    end(running, 1, 1, 0.0)
    for _ in range(300):
        sent = begin(running, 2, prompt=1500)
        running.pop(2)
        running.learn(sent, 1, 0.0, prompt_tokens=1000)
    begin(running, 1, prompt=6000)
    assert fits(running, 6000, 0.0)
    assert not fits(running, 9000, 0.0)


def test_a_first_token_at_time_zero_is_one() -> None:
    running = worker(10_000)
    history(running, [100] * 50)
    begin(running, 1, prompt=5000, at=0.0)
    assert fits(running, 3000, 0.0)
    assert not fits(running, 3000, 2000 * STEP)
