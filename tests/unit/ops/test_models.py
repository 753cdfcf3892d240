"""`headrace models`: what may be declared, and what it then says."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import entries, errors, subjects
from broker.entries import ModelEntry, Price, Target, Version
from broker.memory import MemoryBroker
from broker.messages import AdapterState, Credit, Heartbeat, Instance, ModelCard, PoolBeat, ServiceClass
from ops import catalogue, cli, listings, models
from ops.catalogue import Catalogue


@pytest.fixture
async def broker(anyio_backend: object) -> AsyncIterator[MemoryBroker]:
    async with MemoryBroker() as broker:
        yield broker


def flags(*arguments: str) -> argparse.Namespace:
    return cli.parser().parse_args(["models", "set", "support", *arguments])


def version(number: int) -> Version:
    return Version(number=number, digest=f"sha256:{number}", rank=8, targets=("q_proj",))


def alias(name: str, *to: str) -> ModelEntry:
    return ModelEntry(name=name, kind="alias", targets=tuple(Target(model=model) for model in to))


BEAT = Heartbeat(
    worker="w1",
    engine="sim",
    base="llama",
    models=(ModelCard(id="llama", base="llama", context_tokens=8192),),
    started_ms=1,
    seq=1,
    state="serving",
    credit=Credit(),
    adapters=(AdapterState(model="support@2", state="failed", reason="bad\x1b[2J"),),
)
ENTRIES = (
    ModelEntry(name="support", kind="adapter", base="llama", versions=(version(1), version(2)), current=2),
    ModelEntry(
        name="help", kind="alias", targets=(Target(model="support@1", weight=90), Target(model="support@2"))
    ),
    ModelEntry(name="pick", kind="router", targets=(Target(model="llama"), Target(model="help"))),
    ModelEntry(name="spare", kind="base", fallbacks=("llama",), price=Price(input=1, output=2.5)),
)
KNOWN = Catalogue({entry.name: entry for entry in ENTRIES}, {}, (BEAT,))


# Flags


def test_flags_set_what_they_name_and_nothing_else() -> None:
    assert models.changes_of(flags()) == {}
    args = flags(
        *("--context", "4096", "--capabilities", "chat,tools", "--languages", "en-US,de,EN"),
        *("--latency-class", "batch", "--tenants", "a,b", "--fallbacks", "x", "--min-replicas", "2"),
        *("--wakes", "--price-input", "0.5"),
    )
    assert models.changes_of(args) == {
        "context_tokens": 4096,
        "capabilities": ("chat", "tools"),
        "languages": ("en", "de"),
        "latency_class": ServiceClass.BATCH,
        "tenants": ("a", "b"),
        "fallbacks": ("x",),
        "min_replicas": 2,
        "wakes": True,
    }
    assert models.changes_of(flags("--no-wakes")) == {"wakes": False}
    assert models.prices_of(args) == {"input": 0.5}


def test_a_dash_takes_it_back() -> None:
    args = flags(
        *("--capabilities", "-", "--languages", "-", "--latency-class", "-"),
        *("--tenants", "-", "--fallbacks", "-", "--no-price"),
    )
    assert models.changes_of(args) == {
        "capabilities": None,
        "languages": (),
        "latency_class": None,
        "tenants": (),
        "fallbacks": (),
        "price": None,
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--capabilities", "chat,flying"], "no capability 'flying'; there are: chat, "),
        (["--languages", "en,klingon"], "'klingon' is no language"),
        (["--languages", "*"], "no language"),
        (["--latency-class", "soon"], "one of interactive, standard, batch, or -"),
    ],
)
def test_what_there_is_not_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        models.changes_of(flags(*arguments))
    assert says in raised.value.message


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "set", "x", "--price-input", "-1"],
        ["models", "set", "x", "--price-input", "nan"],
        ["models", "set", "x", "--context", "-1"],
        ["models", "set", "x", "--tenants", "a,,b"],
        ["models", "alias", "x"],
        ["models", "alias", "x", "y=1000000"],
        ["models", "alias", "x", ""],
        ["models", "set", ""],
        ["adapters", "rollback", "x", "0"],
        ["adapters", "push", "x"],
    ],
)
def test_flags_that_can_not_be_meant_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.parser().parse_args(arguments)
    assert raised.value.code == 2


def test_targets_have_weights() -> None:
    args = cli.parser().parse_args(["models", "alias", "x", "a", "b@4=10", "c=d", "e=0"])
    assert args.targets == [("a", 1), ("b@4", 10), ("c=d", 1), ("e", 0)]
    assert catalogue.targets(args.targets)[1] == Target(model="b@4", weight=10)
    with pytest.raises(errors.InvalidRequest, match="may stand once"):
        catalogue.targets([("a", 1), ("a", 2)])
    with pytest.raises(errors.InvalidRequest, match="no target has a weight"):
        catalogue.targets([("a", 0)])


# What leads where


def test_what_a_name_may_lead_to() -> None:
    KNOWN.check_ways("new", ["llama", "support", "support@1", "help", "pick", "spare"])
    for unknown in ("support@3", "llama@1", "nothing", "help@1"):
        with pytest.raises(errors.NotFound, match=f"no model '{unknown}'"):
            KNOWN.check_ways("new", [unknown])
    with pytest.raises(errors.InvalidRequest, match="'help' would lead to itself: help -> pick -> help"):
        KNOWN.check_ways("help", ["llama", "pick"])
    with pytest.raises(errors.InvalidRequest, match="'pick' would lead to itself: pick -> pick"):
        KNOWN.check_ways("pick", ["pick"])


def test_what_leads_to_a_name() -> None:
    assert KNOWN.leading_to("support") == ["help"]
    assert KNOWN.leading_to("support@1") == ["help"]
    assert KNOWN.leading_to("support@3") == []
    assert KNOWN.leading_to("llama") == ["pick", "spare"]


NAMES = ["a", "b", "c", "d", "e"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))))
def test_no_order_of_changes_makes_a_circle(changes: list[tuple[str, list[str]]]) -> None:
    made = {name: alias(name, "llama") for name in NAMES}
    for name, to in changes:
        known = Catalogue(made, {}, (BEAT,))
        try:
            known.check_ways(name, to)
        except errors.InvalidRequest:
            continue
        made = {**made, name: alias(name, *to)}

    def depth(name: str) -> int:
        return 1 + max((depth(t.model) for t in made[name].targets), default=0) if name in made else 0

    assert all(depth(name) <= len(NAMES) for name in NAMES)  # a circle would have no depth


# Changes


async def test_what_is_declared_of_a_base_adds_up(broker: MemoryBroker) -> None:
    await models.declare(broker, "llama", {"context_tokens": 4096}, {"input": 0.5})
    found = await models.declare(broker, "llama", {"tenants": ("a",)}, {"output": 1.5})
    assert (found.kind, found.context_tokens, found.tenants) == ("base", 4096, ("a",))
    assert found.price == Price(input=0.5, cached=0.5, output=1.5)
    assert (await models.declare(broker, "llama", {"price": None}, {})).price is None
    with pytest.raises(errors.InvalidRequest, match="--min-replicas is an adapter's"):
        await models.declare(broker, "llama", {"min_replicas": 1}, {})
    await models.lead(broker, "way", {"kind": "alias", "targets": (Target(model="llama"),)})
    with pytest.raises(errors.InvalidRequest, match="--wakes is a base's, and 'way' is an alias"):
        await models.declare(broker, "way", {"wakes": True}, {})
    await models.remove(broker, "way")
    await models.remove(broker, "llama")
    assert await entries.read_all(broker) == ({}, [])
    with pytest.raises(errors.NotFound):
        await models.remove(broker, "llama")


async def test_an_alias_is_led_elsewhere_and_stays_what_it_is(broker: MemoryBroker) -> None:
    to = {"kind": "alias", "targets": (Target(model="a"),)}
    await models.lead(broker, "help", to)
    await models.declare(broker, "help", {"tenants": ("acme",)}, {})
    found = await models.lead(broker, "help", {**to, "targets": (Target(model="b"),)})
    assert (found.kind, found.tenants, found.targets) == ("alias", ("acme",), (Target(model="b"),))
    with pytest.raises(errors.InvalidRequest, match="'help' is an alias's name"):
        await models.lead(broker, "help", {**to, "kind": "router"})


async def test_an_adapters_number_outlives_an_alias_of_its_name(broker: MemoryBroker) -> None:
    await entries.change(broker, "support", lambda _: ModelEntry(name="", kind="adapter", last=7))
    with pytest.raises(errors.NotFound):
        await models.remove(broker, "support")
    made = await models.lead(broker, "support", {"kind": "alias", "targets": (Target(model="a"),)})
    assert made.last == 7
    await models.remove(broker, "support")
    left = await entries.read(broker, "support")
    assert left is not None
    assert (left.vacant, left.last) == (True, 7)


async def test_an_adapter_is_not_removed_as_a_model(broker: MemoryBroker) -> None:
    await entries.change(broker, "support", lambda _: ENTRIES[0])
    with pytest.raises(errors.InvalidRequest, match="headrace adapters remove support"):
        await models.remove(broker, "support")


# Words


def test_the_list_has_every_name_once() -> None:
    told = listings.models(KNOWN)
    table, ways = (part.splitlines() for part in told.split("\n\n"))
    assert [line.split()[:2] for line in table[1:]] == [
        ["llama", "base"],
        ["spare", "base"],
        ["support", "adapter"],
        ["help", "alias"],
        ["pick", "router"],
    ]
    assert table[1].endswith("1 worker")
    assert table[3].endswith("1 failed")
    assert ways[1].split(maxsplit=1) == ["help", "support@1=90 support@2=1"]
    assert ways[3].split(maxsplit=1) == ["spare", "else llama"]


def test_one_is_told_with_what_workers_say_and_no_escape(capsys: Any) -> None:
    told = listings.described(KNOWN, "support")
    assert "support@2" in told
    assert "\x1b" not in told
    assert r"bad\x1b[2J" in told
    assert "ADAPTERS AT ONCE" in listings.described(KNOWN, "llama")


def test_json_has_everything() -> None:
    found = json.loads(listings.as_json(KNOWN, "support"))
    assert (found["kind"], found["current"], found["led_to_by"]) == ("adapter", 2, ["help"])
    assert found["workers"] == ["w1"]
    assert found["loaded"]["2"]["w1"]["state"] == "failed"
    assert found["loaded"]["1"] == {}
    base = json.loads(listings.as_json(KNOWN, "llama"))
    assert (base["declared"], base["card"]["context_tokens"]) == (False, 8192)


def test_what_pools_say_of_a_base_is_listed() -> None:
    pools = [
        PoolBeat(
            host="h",
            name=name,
            memory=9,
            used=0,
            instances=(Instance.model_validate({"base": "llama", "state": state, "reason": "idle\x1b[2J"}),),
        )
        for name, state in (("p", "cold"), ("q", "warm"), ("r", "cold"))
    ]
    known = Catalogue({}, {"llama": BEAT.models[0]}, (), (), tuple(pools))
    assert listings.models(known).splitlines()[1].endswith("0 workers, cold in 2 pools, warm in a pool")
    shown = listings.described(known, "llama")
    assert [line.split()[:3] for line in shown.splitlines()[-3:]] == [
        [name, "h", state] for name, state in (("p", "cold"), ("q", "warm"), ("r", "cold"))
    ]
    assert "\x1b" not in shown
    told = json.loads(listings.as_json(known, "llama"))
    assert told["pools"]["q"]["state"] == "warm"


async def test_pools_are_heard_and_what_can_t_be_read_is_passed_over(broker: MemoryBroker) -> None:
    async def tell() -> None:
        instances = (Instance(base="a", state="hot"),)
        beat = PoolBeat(host="h", name="p", memory=9, used=0, instances=instances)
        for data in (b"{", beat.model_dump_json().encode()):
            await broker.publish(subjects.pool("h"), data)

    asking = asyncio.create_task(catalogue.look(broker, 0.1))
    told = asyncio.create_task(_again(tell, asking))
    known = await asking
    await told
    assert [(pool.name, each.state) for pool, each in known.pooled("a")] == [("p", "hot")]


async def _again(tell: Callable[[], Awaitable[None]], asking: asyncio.Task[Catalogue]) -> None:
    """As pools do."""
    while not asking.done():
        await tell()
        await asyncio.wait({asking}, timeout=0.01)
