"""Whatever happens: nobody is lost or sent twice, no credit is exceeded, nobody idles, all runs are alike."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig, Pool
from scheduler.dispatch.types import Item
from tests.unit.scheduler.dispatch.world import BASE, STEP, World, item

GROUPS = [(), tuple(range(4)), tuple(range(10, 18))]


KV = 4096
CONFIG = DispatchConfig(
    pools={
        ServiceClass.INTERACTIVE: Pool(most_step_tokens=STEP),
        ServiceClass.BATCH: Pool(least_step_tokens=2 * STEP),
    }
)


class Life(RuleBasedStateMachine):
    """`World` checks each decision; two worlds are told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.worlds = World(CONFIG, kv=KV), World(CONFIG, kv=KV)
        for world in self.worlds:
            world.adapter_slots = 1
        self.keys = 0
        self.names = 0

    @property
    def world(self) -> World:
        return self.worlds[0]

    @rule(steps=st.sampled_from([1, 4]))
    def join(self, steps: int) -> None:
        self.names += 1
        for world in self.worlds:
            world.join(f"w{self.names}", steps * STEP)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), serving=st.booleans())
    def drain(self, data: st.DataObject, serving: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.running)))
        for world in self.worlds:
            world.serving[name] = serving
            world.tell(name)

    @rule(
        tenant=st.sampled_from("abc"),
        service_class=st.sampled_from(ServiceClass),
        prompt=st.one_of(st.integers(1, 3000), st.just(1100)),
        group=st.sampled_from(GROUPS),
        patience=st.sampled_from([0.05, 1e9, 1e9]),
        weight=st.sampled_from([1.0, 3.0]),
        model=st.sampled_from([BASE, BASE, "a", "b"]),
    )
    def arrive(
        self,
        tenant: str,
        service_class: ServiceClass,
        prompt: int,
        group: tuple[int, ...],
        patience: float,
        weight: float,
        model: str,
    ) -> None:
        self.keys += 1
        for world in self.worlds:
            new = item(
                self.keys,
                tenant,
                service_class,
                arrived=world.now,
                deadline=world.now + patience,
                prompt=prompt,
                hashes=group[: prompt // 128],
                weight=weight,
                model=model,
            )
            world.arrive(new)

    @rule(
        data=st.data(),
        classes=st.lists(st.sampled_from(ServiceClass), min_size=1, max_size=3),
        meanwhile=st.sampled_from(["nothing", "cancel", "lose"]),
    )
    def come_together(self, data: st.DataObject, classes: list[ServiceClass], meanwhile: str) -> None:
        """Several, before anything is decided; one goes again, or a worker, meanwhile."""
        keys = [self.keys + number for number in range(1, len(classes) + 1)]
        self.keys = keys[-1]
        gone = data.draw(st.sampled_from(keys))
        lost = data.draw(st.sampled_from(sorted(self.world.running))) if self.world.running else ""
        for world in self.worlds:
            world.come(*(item(*each, arrived=world.now) for each in zip(keys, "abc", classes, strict=False)))
            if meanwhile == "cancel":
                assert world.cancel(gone)
            back = world.lose(lost) if meanwhile == "lose" and lost else []
            world.decide()
            world.arrive(*back)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.running)))
        for world in self.worlds:
            world.compute(name)

    @precondition(lambda self: any(self.world.running.values()))
    @rule(data=st.data(), output=st.integers(0, 400))
    def finish(self, data: st.DataObject, output: int) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, held in self.world.running.items() if held)))
        key = data.draw(st.sampled_from(sorted(self.world.running[name])))
        for world in self.worlds:
            world.finish(name, key, output)

    @precondition(lambda self: any(self.world.running.values()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, held in self.world.running.items() if held)))
        key = data.draw(st.sampled_from(sorted(self.world.running[name])))
        for world in self.worlds:
            world.arrive(world.give_back(name, key))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.running)))
        for world in self.worlds:
            back: list[Item] = world.lose(name)
            world.decide()
            world.arrive(*back)

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.waiting)))
        for world in self.worlds:
            assert world.cancel(key)
            assert not world.cancel(key)
            world.decide()

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.3]))
    def wait(self, seconds: float) -> None:
        for world in self.worlds:
            world.wait(seconds)

    @invariant()
    def all_is_alike(self) -> None:
        first, second = self.worlds
        assert first.log == second.log

    @invariant()
    def nobody_idles(self) -> None:
        """One that has nothing and told so could do nothing that waits; else it would have come too late."""
        world = self.world
        world.wait(0.0)
        for name, held in world.running.items():
            if not held and world.now - world.told[name] <= world.config.stale_after:
                world.tell(name)
                self.worlds[1].wait(0.0)
                self.worlds[1].tell(name)
                could = [each for each in world.waiting.values() if world.could_run(name, each)]
                assert world.running[name] or not could


TestLife = Life.TestCase
