"""What is made up is as its file says: rates, shares, lengths, conversations; a seed gives the same again."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ops.simulate import workload
from ops.simulate.calls import Call
from ops.simulate.fleet_file import FleetFile
from tests.unit.ops.simulate.fleets import fleet

CONTEXT = {"context_tokens": 8192}
GROUPS: dict[str, Any] = {"groups": 20, "prefix": 200, "zipf": 1.0}
TALK: dict[str, Any] = {"turns": 3.0, "think": 2.0}


def calls(file: FleetFile) -> list[Call]:
    return list(workload.calls(file))


def by_second(made: list[Call]) -> list[int]:
    counts = Counter(int(call.at) for call in made)
    return [counts[second] for second in range(max(counts))]


def test_a_seed_gives_the_same_requests_and_another_one_others() -> None:
    one = calls(fleet(GROUPS | TALK, seed=1))
    assert one == calls(fleet(GROUPS | TALK, seed=1))
    assert one != calls(fleet(GROUPS | TALK, seed=2))


def test_a_stream_is_the_same_beside_others() -> None:
    alone = calls(fleet(GROUPS))
    beside = calls(fleet(GROUPS, {"name": "t"}))
    assert [call for call in beside if call.source == 0] == alone
    assert [call.at for call in beside] == sorted(call.at for call in beside)


def test_poisson_arrivals_vary_as_they_should() -> None:
    counts = by_second(calls(fleet({"rate": 40.0}, duration=500.0)))
    assert np.mean(counts) == pytest.approx(40, rel=0.03)
    assert np.var(counts) / np.mean(counts) == pytest.approx(1, abs=0.2)


def test_bursts_come_by_turns_and_leave_the_rate_as_it_is() -> None:
    burst = {"rate": 40.0, "arrivals": "bursts", "peak": 4.0, "burst": 0.2, "period": 10.0}
    made = calls(fleet(burst, duration=500.0))
    assert len(made) / 500 == pytest.approx(40, rel=0.03)
    within = sum(call.at % 10 < 2 for call in made)
    assert within / len(made) == pytest.approx(0.8, abs=0.02)


def test_waves_are_highest_in_the_middle_of_a_period() -> None:
    wave = {"rate": 40.0, "arrivals": "diurnal", "peak": 1.8, "period": 100.0}
    made = calls(fleet(wave, duration=500.0))
    assert len(made) / 500 == pytest.approx(40, rel=0.03)
    middle = sum(40 <= call.at % 100 < 60 for call in made) / 100
    edges = sum(not 10 <= call.at % 100 < 90 for call in made) / 100
    assert middle == pytest.approx(40 * 1.75, rel=0.05)
    assert edges == pytest.approx(40 * 0.25, rel=0.1)


def test_prefixes_and_tenants_are_asked_for_by_rank() -> None:
    zipf = GROUPS | {"rate": 400.0, "tenants": 4, "tenant_zipf": 2.0}
    made = calls(fleet(zipf, duration=100.0))
    asked = Counter(call.hashes[0] for call in made)
    ranked = [count for _, count in asked.most_common()]
    assert len(ranked) == 20
    assert ranked[0] / ranked[9] == pytest.approx(10, rel=0.15)
    tenants = Counter(call.tenant for call in made)
    assert tenants["s-0"] / tenants["s-1"] == pytest.approx(4, rel=0.1)


def test_lengths_have_their_mean_and_their_bound() -> None:
    lengths = {"prompt": {"mean": 300, "sigma": 0.8}, "output": {"mean": 50, "sigma": 0.5, "most": 60}}
    made = calls(fleet(lengths, duration=400.0, engine=CONTEXT))
    assert np.mean([call.prompt for call in made]) == pytest.approx(300, rel=0.03)
    outputs = [call.output for call in made]
    assert max(outputs) == 60
    assert np.median(outputs) == pytest.approx(50 * np.exp(-0.125), rel=0.03)


def test_a_conversation_goes_on_from_what_was_said() -> None:
    made = calls(fleet(TALK, duration=200.0, engine=CONTEXT))
    assert len(made) / 200 == pytest.approx(50, rel=0.1)  # the rate is of requests
    talks: dict[int, list[Call]] = {}
    for call in made:
        talks.setdefault(call.hashes[0], []).append(call)
    assert len(made) / len(talks) == pytest.approx(3, rel=0.1)
    for talk in talks.values():
        for before, after in itertools.pairwise(talk):
            assert after.tenant == before.tenant
            assert after.prompt == before.prompt + before.output + 100
            assert after.hashes[: len(before.hashes)] == before.hashes
    pauses = [b.at - a.at for talk in talks.values() for a, b in itertools.pairwise(talk)]
    assert np.mean(pauses) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("stream", [{}, GROUPS, TALK, GROUPS | TALK], ids=["", "groups", "talk", "both"])
def test_shareable_is_what_a_cache_that_forgets_nothing_has(stream: dict[str, Any]) -> None:
    seen: set[int] = set()
    other = {"name": "t", "groups": 3, "prefix": 64}
    for call in calls(fleet(stream, other, engine=CONTEXT)):
        known = next((n for n, block in enumerate(call.hashes) if block not in seen), len(call.hashes))
        assert len(call.hashes) == call.prompt // 16
        assert call.shareable == min(known, (call.prompt - 1) // 16) * 16
        seen.update(call.hashes)


def test_nothing_is_longer_than_the_engines_take() -> None:
    long = {"prompt": {"mean": 900, "sigma": 1.0}, "output": {"mean": 200, "sigma": 1.0}, "turns": 5.0}
    made = calls(fleet(long, engine={"context_tokens": 1024}))
    assert max(call.prompt + call.output for call in made) == 1024
    assert min(call.prompt for call in made) >= 1


def test_the_dispatcher_is_told_of_whole_blocks_of_its_own() -> None:
    call = Call(0.0, 0, "t", 300, 1, hashes=tuple(range(18)))
    assert call.prefix(16) == (7, 15)
    assert Call(0.0, 0, "t", 20_000, 1, hashes=tuple(range(1250))).prefix(16) == tuple(range(7, 512, 8))
