"""Which models the ingress knows, from heartbeats and from the registry."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from broker import entries, errors, subjects
from broker.entries import ModelEntry
from broker.memory import MemoryBroker
from broker.messages import Credit, Heartbeat, Instance, ModelCard, PoolBeat
from ingress import catalogue as catalogue_module
from ingress import routing
from ingress.catalogue import Catalogue
from ingress.listing import Listing
from ingress.needs import Needs
from tests.waiting import until


def card(name: str, **more: Any) -> ModelCard:
    return ModelCard(id=name, base=name, **more)


async def beat(broker: MemoryBroker, name: str, state: Any = "serving", **more: Any) -> None:
    message = Heartbeat(
        worker="w", engine="sim", base=name, models=(card(name, **more),),
        started_ms=1, seq=0, state=state, credit=Credit(),
    )  # fmt: skip
    await broker.publish(subjects.heartbeat("w"), message.model_dump_json().encode())
    await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The catalogue's own clock, in seconds."""
    now = SimpleNamespace(at=100.0)
    monkeypatch.setattr(catalogue_module, "time", SimpleNamespace(monotonic=lambda: now.at))
    return now


async def test_a_live_worker_tells_its_models_and_a_while_after_it_left(clock: SimpleNamespace) -> None:
    broker = MemoryBroker()
    async with Catalogue(broker) as catalogue:
        assert not catalogue.serving
        with pytest.raises(errors.UnknownModel, match="none yet"):
            catalogue.find("a.b")
        await beat(broker, "a.b")
        assert (catalogue.serving, catalogue.served("a.b"), catalogue.served("other")) == (True, True, False)
        assert catalogue.find("a.b") == card("a.b")
        await beat(broker, "a.b", "draining")
        assert not catalogue.serving
        assert not catalogue.served("a.b")
        assert catalogue.find("a.b") == card("a.b")
        await beat(broker, "a.b", "gone")
        assert not catalogue.serving
        assert catalogue.find("a.b") == card("a.b")
        clock.at += 6
        assert catalogue.cards() == {}
        with pytest.raises(errors.UnknownModel):
            catalogue.find("a.b")


async def test_a_silent_worker_is_gone(clock: SimpleNamespace) -> None:
    broker = MemoryBroker()
    async with Catalogue(broker) as catalogue:
        await beat(broker, "m")
        clock.at += 4
        assert catalogue.serving
        clock.at += 2
        assert not catalogue.serving


async def test_a_registered_model_is_known_without_workers_and_a_live_card_goes_first(
    clock: SimpleNamespace,
) -> None:
    broker = MemoryBroker()
    key = subjects.token("a *ü")
    await broker.put(subjects.KV_MODELS, key, card("a *ü").model_dump_json().encode())
    async with Catalogue(broker) as catalogue:
        assert catalogue.find("a *ü").context_tokens == 0
        await beat(broker, "a *ü", context_tokens=7)
        assert catalogue.find("a *ü").context_tokens == 7
        assert catalogue.cards()["a *ü"].context_tokens == 7
        clock.at += 6
        assert catalogue.find("a *ü").context_tokens == 0
        await broker.remove(subjects.KV_MODELS, key)
        await asyncio.sleep(0)
        with pytest.raises(errors.UnknownModel):
            catalogue.find("a *ü")


async def test_garbage_in_the_registry_or_in_a_heartbeat_hides_nothing_else() -> None:
    broker = MemoryBroker()
    await broker.put(subjects.KV_MODELS, "bad", b"\xff")
    await broker.put(subjects.KV_MODELS, "good", card("good").model_dump_json().encode())
    async with Catalogue(broker) as catalogue:
        await broker.publish(subjects.heartbeat("w"), b"{}")
        await asyncio.sleep(0)
        with pytest.raises(errors.UnknownModel, match=r"known models: good$"):
            catalogue.find("bad")


async def test_what_a_pool_can_start_is_up_though_nobody_serves_it(clock: SimpleNamespace) -> None:
    broker = MemoryBroker()
    async with Catalogue(broker) as catalogue:
        instances = (
            Instance(base="cold", state="cold"),
            Instance(base="broken", state="failed"),
            Instance(base="again", state="starting", failing=True),
        )
        beat = PoolBeat(host="h", name="pool-h", memory=1, used=0, instances=instances)
        for data in (b"no beat", beat.model_dump_json().encode()):
            await broker.publish(subjects.pool("h"), data)
            await asyncio.sleep(0)
        assert catalogue.serving
        clock.at += 2
        names = ("cold", "broken", "again", "other")
        assert [catalogue.up(name) for name in names] == [True, False, False, False]
        assert not catalogue.served("cold")
        clock.at += 10
        assert not any(catalogue.up(name) for name in names)


async def test_nothing_is_down_before_it_could_be_heard(clock: SimpleNamespace) -> None:
    async with Catalogue(MemoryBroker()) as catalogue:
        assert catalogue.up("m")
        clock.at += 2
        assert not catalogue.up("m")


async def test_a_base_that_others_start_for_its_requests_is_up(clock: SimpleNamespace) -> None:
    broker = MemoryBroker()
    async with Catalogue(broker) as catalogue:
        clock.at += 2
        for wakes in (True, False):
            await declare(broker, "far", catalogue, wakes=wakes)
            assert catalogue.up("far") is wakes


async def declare(broker: MemoryBroker, name: str, catalogue: Catalogue, **more: Any) -> None:
    entry = ModelEntry(name=name, kind="base", **more)
    await entries.change(broker, name, lambda _: entry)
    await until(lambda: catalogue.declared.get(name) == entry)


async def test_an_entry_of_a_newer_release_opens_nothing() -> None:
    broker = MemoryBroker()
    newer = b'{"name":"a","kind":"base","tenants":["acme"],"capabilities":["chat","smell"]}'
    async with Catalogue(broker) as catalogue:
        for name, data in (("a", newer), ("b", b'{"name":"b","kind":"orchestra","tenants":["acme"]}')):
            await broker.put(subjects.KV_CATALOGUE, name, data)
            await broker.put(subjects.KV_MODELS, name, card(name).model_dump_json().encode())
        await until(lambda: catalogue.unreadable == {"b"})
        assert catalogue.declared["a"].tenants == ("acme",)
        assert catalogue.declared["a"].capabilities == ("chat",)
        for name in ("a", "b"):
            with pytest.raises(errors.UnknownModel):
                ask(catalogue, name)
        assert Listing.of(catalogue, "t").names() == []
        assert Listing.of(catalogue, "acme").names() == ["a"]
        await broker.put(subjects.KV_CATALOGUE, "b", b'{"name":"b","kind":"base"}')
        await until(lambda: not catalogue.unreadable)
        assert ask(catalogue, "b").model == "b"
        # What was known goes on to hold.
        await broker.put(subjects.KV_CATALOGUE, "a", b'{"name":"a","kind":"orchestra"}')
        await broker.put(subjects.KV_CATALOGUE, "c", b"{}")
        await until(lambda: catalogue.unreadable == {"c"})
        assert catalogue.declared["a"].tenants == ("acme",)


def ask(catalogue: Catalogue, name: str) -> routing.Choice:
    wants = Needs("/v1/chat/completions", {"messages": []})
    return routing.resolve(name, wants, routing.Caller("t", lambda: "c"), catalogue)
