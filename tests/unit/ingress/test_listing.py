"""What /v1/models says of each kind of model, and to whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from broker.entries import ModelEntry, Price, Target, Version
from broker.messages import Credit, Heartbeat, ModelCard, ServiceClass
from ingress.listing import Listing

CHAT = ("/v1/chat/completions", "/tokenize")


def beat(base: str, *more: ModelCard, **facts: Any) -> Heartbeat:
    return Heartbeat(
        worker=f"w-{base}",
        engine="sim",
        base=base,
        models=(ModelCard(id=base, base=base, context_tokens=8192, paths=CHAT), *more),
        started_ms=1,
        seq=1,
        credit=Credit(),
        **{"state": "serving", "max_rank": 16, **facts},
    )


@dataclass
class Known:
    """A catalogue as it is now."""

    beats_now: list[Heartbeat] = field(default_factory=list)
    declared: dict[str, ModelEntry] = field(default_factory=dict)
    remembered: tuple[ModelCard, ...] = ()
    unreadable: set[str] = field(default_factory=set)

    def beats(self) -> list[Heartbeat]:
        return self.beats_now

    def cards(self) -> dict[str, ModelCard]:
        live = [card for each in self.beats_now for card in each.models]
        return {card.id: card for card in (*self.remembered, *live)}


def known(*beats: Heartbeat, **declared: dict[str, Any]) -> Known:
    return Known(list(beats), {name: ModelEntry(name=name, **facts) for name, facts in declared.items()})


def version(number: int, rank: int = 8) -> Version:
    return Version(
        number=number,
        digest=f"sha256:{number}",
        rank=rank,
        pushed_ms=1_700_000_000_999,
        source=f"run {number}",
    )


def listing(of: Known, tenant: str = "anonymous") -> Listing:
    return Listing.of(of, tenant)


SUPPORT = {"kind": "adapter", "base": "llama", "versions": (version(1), version(2, 32)), "current": 1}


def test_a_base_shows_what_is_declared_and_else_what_its_workers_tell() -> None:
    plain = listing(known(beat("llama"))).one("llama")
    assert plain is not None
    assert (plain["id"], plain["root"], plain["parent"], plain["kind"]) == ("llama", "llama", None, "base")
    assert (plain["max_model_len"], plain["paths"], plain["capabilities"]) == (8192, list(CHAT), ["chat"])
    assert (plain["price"], plain["serving"]) == (None, True)
    facts = {"kind": "base", "context_tokens": 99, "capabilities": ("chat", "tools"), "languages": ("de",)}
    more = {"price": Price(input=1), "latency_class": ServiceClass.BATCH, "updated_ms": 5000}
    shown = listing(known(beat("llama", state="draining"), llama=facts | more)).one("llama")
    assert shown is not None
    assert (shown["max_model_len"], shown["capabilities"], shown["languages"]) == (
        99,
        ["chat", "tools"],
        ["de"],
    )
    assert shown["price"] == {"input": 1.0, "cached": 0.0, "output": 0.0}
    assert (shown["latency_class"], shown["created"], shown["serving"]) == ("batch", 5, False)
    assert orjson.loads(orjson.dumps(shown)) == shown


def test_an_adapter_shows_its_version_and_hands_down_what_its_base_declares() -> None:
    base = {"kind": "base", "languages": ("de",), "price": Price(output=2), "capabilities": ("chat",)}
    now = known(beat("llama"), support={**SUPPORT, "capabilities": ()}, llama=base)
    shown = listing(now).one("support")
    assert shown is not None
    assert (shown["parent"], shown["root"], shown["version"], shown["rank"]) == ("llama", "support@1", 1, 8)
    assert (shown["max_model_len"], shown["languages"], shown["capabilities"]) == (8192, ["de"], [])
    assert shown["price"]["output"] == 2
    assert (shown["created"], shown["digest"], shown["serving"]) == (1_700_000_000, "sha256:1", True)
    assert shown["source"] == "run 1"
    other = listing(now).one("support@2")
    assert other is not None
    assert (other["id"], other["root"], other["version"]) == ("support@2", "support@2", 2)
    assert other["serving"] is False  # no worker takes its rank
    assert listing(now).one("support@3") is None


def test_versions_are_not_listed_and_neither_is_an_adapter_that_means_none() -> None:
    held = ModelCard(id="support@1", base="llama"), ModelCard(id="gone@4", base="llama")
    now = known(beat("llama", *held), support=SUPPORT, idle={**SUPPORT, "current": 0})
    assert listing(now).names() == ["llama", "support"]
    assert listing(now).one("gone@4") is None
    assert listing(now).one("idle") is None
    assert listing(now).one("idle@2") is not None


def test_an_adapter_that_an_engine_has_of_its_own_is_shown() -> None:
    now = known(beat("llama", ModelCard(id="tuned", base="llama", context_tokens=7)))
    shown = listing(now).one("tuned")
    assert shown is not None
    assert (shown["kind"], shown["parent"], shown["max_model_len"], shown["serving"]) == (
        "adapter",
        "llama",
        7,
        True,
    )


def test_an_alias_shows_where_it_leads() -> None:
    to = (Target(model="support@1", weight=90), Target(model="pick", weight=10), Target(model="nothing"))
    now = known(
        beat("llama"),
        support=SUPPORT,
        help={"kind": "alias", "targets": to},
        pick={"kind": "router", "targets": (Target(model="llama"), Target(model="help"))},
    )
    shown = listing(now).one("help")
    assert shown is not None
    assert shown["targets"] == [{"model": "support@1", "weight": 90}, {"model": "pick", "weight": 10}]
    assert (shown["root"], shown["serving"], shown["paths"]) == (None, True, list(CHAT))
    router = listing(now).one("pick")
    assert router is not None
    assert router["targets"] == [{"model": "llama"}, {"model": "help"}]
    assert [each["id"] for each in listing(now).all()] == ["help", "llama", "pick", "support"]


def test_each_tenant_sees_what_it_may_use() -> None:
    now = known(
        beat("llama"),
        beat("secret"),
        secret={"kind": "base", "tenants": ("acme",)},
        support={**SUPPORT, "tenants": ("acme", "umbrella")},
        help={"kind": "alias", "targets": (Target(model="support"), Target(model="llama"))},
    )
    assert listing(now).names() == ["help", "llama"]
    assert listing(now, "umbrella").names() == ["help", "llama", "support"]
    assert listing(now, "acme").names() == ["help", "llama", "secret", "support"]
    for hidden in ("secret", "support", "support@1"):
        assert listing(now).one(hidden) is None
    shown = listing(now).one("help")
    assert shown is not None
    assert [target["model"] for target in shown["targets"]] == ["llama"]


def test_a_mesh_of_aliases_costs_no_more_than_its_names() -> None:
    names = [f"a{n}" for n in range(60)]
    to = {"kind": "alias", "targets": tuple(Target(model=name) for name in [*names, "llama"])}
    # By paths this would never end.
    assert len(listing(known(beat("llama"), **dict.fromkeys(names, to))).all()) == 61


def test_what_stands_in_an_unreadable_entry_is_shown_to_nobody() -> None:
    found = known(beat("hidden", ModelCard(id="hidden@1", base="hidden")), beat("open"))
    found.unreadable.add("hidden")
    shown = listing(found)
    assert shown.names() == ["open"]
    assert shown.one("hidden") is shown.one("hidden@1") is None
