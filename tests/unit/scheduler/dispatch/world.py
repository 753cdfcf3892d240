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
        """`kv`: room of each worker's cache; 0 = it tells none."""
        self.config = config or DispatchConfig()
        self.dispatcher = Dispatcher(BASE, self.config)
        self.now = 0.0
        self.slots = slots
        self.kv = kv
        self.adapter_slots = 0
        self.waiting: dict[int, Item] = {}
        self.running: dict[str, dict[int, Item]] = {}
        self.uncomputed: dict[str, dict[int, int]] = {}
        self.sends: dict[str, int] = {}
        self.told: dict[str, float] = {}
        self.said: dict[str, WorkerState] = {}
        self.needed: dict[str, frozenset[str]] = {}  # adapters, when it said so
        self.steps: dict[str, int] = {}
        self.serving: dict[str, bool] = {}
        self.adapters: dict[str, frozenset[str]] = {}  # those loaded
        self.log: list[Decision] = []
        for number in range(workers):
            self.join(f"w{number}")

    def join(self, name: str, step_tokens: int = STEP, **state: object) -> None:
        self.start(name, step_tokens)
        self.tell(name, **state)

    def start(self, name: str, step_tokens: int = STEP) -> None:
        """It is there, and has told nothing yet."""
        self.running[name], self.uncomputed[name], self.sends[name] = {}, {}, 0
        self.steps[name], self.serving[name], self.adapters[name] = step_tokens, True, frozenset()

    def tell(self, name: str, **state: object) -> list[Decision]:
        self.say(name, **state)
        return self.decide()

    def say(self, name: str, **state: object) -> None:
        """It tells how it is, and nothing is decided yet."""
        figures = {
            "step_tokens": self.steps[name],
            "slots_total": self.slots,
            "running": len(self.running[name]),
            "prefill_held": sum(self.uncomputed[name].values()),
            "kv_total": self.kv,
            "kv_free": self.kv - sum(each.context for each in self.running[name].values()),
            "sends": self.sends[name],
            "serving": self.serving[name],
            "adapters": self.adapters[name],
            "adapter_room": self.adapter_slots > len(self._models(name)),
        } | state
        self.told[name], self.needed[name] = self.now, self._models(name)
        self.said[name] = WorkerState(name, self.now, **figures)  # type: ignore[arg-type]
        self.dispatcher.state(self.said[name], self.now)

    def tell_all(self) -> list[Decision]:
        return [each for name in self.running for each in self.tell(name)]

    def come(self, *items: Item) -> None:
        """They arrive, and nothing is decided yet."""
        for each in items:
            assert each.key not in self.waiting
            self.waiting[each.key] = each
            self.dispatcher.arrive(each, self.now)

    def arrive(self, *items: Item) -> list[Decision]:
        self.come(*items)
        return self.decide()

    def compute(self, name: str) -> list[Decision]:
        """All its prompts are computed, and their first tokens come. It loads adapters that it needs."""
        self.uncomputed[name].clear()
        if self.adapter_slots:
            kept = sorted(self.adapters[name] - self._models(name))
            more = self.adapter_slots - len(self._models(name))
            self.adapters[name] = self._models(name) | frozenset(kept[:more])
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
        del self.uncomputed[name], self.sends[name], self.told[name], self.said[name]
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

    def could_run(self, name: str, each: Item) -> bool:
        """Whether the worker, by what it said last, might ever be given it."""
        said, pool = self.said[name], self.config.pools.get(each.service_class)
        if pool is not None:
            steps = [other.step_tokens for other in self.said.values() if other.serving]
            within = [step for step in steps if pool.least_step_tokens <= step <= pool.most_step_tokens]
            if within and said.step_tokens not in within:
                return False
        has = said.adapters | self._models(name)
        room = said.adapter_room and self._models(name) <= said.adapters | self.needed[name]
        return said.serving and (each.model == BASE or each.model in has or room)

    def _models(self, name: str) -> frozenset[str]:
        """Adapters that its requests need."""
        return frozenset(each.model for each in self.running[name].values() if each.model != BASE)

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
            assert self.could_run(name, sent)
            # A class alone may fill workers as the most urgent one does.
            most = max(self.config.theta[each] for each in (sent.service_class, ServiceClass.INTERACTIVE))
            assert sum(self.uncomputed[name].values()) < most * self.steps[name]
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
