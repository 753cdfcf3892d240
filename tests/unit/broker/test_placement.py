"""A base's plan: who shall hold what."""

from __future__ import annotations

from broker.placement import Assignment, Placement


def test_it_knows_the_workers_of_each_adapter() -> None:
    ada, bob = Assignment(model="ada@1", workers=("w1", "w2")), Assignment(model="bob@1")
    plan = Placement(base="sim", assignments=(ada, bob))
    assert (plan.workers("ada@1"), plan.workers("bob@1"), plan.workers("eve@1")) == (("w1", "w2"), (), None)
    assert plan == Placement(base="sim", assignments=(ada, bob))
    assert Placement.model_validate_json(plan.model_dump_json()) == plan
    moved = plan.model_copy(update={"assignments": (ada.model_copy(update={"workers": ("w3",)}),)})
    assert (moved.workers("ada@1"), moved.workers("bob@1")) == (("w3",), None)
    assert plan.workers("ada@1") == ("w1", "w2")


def test_many_adapters_are_looked_up_without_a_scan() -> None:
    class Models(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Models.compared += 1
            return super().__eq__(other)

        __hash__ = str.__hash__

    models = tuple(Assignment.model_construct(model=Models(f"a{n}@1"), workers=("w1",)) for n in range(1000))
    plan = Placement.model_construct(base="sim", assignments=models)
    assert all(plan.workers(f"a{n}@1") == ("w1",) for n in range(1000))
    assert Models.compared < 10_000
