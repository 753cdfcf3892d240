"""The adapters of one simulated worker: loaded one at a time, when a request needs one or the plan says so.
The one that was used longest ago makes room. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from broker.messages import AdapterState, Command
from workers.config import SimConfig


class Adapters:
    """Whoever holds the clock calls `load` after each change, and `loaded` when that has taken its time.

    Attributes:
        loading: what is being loaded; "" = nothing.
        loads: how many were begun.
    """

    def __init__(self, config: SimConfig) -> None:
        self._slots = config.adapter_slots
        self._room = max(config.adapter_slots, config.adapters_in_memory) if config.adapter_slots else 0
        self._ready: OrderedDict[str, None] = OrderedDict()  # used longest ago first
        self._needed: Counter[str] = Counter()  # requests that run with it, or wait for it
        self._asked: OrderedDict[str, None] = OrderedDict()  # to be loaded, requests' before the plan's
        self.loading = ""
        self.loads = 0

    def need(self, model: str) -> bool:
        """A request came; whether it may run at once. Else it may when `loaded` says so."""
        self._needed[model] += 1
        if model in self._ready:
            self._ready.move_to_end(model)
            return True
        if model != self.loading:
            self._asked[model] = None
            self._asked.move_to_end(model, last=False)
        return False

    def leave(self, model: str) -> None:
        """A request is there no more."""
        self._needed[model] -= 1
        if not self._needed[model]:
            del self._needed[model]

    def told(self, command: Command) -> None:
        """By the plan."""
        if command.do == "unload" and command.model not in self._needed:
            self._ready.pop(command.model, None)
        elif command.do == "load" and command.model not in self._ready and command.model != self.loading:
            self._asked.setdefault(command.model, None)

    def load(self) -> str:
        """What begins to load now; "" = nothing can."""
        if self.loading or not self._asked:
            return ""
        if len(self._ready) >= self._room and not self._evict():
            return ""
        self.loading, _ = self._asked.popitem(last=False)
        self.loads += 1
        return self.loading

    def loaded(self) -> str:
        """What was being loaded is there."""
        model, self.loading = self.loading, ""
        self._ready[model] = None
        return model

    def _evict(self) -> bool:
        idle = next((model for model in self._ready if model not in self._needed), None)
        if idle is not None:
            del self._ready[idle]
        return idle is not None

    # What it tells

    @property
    def there(self) -> frozenset[str]:
        """Those loaded, and the one that is being."""
        return frozenset((*self._ready, self.loading) if self.loading else self._ready)

    @property
    def has_room(self) -> bool:
        """Whether one more could run."""
        return len(self._needed) < self._room

    def states(self) -> Iterator[AdapterState]:
        for model in self._ready:
            yield AdapterState(model=model, state="ready", running=self._needed[model])
        if self.loading:
            yield AdapterState(model=self.loading, state="loading", waiting=self._needed[self.loading])
