"""What tenants were served comes back as it was noted, and nothing else does."""

from __future__ import annotations

import pytest

from broker import subjects
from broker.memory import MemoryBroker
from scheduler import ledger


@pytest.fixture
def broker(anyio_backend: object) -> MemoryBroker:
    return MemoryBroker()


async def test_an_entry_is_read_back_for_its_base_alone(broker: MemoryBroker) -> None:
    served = {"standard": {"acme": 1500.0, "Fält & Söhne": 2.5}, "batch": {}}
    await ledger.write(broker, "org/base", served)
    entry = await ledger.read(broker, "org/base")
    assert entry.served == served
    assert 0 <= entry.age(broker.now_ms()) < 60
    assert (await ledger.read(broker, "org/other")).served == {}


async def test_those_that_were_served_most_are_kept(broker: MemoryBroker) -> None:
    served = {f"t{number}": float(number + 1) for number in range(ledger.MOST + 10)}
    await ledger.write(broker, "b", {"standard": served})
    kept = (await ledger.read(broker, "b")).served["standard"]
    assert len(kept) == ledger.MOST
    assert min(kept.values()) == 11.0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"served": 3}',
        b'{"served": {"batch": {"t": -1}}}',
        b'{"served": {"batch": {"t": 1e300}}}',
        b'{"served": {"batch": {"t": "NaN"}}}',
    ],
)
async def test_what_can_not_be_read_is_as_if_it_were_not_there(broker: MemoryBroker, data: bytes) -> None:
    await broker.put(subjects.KV_LEASES, subjects.shares("b"), data)
    assert (await ledger.read(broker, "b")).served == {}


def test_an_entry_of_a_clock_that_is_ahead_is_of_now() -> None:
    assert ledger.Entry(at_ms=10**12 + 10**9).age(10**12) == 0.0
    assert ledger.Entry(at_ms=10**12 - 5000).age(10**12) == 5.0
