"""The requests that this dispatcher sent and that workers still have, and the KV room they take. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView
from dataclasses import dataclass

from broker.messages import ServiceClass
from kvstate.accounts import Account
from kvstate.budget import KV_CEILING
from kvstate.lengths import Lengths
from scheduler.dispatch.config import DispatchConfig
from scheduler.dispatch.reserve import Reserve
from scheduler.dispatch.types import Item, WorkerState

REFRESH = 4
"""Output tokens of each request for which the forecast of what a worker's have made is used again."""

KEEP = 0.98
"""How much of an older request's weight in a worker's pace remains after a newer one."""

PRIOR = 64.0
"""Output tokens that the pace assumed for a new worker weighs as much as."""

OFF = 2.0
"""Times by which a prompt may be longer or shorter than its bytes say, in what it teaches of others."""

_SPREAD = math.sqrt(2) - 1
"""Its multiples by consecutive numbers, or by each n-th, lie evenly between two whole ones. Not the golden
ratio: by that some are refused, and those that are left would lie evenly no more."""


@dataclass(slots=True, eq=False)
class Sent:
    """A request on a worker.

    Attributes:
        tokens: uncomputed on the worker when it was sent, its own included.
        predicted: seconds from then to its first token.
        hit: tokens of it that were thought to be cached.
        row: of the lanes, as which it was sent.
        room: KV tokens that it would add there, as was forecast then.
        first: when its first token came; None = not yet.
        stays: it can't be taken back.
    """

    item: Item
    slot: int
    at: float
    tokens: float
    predicted: float
    hit: int
    row: int = 0
    room: float = 0.0
    first: float | None = None
    confirmed: bool = False
    stays: bool = False


@dataclass(slots=True)
class _Pace:
    """How fast a worker's requests make output after the first token, the newest counting most."""

    seconds: float
    tokens: float = PRIOR

    def add(self, seconds: float, tokens: int) -> None:
        self.seconds = KEEP * self.seconds + seconds
        self.tokens = KEEP * self.tokens + tokens

    @property
    def token(self) -> float:
        """Seconds between two."""
        return max(self.seconds / self.tokens, 1e-6)


class Running:
    def __init__(self, config: DispatchConfig) -> None:
        self._config = config
        self._lengths = Lengths()
        self._sent: dict[int, Sent] = {}
        self._on: dict[int, dict[int, Sent]] = {}  # by slot
        self._accounts: dict[int, Account] = {}
        self._refreshed: dict[int, float] = {}
        self._paces: dict[int, _Pace] = {}
        self._batches: dict[int, int] = {}  # by slot: batch requests there
        self._scale, self._counted = 1.0, 0  # tokens as engines count them, for one that was estimated
        self.reserve = Reserve()

    def __len__(self) -> int:
        return len(self._sent)

    def __contains__(self, key: int) -> bool:
        return key in self._sent

    def get(self, key: int) -> Sent | None:
        return self._sent.get(key)

    # Workers

    def join(self, slot: int) -> None:
        self._on[slot], self._refreshed[slot] = {}, 0.0
        self._paces[slot] = _Pace(PRIOR * self._config.step)

    def leave(self, slot: int) -> None:
        for key, sent in self._on.pop(slot).items():
            del self._sent[key]
            self.reserve.remove(sent.row, sent.room)
        self._batches.pop(slot, None)
        self._accounts.pop(slot, None)

    def state(self, slot: int, state: WorkerState, unseen: int) -> None:
        """The worker said so. `unseen`: sends to it that this does not include."""
        account = self._accounts.get(slot)
        room = state.kv_total, state.block_size
        if account is None or (account.total, account.block_size) != room:
            account = self._accounts[slot] = Account(
                *room,
                {each.value: share for each, share in self._config.ceilings.items()},
            )
            for key, sent in self._on[slot].items():
                self._enter(account, key, sent, self._remaining(sent.item, 0))
        known = len(self._on[slot]) - unseen
        account.foreign = 0.0
        if state.kv_total and state.running > known:
            account.foreign = max(0.0, KV_CEILING * state.kv_total - state.kv_free - account.peak())

    # Requests

    def fits(self, slot: int, item: Item, rights: ServiceClass, now: float) -> bool:
        """Whether it, as one of class `rights`, and all others there will find room to their ends."""
        account = self._accounts[slot]
        if account.total == 0:
            return True
        self._refresh(slot, now)
        return account.fits(rights.value, self._tokens(item), self._remaining(item, 0), item.hashes)

    def until(self, slot: int, item: Item, rights: ServiceClass) -> float:
        """Output tokens that each one there will have made before it `fits`."""
        account = self._accounts[slot]
        return account.until(rights.value, self._tokens(item), self._remaining(item, 0), item.hashes)

    def gone_by(self, item: Item, tokens: float) -> bool:
        """Whether it will have ended before the others have made so many output tokens more."""
        return self._remaining(item, 0) < tokens

    def add(self, sent: Sent) -> None:
        key = sent.item.key
        self._sent[key] = self._on[sent.slot][key] = sent
        cost, rest = sent.item.context - sent.hit, self._remaining(sent.item, 0)
        sent.room = self._scale * cost + rest
        self.reserve.add(sent.row, cost, sent.room, sent.at)
        self._enter(self._accounts[sent.slot], key, sent, rest)
        if sent.item.service_class is ServiceClass.BATCH:
            self._batches[sent.slot] = self._batches.get(sent.slot, 0) + 1

    def pop(self, key: int) -> Sent | None:
        """It is there no more."""
        sent = self._sent.pop(key, None)
        if sent is not None:
            del self._on[sent.slot][key]
            self.reserve.remove(sent.row, sent.room)
            self._accounts[sent.slot].finish(key)
            if sent.item.service_class is ServiceClass.BATCH:
                self._batches[sent.slot] -= 1
                if not self._batches[sent.slot]:
                    del self._batches[sent.slot]
        return sent

    def estimated(self, tokens: float) -> float:
        """As a prompt's bytes would have it that has so many `tokens` by an engine's count."""
        return tokens / self._scale

    @property
    def with_batch(self) -> KeysView[int]:
        """Slots whose workers have batch requests."""
        return self._batches.keys()

    def learn(self, sent: Sent, output_tokens: int, now: float, prompt_tokens: int = 0) -> None:
        """It has ended now, and made so much there. `prompt_tokens`: as its engine counted; 0 = untold."""
        item = sent.item
        if prompt_tokens and not item.done_tokens:
            # Bounded: where a body holds an image, its bytes say nothing of others' texts.
            scale = min(max(prompt_tokens / item.context, 1 / OFF), OFF)
            self._counted += 1
            self._scale += max(1 - KEEP, 1 / self._counted) * (scale - self._scale)
        if output_tokens > 0:
            self._lengths.learn(item.model, item.tenant, item.done_tokens + output_tokens)
        if sent.first is not None and output_tokens > 1:
            self._paces[sent.slot].add(now - sent.first, output_tokens - 1)

    def victim(self, slot: int, item: Item, slots_full: bool) -> Sent | None:
        """The batch request there to take back for `item`: the last one sent, if going of all makes room."""
        batch = list(self._batch(slot))
        if not batch:
            return None
        if slots_full or self._accounts[slot].fits(
            item.service_class.value,
            self._tokens(item),
            self._remaining(item, 0),
            item.hashes,
            without={each.item.key for each in batch},
        ):
            return batch[-1]
        return None

    def longest_prompt(self, slot: int) -> Sent | None:
        """The batch request there without a first token, whose prompt holds the others up most."""
        computing = (each for each in self._batch(slot) if each.first is None)
        return max(computing, key=lambda each: each.item.context - each.hit, default=None)

    def _batch(self, slot: int) -> Iterator[Sent]:
        on = self._on[slot].values()
        return (each for each in on if each.item.service_class is ServiceClass.BATCH and not each.stays)

    def _tokens(self, item: Item) -> int:
        """That it has when it comes, by what engines have counted of those before."""
        return max(1, round(self._scale * item.context))

    def _remaining(self, item: Item, made: int) -> float:
        """Drawn by its key from the lengths of those that ended: so the sum over many is neither too high nor
        too low. The same quantile for each would make it so."""
        quantile = item.key * _SPREAD % 1.0
        return self._lengths.remaining(
            item.model, item.tenant, item.done_tokens + made, item.max_tokens, quantile
        )

    def _enter(self, account: Account, key: int, sent: Sent, rest: float) -> None:
        account.add(key, sent.item.service_class.value, self._tokens(sent.item), rest, sent.item.hashes)

    def _refresh(self, slot: int, now: float) -> None:
        """Their outputs have grown since they were sent, at the worker's pace."""
        token = self._paces[slot].token
        if now - self._refreshed[slot] < REFRESH * token:
            return
        self._refreshed[slot] = now
        account = self._accounts[slot]
        for key, sent in self._on[slot].items():
            if sent.first is not None:
                made = int((now - sent.first) / token)
                if sent.item.max_tokens:
                    made = min(made, max(0, sent.item.max_tokens - sent.item.done_tokens))
                account.progress(key, self._tokens(sent.item) + made, self._remaining(sent.item, made))
