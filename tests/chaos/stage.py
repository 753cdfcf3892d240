"""The fleet that the faults strike: processes in numbered slots, each filled again after a death."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from broker import client, errors, subjects
from broker.base import Message
from broker.messages import Command, Dispatch, Heartbeat, Sent
from tests.chaos import liar
from tests.chaos.plan import Fault, Kind
from tests.chaos.proxy import Proxy
from tests.integration.cluster import NatsCluster
from tests.integration.fleet import Fleet, Part

SKEW = 3600.0
"""Seconds by which a wrong clock is ahead, or behind."""
SIZES = {"worker": 4, "ingress": 2, "scheduler": 2, "nats": 3}
PACE = 0.02
"""Seconds between two tokens of a stream."""
_BEHIND_PROXIES = "worker", "ingress", "scheduler"
_STARTS = 8
_WORDS = 0.35
"""Seconds without a word of the leading scheduler after which workers hold that none leads."""
_ELECTION = 4.0, 10.0
"""Seconds that an election of nats-server takes, at least and at most."""
JOURNAL, QUEUE, SCHEDULERS = "journal elects", "queue elects", "no scheduler leads"
_QUEUE_ELECTED = (
    f"$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.{subjects.REQUESTS}",
    f"$JS.EVENT.ADVISORY.CONSUMER.LEADER_ELECTED.{subjects.REQUESTS}.*",
)
_SETTINGS: dict[str, dict[str, object]] = {
    # The drain is shorter than many an answer, and so hands some of them over.
    "worker": {
        "sim__ttft_ms": 20,
        "sim__itl_ms": PACE * 1000,
        "sim__max_num_seqs": 12,  # few enough that batch gives way while workers are down
        "worker__drain_timeout": 0.5,
    },
    "ingress": {"ingress__drain_timeout": 20},
    "scheduler": {},
}


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was carried out: `at` is monotonic time, `target` the process's name or URL."""

    at: float
    fault: Fault
    target: str


class Span(NamedTuple):
    """Monotonic times between which something had no leader."""

    since: float
    until: float


class Stage:
    """See the module. An async context manager; its parts end with it, by their pids.

    Attributes:
        ingresses: URLs of those that take requests.
        struck: the faults so far.
        leaderless: while the journal of replies, the queue or a consumer of it, or the schedulers had no
            leader, so far.
        takeovers: from the last word of a scheduler that led to the first request that the next one handed
            out, so far.
        preempted: batch requests that were to give way to others.
        restarts: processes that were started again since they ended before they were ready.
    """

    def __init__(self, data: Path) -> None:
        self.cluster = NatsCluster(data / "nats")
        self.struck: list[Struck] = []
        self.leaderless: dict[str, list[Span]] = {JOURNAL: [], QUEUE: [], SCHEDULERS: []}
        self.takeovers: list[Span] = []
        self._word = math.inf  # when a scheduler last said that it leads
        self._epoch = 0  # and which one's turn that was
        self._left = math.inf  # when the one before said so last; inf = its successor has handed out since
        self._beats: dict[str, bytes] = {}  # the last heartbeat of each worker
        self.preempted = 0
        self.restarts = 0
        self._struck: set[tuple[str, int]] = set()  # under a fault now
        self._fleet = Fleet(data, self.cluster)
        self._slots: dict[tuple[str, int], Part] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._generation: Counter[tuple[str, int]] = Counter()
        self._proxies: dict[tuple[str, int], Proxy] = {}
        self._open = contextlib.AsyncExitStack()

    @property
    def ingresses(self) -> list[str]:
        return [self._slots[key].url for key in sorted(self._slots) if key[0] == "ingress"]

    async def __aenter__(self) -> Self:
        async with self._open:
            await self._open.enter_async_context(self._fleet)
            broker = await client.connect(self.cluster.config, "chaos", make_streams=False)
            await self._open.enter_async_context(broker)
            await broker.subscribe(subjects.JOURNAL_ELECTED, lambda _: self._elected())
            for elected in _QUEUE_ELECTED:
                await broker.subscribe(elected, lambda _: self._queue_elected())
            await broker.subscribe(subjects.DISPATCH, self._led)
            await broker.subscribe("run.*", self._handed_out)
            await broker.subscribe(subjects.ALL_HEARTBEATS, self._heard)
            await broker.subscribe(subjects.ALL_COMMANDS, self._commanded)
            broker.on_reconnect(self._deaf)
            self._broker = broker
            nodes = [urlsplit(node.url) for node in self.cluster.nodes]
            for part in _BEHIND_PROXIES:
                for slot in range(SIZES[part]):
                    proxy = Proxy([(str(node.hostname), node.port or 0) for node in nodes])
                    self._proxies[part, slot] = await self._open.enter_async_context(proxy)
            await asyncio.gather(
                *(self._fill(part, slot) for part in _SETTINGS for slot in range(SIZES[part]))
            )
            self._open = self._open.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._open.aclose()

    async def strike(self, fault: Fault) -> None:
        """Carry one fault out, to its end: what died runs again. One whose target has not got over the last
        one, on a slow machine, is left out."""
        target = fault.kind.part, fault.slot
        if target in self._struck:
            return
        self._struck.add(target)
        try:
            await self._acts[fault.kind](self, fault)
        finally:
            self._struck.remove(target)

    def _note(self, fault: Fault) -> None:
        target = self._names.get((fault.kind.part, fault.slot), f"n{fault.slot}")
        self.struck.append(Struck(time.monotonic(), fault, target))

    async def _fill(self, part: str, slot: int, **more: object) -> Part:
        """A new process in the slot, once it is ready; `more` is for `Fleet.start`."""
        self._generation[part, slot] += 1
        name = f"{part[0]}{slot}-{self._generation[part, slot]}"
        settings = _SETTINGS[part] | {f"{part}__name": name} | more
        if part in _BEHIND_PROXIES:
            urls = [f"nats://127.0.0.1:{port}" for port in self._proxies[part, slot].ports]
            settings |= {"broker__url": ",".join(urls)}
        started = await self._started(part, settings)
        self._slots[part, slot] = started
        self._names[part, slot] = started.url if part == "ingress" else name
        return started

    async def _started(self, part: str, settings: dict[str, object]) -> Part:
        """Tried again, as whatever looks after processes does: one that starts while the cluster elects a
        leader may find no streams, and ends."""
        for left in reversed(range(_STARTS)):
            try:
                return await self._fleet.start(part, **settings)
            except AssertionError:
                if not left:
                    raise
                self.restarts += 1
        raise AssertionError

    async def _kill(self, fault: Fault, **more: object) -> None:
        self._note(fault)
        await self._slots.pop((fault.kind.part, fault.slot)).kill()
        await asyncio.sleep(fault.lasts)
        await self._fill(fault.kind.part, fault.slot, **more)

    async def _skew(self, fault: Fault) -> None:
        await self._kill(fault, ahead=SKEW if self._generation[fault.kind.part, fault.slot] % 2 else -SKEW)

    async def _lie(self, fault: Fault) -> None:
        name = self._names["worker", fault.slot]
        true = Heartbeat.model_validate_json(self._beats[name])
        self._note(fault)
        end = time.monotonic() + fault.lasts
        for subject, data in liar.lies(true, random.Random(name)):
            with contextlib.suppress(errors.Unavailable):
                await self._broker.publish(subject, data)
            await asyncio.sleep(liar.EVERY)
            if time.monotonic() > end:
                return

    async def _drain(self, fault: Fault) -> None:
        """A rolling restart: the successor serves before the old one is told to stop."""
        old = self._slots[fault.kind.part, fault.slot]
        name = self._names[fault.kind.part, fault.slot]
        await self._fill(fault.kind.part, fault.slot)
        self.struck.append(Struck(time.monotonic(), fault, name))
        old.term()
        status = await old.ended()
        assert status == 0, f"{name} was told to stop, and ended with status {status}: see {old.log}"

    async def _stop(self, fault: Fault) -> None:
        self._note(fault)
        process = self._slots[fault.kind.part, fault.slot].process
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            process.send_signal(signal.SIGCONT)

    async def _network(self, fault: Fault, act: Callable[[Proxy], None]) -> None:
        self._note(fault)
        proxy = self._proxies[fault.kind.part, fault.slot]
        act(proxy)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            proxy.mend()

    def _elected(self) -> None:
        """Of what no lost node explains it is only known how long it was at least."""
        now = time.monotonic()
        since = min(self._lost_lately(now), default=now - _ELECTION[0])
        self.leaderless[JOURNAL].append(Span(since, now))

    def _queue_elected(self) -> None:
        """A queue that is new elects its first leader at once."""
        now = time.monotonic()
        if lost := self._lost_lately(now):
            self.leaderless[QUEUE].append(Span(min(lost), now))

    def _lost_lately(self, now: float) -> list[float]:
        since = now - _ELECTION[1]
        return [one.at for one in self.struck if one.fault.kind is Kind.KILL_NATS and one.at > since]

    def _led(self, message: Message) -> None:
        epoch, now = Dispatch.model_validate_json(message.data).epoch, time.monotonic()
        if epoch < self._epoch:
            return  # it does not know that it leads no longer
        if epoch > self._epoch:
            self._epoch, self._left = epoch, self._word
        if now - self._word > _WORDS:
            self.leaderless[SCHEDULERS].append(Span(self._word, now))
        self._word = now

    def _handed_out(self, message: Message) -> None:
        sent = Sent.model_validate_json((message.headers or {})[subjects.SENT])
        if sent.epoch == self._epoch and self._left < math.inf:
            self.takeovers.append(Span(self._left, time.monotonic()))
            self._left = math.inf

    def _commanded(self, message: Message) -> None:
        self.preempted += Command.model_validate_json(message.data).do == "preempt"

    def _heard(self, message: Message) -> None:
        self._beats[subjects.name(message.subject.partition(".")[2])] = message.data

    def _deaf(self) -> None:
        """What was said meanwhile has passed us by."""
        self._word = self._left = math.inf

    async def _stall(self, fault: Fault) -> None:
        await self._network(fault, Proxy.stall)

    async def _mute(self, fault: Fault) -> None:
        await self._network(fault, lambda proxy: proxy.lose(subjects.ALL_HEARTBEATS.rstrip("*")))

    async def _cut(self, fault: Fault) -> None:
        await self._network(fault, Proxy.cut)

    async def _kill_nats(self, fault: Fault) -> None:
        self._note(fault)
        await self.cluster.kill(fault.slot)
        await asyncio.sleep(fault.lasts)
        await self.cluster.nodes[fault.slot].start()

    _acts: dict[Kind, Callable[[Stage, Fault], Coroutine[Any, Any, None]]] = {
        Kind.KILL_WORKER: _kill,
        Kind.STOP_WORKER: _stop,
        Kind.STALL_WORKER: _stall,
        Kind.CUT_WORKER: _cut,
        Kind.MUTE_WORKER: _mute,
        Kind.LIE_WORKER: _lie,
        Kind.SKEW_WORKER: _skew,
        Kind.SKEW_INGRESS: _skew,
        Kind.SKEW_SCHEDULER: _skew,
        Kind.DRAIN_WORKER: _drain,
        Kind.KILL_INGRESS: _kill,
        Kind.STOP_INGRESS: _stop,
        Kind.CUT_INGRESS: _cut,
        Kind.DRAIN_INGRESS: _drain,
        Kind.KILL_SCHEDULER: _kill,
        Kind.STOP_SCHEDULER: _stop,
        Kind.CUT_SCHEDULER: _cut,
        Kind.KILL_NATS: _kill_nats,
    }

    def dead(self) -> list[str]:
        """Processes that ended without being told to, with their logs."""
        found = [f"{self._names[key]}: {part.log}" for key, part in self._slots.items() if not part.alive]
        found += [str(node.log) for node in self.cluster.nodes if node.pid is None or not _runs(node.pid)]
        return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
