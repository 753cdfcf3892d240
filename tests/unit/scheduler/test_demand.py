"""Running means of what is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from broker.messages import Latency, UsageEvent
from scheduler import demand
from scheduler.demand import Demand

KEY = ("llama", "ada@1")


def ended(model: str = "ada@1", total: float = 2.0, queue: float = 0.0, **more: Any) -> UsageEvent:
    told: dict[str, Any] = {
        "request_id": "r",
        "tenant": "t",
        "model": model,
        "base": "llama",
        "service_class": "standard",
        "path": "/v1/completions",
        "worker": "w1",
        "outcome": "finished",
        "status": 200,
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "finished_ms": 0,
        "latency": Latency(queue=queue, total=total),
    }
    return UsageEvent(**(told | more))


def test_the_first_request_counts_at_once() -> None:
    seen = Demand(15)
    seen.sample({KEY: 3}, 10.0)
    wanted = seen.of("llama")["ada@1"]
    assert (wanted.concurrency, wanted.present, wanted.asked) == (3.0, 3, True)
    assert seen.of("other") == {}


def test_the_mean_follows_with_its_time_constant() -> None:
    seen = Demand(10)
    seen.sample({KEY: 10}, 0.0)
    for second in range(1, 11):
        seen.sample({}, float(second))
    assert seen.of("llama")["ada@1"].concurrency == pytest.approx(10 / math.e)


def test_requests_between_two_samples_show_in_the_usage_events() -> None:
    """Five a second, two seconds each in an engine: ten at once, though no sample ever saw one."""
    seen = Demand(1)
    seen.sample({}, 0.0)
    for second in range(1, 20):
        for _ in range(5):
            seen.ended(ended(total=3.0, queue=1.0))
        seen.sample({}, float(second))
    wanted = seen.of("llama")["ada@1"]
    assert wanted.present == 0
    assert wanted.concurrency == pytest.approx(10, rel=0.01)


def test_what_nobody_asks_for_is_forgotten() -> None:
    seen = Demand(1)
    seen.sample({KEY: 5}, 0.0)
    seen.ended(ended())
    for second in range(1, 30):
        seen.sample({}, float(second))
    assert seen.of("llama") == {}
    assert seen.bases == set()


def test_models_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "MODELS", 3)
    seen = Demand(15)
    seen.sample({("llama", f"m{n}"): 1 for n in range(9)}, 0.0)
    seen.ended(ended("another"))
    assert len(seen.of("llama")) == 3
    assert seen.present("llama") == 3


def test_the_length_of_requests_is_learnt_from_those_that_ran() -> None:
    seen = Demand(15)
    assert seen.tokens("llama", unknown=7.0) == 7.0
    seen.ended(ended(completion_tokens=0, outcome="failed", status=504, latency=Latency()))
    assert seen.tokens("llama", unknown=7.0) == 7.0
    seen.ended(ended())
    assert seen.tokens("llama") == 120.0
