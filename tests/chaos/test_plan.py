"""The plan of faults: the same for the same seed, and never so hard that nothing is left."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos import test_chaos
from tests.chaos.plan import ELECTION, SPARED, Fault, Kind, plan
from tests.chaos.stage import SIZES


def test_a_seed_is_a_plan() -> None:
    assert plan(7, 600, SIZES) == plan(7, 600, SIZES)
    assert plan(7, 600, SIZES) != plan(8, 600, SIZES)


@pytest.mark.parametrize("seed", range(20))
def test_ten_minutes_hold_200_faults_of_every_kind(seed: int) -> None:
    faults = plan(seed, 600, SIZES)
    kinds = Counter(fault.kind for fault in faults)
    assert len(faults) >= 200
    assert kinds.keys() == set(Kind)
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert all(0 < fault.at < 600 and 0 <= fault.slot < SIZES[fault.kind.part] for fault in faults)


def test_the_runs_two_minutes_hold_every_kind_and_one_loss_of_a_node() -> None:
    kinds = Counter(fault.kind for fault in plan(test_chaos.SEED, test_chaos.MINUTES * 60, SIZES))
    assert kinds.keys() == set(Kind)
    assert kinds[Kind.KILL_NATS] == 1


@pytest.mark.parametrize("seed", range(20))
def test_some_of_each_part_are_always_spared(seed: int) -> None:
    faults = plan(seed, 600, SIZES)
    for fault in faults:
        struck = {other.slot for other in faults if _under_way(other, fault)}
        assert len(struck) <= SIZES[fault.kind.part] - SPARED[fault.kind.part]
        assert not any(other is not fault and _clash(other, fault) for other in faults)


def _under_way(other: Fault, fault: Fault) -> bool:
    """Whether `other` is at work at the moment `fault` strikes the same part."""
    return other.kind.part == fault.kind.part and other.at <= fault.at <= other.at + other.lasts


def _clash(other: Fault, fault: Fault) -> bool:
    return _under_way(other, fault) and other.slot == fault.slot


@pytest.mark.parametrize("seed", range(20))
def test_no_worker_and_ingress_are_both_struck_while_the_journal_may_elect(seed: int) -> None:
    faults = plan(seed, 600, SIZES)
    for node in (fault for fault in faults if fault.kind is Kind.KILL_NATS):
        struck = {f.kind.part for f in faults if node.at < f.at < node.at + ELECTION}
        assert not {"worker", "ingress"} <= struck
