"""What is made of the measurements: ratios and differences of pairs, and the section of the document."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import journal, report
from benchmarks.load import Result


def pair(on_wall: float, off_wall: float, on_ttft: float, off_ttft: float) -> journal.Pair:
    cpu = dict.fromkeys(journal.PARTS, 0.0)
    return {
        "on": (Result(wall=on_wall, tokens=1000, ttft=[on_ttft] * 9), cpu | {"worker": 0.003}),
        "off": (Result(wall=off_wall, tokens=1000, ttft=[off_ttft] * 9), cpu | {"worker": 0.001}),
    }


PAIRS = [pair(1.25, 1.0, 0.0215, 0.0213), pair(1.0, 1.0, 0.0225, 0.0211), pair(2.0, 1.0, 0.0214, 0.0213)]


def test_speed_is_compared_within_each_round() -> None:
    found = journal.speed(PAIRS)
    assert found["on_tokens_per_s"]["median"] == 800
    assert found["tokens_per_s_ratio"] == {"median": 0.8, "low": 0.5, "high": 1.0}


def test_added_ttft_is_in_milliseconds() -> None:
    found = journal.ttft(PAIRS)
    assert found["added_ttft_p50_ms"]["median"] == pytest.approx(0.2)
    assert found["added_ttft_p99_ms"]["high"] == pytest.approx(1.4)
    assert found["off_ttft_p50_ms"]["median"] == pytest.approx(21.3)


def test_cpu_is_told_by_part_and_token() -> None:
    found = journal._cpu(PAIRS)
    assert found["on_us_per_token"]["worker"]["median"] == pytest.approx(3)
    assert found["added_us_per_token"]["worker"]["median"] == pytest.approx(2)
    assert found["added_us_per_token"]["ingress"]["median"] == 0


def record() -> dict[str, Any]:
    def held(messages: int, size: int, nats: float) -> dict[str, Any]:
        return {"messages": messages, "bytes": size, "first": 1, "nats_mib": nats, "worker_mib": 60.0}

    speed = journal.speed(PAIRS)
    return {
        "command": "python -m benchmarks.journal",
        "date": "2026-01-01",
        "machine": {"cpu": "cpu", "cores": 2, "memory_gib": 4, "kernel": "6", "python": "3.11"},
        "rounds": 3,
        "saturated": {"streams": 64, "tokens": 200, **speed, **journal._cpu(PAIRS)},
        "paced": {
            "ttft_ms": 20,
            "itl_ms": 20,
            "tokens": 40,
            "streams": {"32": speed | journal.ttft(PAIRS), "200": speed | journal.ttft(PAIRS)},
        },
        "memory": {
            "streams": 1000,
            "tokens": 200,
            "limit": 256 * 2**20,
            "before": held(0, 0, 20.0),
            "after": held(202_000, 64 * 2**20, 120.0),
            "full": held(808_000, 256 * 2**20, 420.0),
        },
        "cores_used_by_others": 0.05,
    }


def test_the_section_holds_each_figure_against_its_target() -> None:
    text = report._journal(record())
    assert (
        "| saturated, 64 | tokens/s | 800 | 1,000 | ratio 0.800 (0.500 to 1.000) | ≥ 0.95: **missed** |"
        in text
    )
    assert "| paced, 32 | TTFT p50, ms | 21.50 | 21.30 | added 0.20 (0.10 to 1.40) | ≤ 0.3: met |" in text
    assert "| paced, 200 | TTFT p50, ms | 21.50 | 21.30 | added 0.20 (0.10 to 1.40) | ≤ 0.3: met |" in text


def test_the_section_says_how_much_the_journal_holds() -> None:
    text = " ".join(report._journal(record()).split())
    assert "1,000 streams of 200 tokens, a frame each, put 64 MiB into it" in text
    assert "332 bytes a frame" in text
    assert "room for 4,000 such streams, or for the last 800,000 tokens" in text
    assert "| nats-server | 20 | 120 | 420 |" in text
