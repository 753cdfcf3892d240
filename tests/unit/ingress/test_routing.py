"""Which model a name leads to: shares, capabilities, allow-lists, circles, fallbacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.entries import ModelEntry, Target, Version
from broker.messages import ModelCard, ServiceClass
from ingress import capability, routing, sticky
from ingress.intent import Router
from ingress.needs import Needs

CHAT = "/v1/chat/completions"


@dataclass
class World:
    """A catalogue by hand. `bases` are those that were served once; up unless they are `down`; a pool
    starts those that are `cold`."""

    bases: list[str]
    declared: dict[str, ModelEntry] = field(default_factory=dict)
    learned: dict[str, Router] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    cold: set[str] = field(default_factory=set)
    crowded: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    context: int = 0

    def add(self, name: str, kind: Any = "base", **more: Any) -> None:
        self.declared[name] = ModelEntry(name=name, kind=kind, **more)

    def alias(self, name: str, *targets: tuple[str, int], **more: Any) -> None:
        self.add(name, "alias", targets=tuple(Target(model=m, weight=w) for m, w in targets), **more)

    def adapter(self, name: str, base: str, versions: int, current: int, **more: Any) -> None:
        made = tuple(Version(number=n, digest="d", rank=8) for n in range(1, versions + 1))
        self.add(name, "adapter", base=base, versions=made, current=current, **more)

    def card(self, model: str) -> ModelCard | None:
        return self.cards().get(model)

    def cards(self) -> dict[str, ModelCard]:
        paths = (CHAT, "/v1/completions")
        return {
            name: ModelCard(id=name, base=name, context_tokens=self.context, paths=paths)
            for name in self.bases
        }

    def served(self, model: str) -> bool:
        return model in self.bases and model not in self.down | self.cold

    def up(self, base: str) -> bool:
        return self.served(base) or base in self.cold

    def full(self, base: str) -> bool:
        return base in self.crowded


def needs(text: str = "hello", path: str = CHAT, **more: Any) -> Needs:
    body = {"messages": [{"role": "user", "content": text}]} | more
    return Needs(path, body, size=10**6)


def ask(
    world: World,
    name: str,
    wants: Needs | None = None,
    tenant: str = "t",
    conversation: str = "c",
    fallback: bool = True,
) -> routing.Choice:
    caller = routing.Caller(tenant, lambda: conversation, fallback)
    return routing.resolve(name, wants or needs(), caller, world)


class TestNames:
    def test_a_base_is_served_as_it_is_named(self) -> None:
        assert ask(World(["a.b"]), "a.b") == routing.Choice("a.b", "a.b")

    def test_an_adapter_is_queued_under_its_version(self) -> None:
        world = World(["base"])
        world.adapter("support", "base", versions=4, current=3)
        assert ask(world, "support").model == "support@3"
        assert ask(world, "support").base == "base"
        assert ask(world, "support@4").model == "support@4"
        assert ask(world, "support@3").why == ()

    def test_a_version_that_is_not_there_is_told_with_those_that_are(self) -> None:
        world = World(["base"])
        world.adapter("support", "base", versions=2, current=0)
        with pytest.raises(errors.UnknownModel, match="has no version 7; there are: 1, 2"):
            ask(world, "support@7")
        with pytest.raises(errors.UnknownModel, match="no current version"):
            ask(world, "support")

    def test_an_adapter_whose_base_was_never_served_is_told_so(self) -> None:
        world = World([])
        world.adapter("support", "base", versions=1, current=1)
        with pytest.raises(errors.UnknownModel, match="'base', which no worker has ever served"):
            ask(world, "support")

    def test_an_unknown_name_lists_what_its_caller_may_use(self) -> None:
        world = World(["open", "closed", "mine"])
        world.add("closed", tenants=("other",))
        world.add("mine", tenants=("t",))
        with pytest.raises(errors.UnknownModel, match=r"known models: mine, open$"):
            ask(world, "gone")

    @pytest.mark.parametrize("name", ["secret", "secret@1", "way", "router"])
    def test_what_a_tenant_may_not_use_is_unknown_to_it(self, name: str) -> None:
        world = World(["base"])
        world.adapter("secret", "base", versions=1, current=1, tenants=("other",))
        world.alias("way", ("base", 1), tenants=("other",))
        world.add("router", "router", targets=(Target(model="base"),), tenants=("other",))
        assert ask(world, name, tenant="other").base == "base"
        with pytest.raises(errors.UnknownModel) as caught:
            ask(world, name)
        assert str(caught.value) == f"model {name!r} is not served; known models: base"

    def test_an_alias_of_what_a_tenant_may_not_use_leads_nowhere_for_it(self) -> None:
        world = World(["base"])
        world.add("base", tenants=("other",))
        world.alias("way", ("base", 1))
        with pytest.raises(errors.UnknownModel):
            ask(world, "way")

    def test_the_class_is_the_models_where_it_has_one(self) -> None:
        world = World(["base"])
        world.add("base", latency_class=ServiceClass.BATCH)
        world.alias("quick", ("base", 1), latency_class=ServiceClass.INTERACTIVE)
        world.alias("plain", ("base", 1))
        assert ask(world, "base").latency_class is ServiceClass.BATCH
        assert ask(world, "quick").latency_class is ServiceClass.INTERACTIVE
        assert ask(world, "plain").latency_class is ServiceClass.BATCH

    @pytest.mark.parametrize("name", ["hidden", "hidden@1", "auto"])
    def test_what_stands_in_an_unreadable_entry_is_unknown_to_all(self, name: str) -> None:
        world = World(["hidden", "hidden@1", "open"], unreadable={"hidden", "auto"})
        world.alias("way", ("hidden", 1))
        for asked in (name, "way"):
            with pytest.raises(errors.UnknownModel) as caught:
                ask(world, asked)
            assert str(caught.value).endswith("known models: open, way" if asked == name else "models: open")

    def test_a_base_that_is_hidden_is_not_named(self) -> None:
        world = World([])
        world.add("secret", tenants=("other",))
        world.adapter("ad", "secret", versions=1, current=1)
        with pytest.raises(errors.UnknownModel, match="needs a base, which no worker has ever served"):
            ask(world, "ad")
        with pytest.raises(errors.UnknownModel, match="needs base 'secret', which"):
            ask(world, "ad", tenant="other")

    def test_a_body_that_surely_fits_is_read_no_further(self) -> None:
        body = {"messages": [{"role": "user", "content": "word " * 20}]}
        wants = Needs(CHAT, body, size=150)
        assert ask(World(["m"], context=100), "m", wants).model == "m"
        assert "_read" not in vars(wants)


class TestAliases:
    @given(st.lists(st.integers(0, 100), min_size=2, max_size=5).filter(any), st.integers(0, 10**6))
    def test_each_target_gets_its_share_of_the_conversations(self, weights: list[int], salt: int) -> None:
        names = [f"m{i}" for i in range(len(weights))]
        world = World(names)
        world.alias("way", *zip(names, weights, strict=True))
        n = 400
        got = Counter(ask(world, "way", conversation=sticky.key("t", f"{salt}/{i}")).model for i in range(n))
        for name, weight in zip(names, weights, strict=True):
            share = weight / sum(weights)
            # Six standard deviations of a binomial share: one in a thousand million by chance.
            assert abs(got[name] / n - share) <= 6 * (share * (1 - share) / n) ** 0.5
            if not weight:
                assert not got[name]

    @given(st.text(), st.integers(1, 99))
    def test_a_conversation_stays_where_it_is(self, opening: str, weight: int) -> None:
        world = World(["old", "new"])
        world.alias("way", ("old", 100 - weight), ("new", weight))
        key = sticky.key("t", opening)
        assert ask(world, "way", conversation=key) == ask(world, "way", conversation=key)

    @given(st.text(), st.integers(0, 99))
    def test_a_growing_canary_takes_no_conversation_back(self, opening: str, weight: int) -> None:
        smaller, larger = World(["old", "new"]), World(["old", "new"])
        smaller.alias("way", ("old", 100 - weight), ("new", weight))
        larger.alias("way", ("old", 99 - weight), ("new", weight + 1))
        key = sticky.key("t", opening)
        if ask(smaller, "way", conversation=key).model == "new":
            assert ask(larger, "way", conversation=key).model == "new"

    def test_two_versions_share_and_the_reason_says_so(self) -> None:
        world = World(["base"])
        world.adapter("support", "base", versions=4, current=3)
        world.alias("help", ("support@3", 90), ("support@4", 10))
        found = {}
        for i in range(200):
            choice = ask(world, "help", conversation=str(i))
            found[choice.model] = choice.why
        assert found == {
            "support@3": ("alias help: support@3, 90 of 100",),
            "support@4": ("alias help: support@4, 10 of 100",),
        }

    def test_one_that_leaves_moves_none_but_its_own_conversations(self) -> None:
        whole, world = World(["a", "b", "c"]), World(["a", "b", "c"])
        for each in (whole, world):
            each.alias("way", ("a", 50), ("b", 40), ("c", 10))
        world.add("a", capabilities=("chat",))
        image = needs(messages=[{"role": "user", "content": [{"type": "image_url"}]}])
        moved: Counter[str] = Counter()
        for key in map(str, range(500)):
            before, after = (
                ask(whole, "way", conversation=key).model,
                ask(world, "way", image, conversation=key),
            )
            if before == "a":
                moved[after.model] += 1
            else:
                assert after.model == before
        assert moved["b"] > 2 * moved["c"] > 0  # by their weights

    def test_the_others_serve_in_the_order_of_the_conversation(self) -> None:
        world = World(["a", "b", "c"])
        world.alias("way", ("a", 1), ("b", 1), ("c", 1))
        before = [ask(world, "way", conversation=str(i)).model for i in range(300)]
        world.down.add("a")
        after = [ask(world, "way", conversation=str(i)).model for i in range(300)]
        assert all(b == a or b == "a" for b, a in zip(before, after, strict=True))
        assert {a for b, a in zip(before, after, strict=True) if b == "a"} == {"b", "c"}

    def test_a_weight_beyond_all_measure_is_refused(self) -> None:
        with pytest.raises(ValueError, match="less than or equal"):
            Target(model="m", weight=10**400)

    def test_circles_lead_nowhere_and_harm_nothing(self) -> None:
        world = World(["base"])
        world.alias("a", ("b", 1), ("a", 1))
        world.alias("b", ("a", 1), ("base", 1))
        assert ask(world, "a").model == "base"
        world.alias("x", ("y", 1))
        world.alias("y", ("x", 1))
        with pytest.raises(errors.UnknownModel):
            ask(world, "x")

    def test_a_mesh_costs_no_more_than_its_names(self) -> None:
        world = World([f"m{i}" for i in range(50)])
        for depth in range(7):
            below = (
                [(f"a{depth + 1}.{i}", 1) for i in range(20)]
                if depth < 6
                else [(f"m{i}", 1) for i in range(50)]
            )
            for i in range(20):
                world.alias(f"a{depth}.{i}", *below)  # 20^6 paths
        assert ask(world, "a0.0").model in world.bases

    def test_one_that_leads_to_nothing_that_is_served_says_so(self) -> None:
        world = World(["base"])
        world.alias("help", ("gone", 1))
        with pytest.raises(errors.UnknownModel) as caught:
            ask(world, "help")
        assert str(caught.value) == "model 'help' leads to none that is served; known models: base"


class TestCapabilities:
    TOOLS: dict[str, Any] = {"tools": [{"type": "function"}]}
    SCHEMA: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": {}}}
    IMAGE: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}

    def test_the_lacking_is_refused_with_those_that_have_it(self) -> None:
        world = World(["plain", "able", "other"])
        world.add("plain", capabilities=("chat",))
        world.add("able", capabilities=("chat", "tools"))
        world.add("other", capabilities=("chat",))
        with pytest.raises(errors.Incapable, match=r"'plain' lacks tools; these have it: able$"):
            ask(world, "plain", needs(**self.TOOLS))
        with pytest.raises(errors.Incapable, match="lacks JSON schemas and vision; no model here has it"):
            ask(world, "plain", needs(**self.IMAGE, **self.SCHEMA))

    def test_one_that_has_it_is_found_among_however_many(self) -> None:
        world = World([f"m{i:02}" for i in range(40)])
        for i in range(40):
            world.add(f"m{i:02}", capabilities=("chat", "tools") if i > 35 else ("chat",))
        with pytest.raises(errors.Incapable, match=r"these have it: m36, m37, m38, m39$"):
            ask(world, "m00", needs(**self.TOOLS))
        with pytest.raises(errors.UnknownModel) as caught:
            ask(world, "gone")
        assert str(caught.value).endswith(", m31")

    def test_a_refusal_names_nothing_that_is_hidden(self) -> None:
        world = World(["plain", "able"])
        world.add("plain", capabilities=("chat",))
        world.add("able", capabilities=("chat", "tools"), tenants=("other",))
        with pytest.raises(errors.Incapable, match="no model here has it"):
            ask(world, "plain", needs(**self.TOOLS))

    def test_what_is_not_declared_is_left_to_the_engine(self) -> None:
        assert ask(World(["plain"]), "plain", needs(**self.TOOLS)).model == "plain"

    def test_an_adapter_has_its_bases_capabilities_unless_it_says_otherwise(self) -> None:
        world = World(["base"])
        world.add("base", capabilities=("chat",))
        world.adapter("like", "base", versions=1, current=1)
        world.adapter("more", "base", versions=1, current=1, capabilities=("chat", "tools"))
        with pytest.raises(errors.Incapable, match="these have it: more"):
            ask(world, "like", needs(**self.TOOLS))
        assert ask(world, "more", needs(**self.TOOLS)).model == "more@1"

    def test_too_long_a_prompt_is_refused_by_the_words_it_has(self) -> None:
        world = World(["short"], context=100)
        world.bases.append("long")
        world.add("long", context_tokens=10_000)
        with pytest.raises(errors.Incapable, match="a context of more than 100 tokens; these have it: long"):
            ask(world, "short", needs("word " * 150))
        assert ask(world, "short", needs("word " * 90)).model == "short"

    def test_a_language_that_a_model_lacks_is_refused(self) -> None:
        world = World(["english", "any"])
        world.add("english", languages=("en",))
        german = "Wie ist das Wetter und was soll ich mit dem Rad machen?"
        assert ask(world, "english", needs(german)).model == "english"  # by its words alone
        for wants in (needs("Какая сегодня погода?"), Needs(CHAT, {"prompt": german}, declared="de")):
            with pytest.raises(errors.Incapable, match=r"lacks language .*de|ru.*; these have it: any"):
                ask(world, "english", wants)
        world.alias("way", ("english", 99), ("any", 1))
        assert {ask(world, "way", needs(german), conversation=str(i)).model for i in range(20)} == {"any"}
        assert ask(world, "english", needs("How is the weather and what should I do?")).model == "english"
        assert ask(world, "english", needs("Hmm")).model == "english"

    def test_an_alias_chooses_among_those_that_can(self) -> None:
        world = World(["plain", "able"])
        world.add("plain", capabilities=("chat",))
        world.add("able", capabilities=("chat", "tools"))
        world.alias("way", ("plain", 99), ("able", 1))
        assert {ask(world, "way", needs(**self.TOOLS), conversation=str(i)).model for i in range(20)} == {
            "able"
        }
        with pytest.raises(errors.Incapable, match=r"no model behind 'way'.*plain lacks vision"):
            ask(world, "way", needs(**self.IMAGE))

    def test_auto_without_routes_takes_the_one_that_surely_can(self) -> None:
        world = World(["a", "b", "c"])
        world.add("b", capabilities=("chat", "tools"))
        world.add("c", capabilities=("chat",))
        assert ask(world, "auto", needs(**self.TOOLS)).model == "b"
        world.down.add("b")
        assert ask(world, "auto", needs(**self.TOOLS)).model == "a"
        assert ask(world, "auto", needs(**self.TOOLS), fallback=False).model == "b"

    @given(st.data())
    def test_no_way_leads_to_what_lacks_or_is_forbidden(self, data: st.DataObject) -> None:
        capabilities = ["chat", "tools", "json_schema", "vision"]
        names = [f"m{i}" for i in range(5)]
        world = World(names)
        for name in names:
            declared = data.draw(st.none() | st.sets(st.sampled_from(capabilities)))
            world.add(
                name,
                capabilities=None if declared is None else tuple(sorted(declared)),
                tenants=data.draw(st.sampled_from([(), ("t",), ("other",)])),
                fallbacks=tuple(data.draw(st.lists(st.sampled_from(names), max_size=3))),
            )
        targets = st.lists(st.tuples(st.sampled_from([*names, "x", "y"]), st.integers(0, 9)), max_size=5)
        world.alias("x", *data.draw(targets))
        world.alias("y", *data.draw(targets), fallbacks=tuple(data.draw(st.lists(st.sampled_from(names)))))
        world.down = data.draw(st.sets(st.sampled_from(names)))
        world.crowded = data.draw(st.sets(st.sampled_from(names)))
        wants = needs(**(self.TOOLS if data.draw(st.booleans()) else self.SCHEMA))
        asked = data.draw(st.sampled_from([*names, "x", "y", "auto"]))
        caller = routing.Caller("t", lambda: "c", data.draw(st.booleans()))
        try:
            found = routing.options(asked, wants, caller, world)
        except (errors.UnknownModel, errors.Incapable):
            return
        for choice in [*found, routing.chosen(found, caller, world)]:
            entry = world.declared[choice.model]
            assert not entry.tenants or "t" in entry.tenants
            known = capability.profile(entry, entry, world.cards()[choice.model])
            assert not capability.lacks(known, wants)


class TestFallbacks:
    def world(self) -> World:
        world = World(["first", "second", "third"])
        world.add("first", fallbacks=("second", "third"))
        return world

    def test_the_next_one_serves_for_one_that_is_down(self) -> None:
        world = self.world()
        assert ask(world, "first").model == "first"
        world.down.add("first")
        choice = ask(world, "first")
        assert choice.model == "second"
        assert choice.why == ("first is served by no worker now", "fallback to second")

    def test_one_that_was_never_served_is_told_with_who_serves_instead(self) -> None:
        world = self.world()
        world.add("new", fallbacks=("first",))
        assert ask(world, "new").why == ("new was never served; fallback to first",)
        world.alias("way", ("gone", 1), fallbacks=("first",))
        assert ask(world, "way").why == ("way was never served; fallback to first",)

    def test_the_class_stays_that_of_the_first(self) -> None:
        world = self.world()
        world.add("first", fallbacks=("second",), latency_class=ServiceClass.INTERACTIVE)
        world.add("second", latency_class=ServiceClass.BATCH)
        world.down.add("first")
        choice = ask(world, "first")
        assert (choice.model, choice.latency_class) == ("second", ServiceClass.INTERACTIVE)

    def test_one_that_a_pool_starts_for_its_requests_is_not_down(self) -> None:
        world = self.world()
        world.cold.add("first")
        assert ask(world, "first").model == "first"

    def test_the_next_one_serves_for_one_that_is_full(self) -> None:
        world = self.world()
        world.crowded |= {"first", "second"}
        choice = ask(world, "first")
        assert choice.model == "third"
        assert choice.why == ("first has no room", "fallback to third")

    def test_where_all_are_full_the_first_that_is_up_queues_it(self) -> None:
        world = self.world()
        world.crowded |= {"first", "second", "third"}
        assert ask(world, "first").model == "first"
        world.down.add("first")
        assert ask(world, "first").model == "second"
        world.down |= {"second", "third"}
        assert ask(world, "first").model == "first"

    def test_nobody_else_serves_who_does_not_want_it(self) -> None:
        world = self.world()
        world.down.add("first")
        assert ask(world, "first", fallback=False).model == "first"

    def test_what_can_not_serve_is_no_fallback(self) -> None:
        world = self.world()
        world.down.add("first")
        world.add("second", capabilities=("chat",))
        assert ask(world, "first", needs(**TestCapabilities.TOOLS)).model == "third"

    def test_an_alias_turns_to_its_other_targets(self) -> None:
        world = World(["old", "new", "spare"])
        world.alias("way", ("old", 1), ("new", 0), fallbacks=("spare",))
        world.down.add("old")
        assert ask(world, "way").model == "spare"
        world.alias("way", ("old", 1), ("new", 1), fallbacks=("spare",))
        assert {ask(world, "way", conversation=str(i)).model for i in range(20)} == {"new"}
