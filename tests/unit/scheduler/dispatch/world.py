"""A fleet for the dispatcher's tests: it knows what each worker holds, and finds fault with each decision."""

from __future__ import annotations

import math

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.dispatcher import Dispatcher
from scheduler.dispatch.types import Decision, Item, Preempt, Send, Shed, WorkerState

BASE = "base"
STEP, SLOTS = 512, 4


def item(
    key: int,
    tenant: str = "t",
    service_class: ServiceClass = ServiceClass.INTERACTIVE,
    *,
    arrived: float = 0.0,
    deadline: float = math.inf,
    prompt: int = 100,
    hashes: tuple[int, ...] = (),
    model: str = BASE,
    weight: float = 1.0,
    max_tokens: int = 16,
    done: int = 0,
) -> Item:
    return Item(
        key, tenant, model, service_class, arrived, deadline, prompt, max_tokens, hashes, weight, done
    )


class World:
    """Workers tell how they are when `tell` is called, and compute what they hold when `compute` is."""

    def __init__(
        self, config: DispatchConfig | None = None, workers: int = 0, slots: int = SLOTS, kv: int = 0
    ) -> None:
        self.config = config or DispatchConfig()
        self.dispatcher = Dispatcher(BASE, self.config)
        self.now = 0.0
        self.slots = slots
        self.kv = kv
        self.waiting: dict[int, Item] = {}
        self.running: dict[str, dict[int, Item]] = {}
        self.uncomputed: dict[str, dict[int, int]] = {}
        self.sends: dict[str, int] = {}
        self.told: dict[str, float] = {}
        self.log: list[Decision] = []
        for number in range(workers):
            self.join(f"w{number}")

    def join(self, name: str, **state: object) -> None:
        self.running[name], self.uncomputed[name], self.sends[name] = {}, {}, 0
        self.tell(name, **state)

    def tell(self, name: str, **state: object) -> list[Decision]:
        figures = {
            "step_tokens": STEP,
            "slots_total": self.slots,
            "running": len(self.running[name]),
            "prefill_held": sum(self.uncomputed[name].values()),
            "kv_total": self.kv,
            "kv_free": self.kv - sum(each.context for each in self.running[name].values()),
            "sends": self.sends[name],
        } | state
        self.told[name] = self.now
        self.dispatcher.state(WorkerState(name, self.now, **figures), self.now)  # type: ignore[arg-type]
        return self.decide()

    def tell_all(self) -> list[Decision]:
        return [each for name in self.running for each in self.tell(name)]

    def arrive(self, *items: Item) -> list[Decision]:
        for each in items:
            assert each.key not in self.waiting
            self.waiting[each.key] = each
            self.dispatcher.arrive(each, self.now)
        return self.decide()

    def compute(self, name: str) -> list[Decision]:
        """All its prompts are computed, and their first tokens come."""
        self.uncomputed[name].clear()
        for key in self.running[name]:
            self.dispatcher.first(key, self.now, None)
        return self.tell(name)

    def finish(self, name: str, key: int, output: int = 16) -> list[Decision]:
        done = self.running[name].pop(key)
        self.uncomputed[name].pop(key, None)
        self.dispatcher.finish(key, self.now, done.prompt_tokens, None, output)
        return self.tell(name)

    def give_back(self, name: str, key: int) -> Item:
        self.uncomputed[name].pop(key, None)
        self.dispatcher.returned(key, self.now)
        return self.running[name].pop(key)

    def lose(self, name: str) -> list[Item]:
        """What it had; it doesn't come back by itself."""
        had = list(self.running.pop(name).values())
        del self.uncomputed[name], self.sends[name], self.told[name]
        self.dispatcher.lose(name)
        return had

    def cancel(self, key: int) -> bool:
        self.waiting.pop(key, None)
        return self.dispatcher.cancel(key)

    def wait(self, seconds: float) -> list[Decision]:
        """Time passes, and the dispatcher is asked whenever it wants to be."""
        until, out = self.now + seconds, []
        for _ in range(10_000):
            self.now = min(until, self.dispatcher.next_due(self.now))
            out += self.decide()
            if self.now >= until:
                return out
        raise AssertionError("it wants to be asked for ever")

    def decide(self) -> list[Decision]:
        decisions = self.dispatcher.decide(self.now)
        for each in decisions:
            self._carry_out(each)
        self.log += decisions
        assert self.dispatcher.queued() == len(self.waiting)
        assert self.dispatcher.next_due(self.now) >= self.now
        return decisions

    def _carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Send):
            sent, name = self.waiting.pop(decision.key), decision.worker
            assert self.now - self.told[name] <= self.config.stale_after
            assert len(self.running[name]) < self.slots
            # A class alone may fill workers as the most urgent one does.
            most = max(self.config.theta[each] for each in (sent.service_class, ServiceClass.INTERACTIVE))
            assert sum(self.uncomputed[name].values()) < most * STEP
            self.running[name][sent.key] = sent
            self.uncomputed[name][sent.key] = sent.context - decision.hit_tokens
            self.sends[name] += 1
        elif isinstance(decision, Shed):
            del self.waiting[decision.key]
            assert decision.retry_after_s >= 0
        else:
            assert isinstance(decision, Preempt)
            assert self.running[decision.worker][decision.key].service_class is ServiceClass.BATCH


def sent(decisions: list[Decision]) -> list[int]:
    return [each.key for each in decisions if isinstance(each, Send)]


def where(decisions: list[Decision]) -> dict[int, str]:
    return {each.key: each.worker for each in decisions if isinstance(each, Send)}
