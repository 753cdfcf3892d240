"""Routers learned from the repository's examples: as good as promised, through the wire, within bounds."""

from __future__ import annotations

import array
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import routing
from broker import routes, subjects
from broker.memory import MemoryBroker
from ingress import intent
from ingress.catalogue import Catalogue
from ingress.intent import Router
from ops import routes as commands
from ops import routes_file, routes_learn
from tests.waiting import until

EXAMPLES = Path(__file__).parents[3] / "examples" / "routes.toml"


@pytest.fixture(scope="module")
def file() -> routes_file.RoutesFile:
    return routes_file.read(EXAMPLES)


@pytest.fixture(scope="module", params=[True, False], ids=["embeddings", "words"])
def trained(request: pytest.FixtureRequest, file: routes_file.RoutesFile) -> routes_learn.Trained:
    if request.param and routes_learn.installed() is None:
        pytest.skip("the embeddings have no build for this platform")
    return commands.train(file, "auto", embeddings=request.param)


@pytest.fixture(scope="module")
def router(trained: routes_learn.Trained) -> Router:
    return Router(trained.learned, trained.tables)


def test_it_beats_rules_and_majority_on_texts_it_has_not_seen(router: Router) -> None:
    found = routing.held_out()
    meant = [each.route for each in found]

    def share(guess: Callable[[str], str]) -> float:
        return routes_file.accuracy(meant, [guess(each.text) for each in found])

    assert share(router.route) > share(routing.by_keywords) > share(lambda _: routing.majority(found))


def test_no_held_out_text_is_an_example(file: routes_file.RoutesFile) -> None:
    known = {each.text.casefold() for each in file.examples}
    assert not [each for each in routing.held_out() if each.text.casefold() in known]


def test_the_reason_names_route_score_and_lead(router: Router) -> None:
    model, reason = router.ranked("Write a Python function that merges two sorted lists", "auto")[0]
    assert model == "coder"
    assert reason.startswith("auto: route code, score ")
    assert ", ahead by " in reason


def test_below_the_margin_the_default_serves(trained: routes_learn.Trained) -> None:
    careful = Router(trained.learned.model_copy(update={"margin": 2.0}), trained.tables)
    model, reason = careful.ranked("Write a Python function", "auto")[0]
    assert model == "general"
    assert reason.startswith("auto: default, the best leads by ")


def test_every_model_is_ranked_so_that_another_serves_where_the_first_can_not(
    router: Router, file: routes_file.RoutesFile
) -> None:
    assert {model for model, _ in router.ranked("Solve x + 1 = 3", "auto")} == set(file.models)


@given(st.text(max_size=3000))
def test_any_text_has_finite_scores(text: str) -> None:
    router = _words_only()
    scores = router.scores(text)
    assert len(scores) == 2
    assert all(math.isfinite(score) for score in scores)


def _words_only() -> Router:
    found = [routes.Route(name=name, model=name) for name in ("up", "down")]
    examples = [
        routes_learn.Example(f"{name} {n}", i) for i, name in enumerate(("up", "down")) for n in range(5)
    ]
    trained = routes_learn.train("auto", "up", 0.1, found, examples, None)
    return Router(trained.learned, trained.tables)


def test_tables_of_another_size_are_refused(trained: routes_learn.Trained) -> None:
    with pytest.raises(ValueError, match="size"):
        Router(trained.learned, trained.tables[:-1])


def test_a_word_is_cut_into_the_longest_known_pieces() -> None:
    hashes = sorted(intent.crc(piece) for piece in ("\u2581work", "\u2581wo", "er", "s"))
    table = intent.Table(array.array("I", hashes), array.array("b"), 0, 1.0)
    rows, looked_up = intent.pieces("workXers", table)
    assert looked_up == 5 + 4 + 2 + 1  # from _workXers to _work, from Xers to X in vain, ers and er, s
    assert [hashes[row] for row in rows] == [intent.crc(piece) for piece in ("\u2581work", "er", "s")]


@pytest.mark.parametrize("ends", [(0x61, 0x7B), (0x4E00, 0x9FFF), (0x12000, 0x12400), (0x1F300, 0x1F900)])
def test_what_is_in_no_vocabulary_costs_no_more_lookups_than_a_text_may(
    router: Router, ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    at = intent.Table.at

    def counted(table: intent.Table, wanted: int) -> int:
        nonlocal made
        made += 1
        return at(table, wanted)

    monkeypatch.setattr(intent.Table, "at", counted)
    rng = random.Random(ends[0])
    router.scores("".join(chr(rng.randrange(*ends)) for _ in range(1000)))
    # The last word is looked up whole, and each word or sign of the text once more, as itself.
    assert made <= 1000 + 48 * 16 + 1000


class TestWire:
    async def test_an_ingress_has_a_router_at_once_and_a_new_version_too(
        self, trained: routes_learn.Trained
    ) -> None:
        broker = MemoryBroker()
        first = await routes.put(broker, trained.learned, trained.tables)
        async with Catalogue(broker) as catalogue:
            assert catalogue.learned["auto"].learned == first
            text = "Translate this to German"
            assert catalogue.learned["auto"].scores(text) == Router(first, trained.tables).scores(text)
            second = await routes.put(broker, trained.learned, trained.tables)
            assert (first.version, second.version) == (1, 2)
            await until(lambda: catalogue.learned["auto"].learned == second)
            assert await routes.remove(broker, "auto")
            await until(lambda: not catalogue.learned)
        assert not await routes.remove(broker, "auto")

    async def test_nothing_of_an_older_version_stays(self, trained: routes_learn.Trained) -> None:
        broker = MemoryBroker()
        keys: dict[str, bytes] = {}

        def changed(key: str, value: bytes | None) -> None:
            if value is None:
                keys.pop(key, None)
            else:
                keys[key] = value

        await broker.watch(subjects.KV_ROUTES, changed)
        for _ in range(3):
            stored = await routes.put(broker, trained.learned, trained.tables)
        await until(lambda: len(keys) == 1 + stored.chunks and f"/{stored.store}/0" in keys)
        await routes.remove(broker, "auto")
        await until(lambda: not keys)

    async def test_damage_leaves_the_router_as_it_was(self, trained: routes_learn.Trained) -> None:
        broker = MemoryBroker()
        async with Catalogue(broker) as catalogue:
            stored = await routes.put(broker, trained.learned, trained.tables)
            await until(lambda: "auto" in catalogue.learned)
            broken = stored.model_copy(update={"store": "other", "version": 2, "chunks": 1})
            await broker.put(subjects.KV_ROUTES, "/other/0", random.Random(0).randbytes(99))
            await broker.put(subjects.KV_ROUTES, "auto", broken.model_dump_json().encode())
            await broker.put(subjects.KV_ROUTES, "junk", b"{}")
            await routes.put(broker, trained.learned.model_copy(update={"name": "last"}), trained.tables)
            await until(lambda: "last" in catalogue.learned)
            assert catalogue.learned["auto"].learned == stored
