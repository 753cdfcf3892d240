"""The protocol, as a machine that does to it what may befall it, in any order: requests run on real workers,
which die, stall, lose their connection and wake too late; frames go missing; callers leave. Every reader
checks every frame, and in the end each request has ended, as it should."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Coroutine
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker import codec, registry, replies, subjects
from broker.config import BrokerConfig
from broker.messages import TERMINAL, ModelCard, ServiceClass, UsageEvent
from scheduler.config import SchedulerConfig
from scheduler.service import Scheduler
from tests.model.actors import (
    ENDLESS,
    MAX_DEATHS,
    PATH,
    Asked,
    Caller,
    DirectCaller,
    HttpCaller,
    Process,
    Reader,
    ask,
)
from tests.model.network import Client, Server
from tests.virtual_time import virtual_time

PAUSES = st.sampled_from([0.0, 0.0003, 0.0011, 0.005, 0.021, 0.09, 0.35, 1.1, 2.5])
"""Seconds that pass after something has happened: messages take 0.2 ms, tokens 20, a loss is seen in 300."""

SETTLED = 90.0
"""Seconds in which everything has come to its end once nothing befalls it any more."""

ELECTION = 9.0
"""Seconds that the journal is without a leader at most; `broker.tail` keeps what was said longer."""

WORKERS = 3


def setup_module() -> None:
    """What tests before have left behind is not to be found here, as an error."""
    gc.collect()


class _Errors(logging.Handler):
    """Nothing of what happens here is to be logged as an error, but this."""

    expected = ("the engine died",)

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith(self.expected):
            self.found.append(self.format(record))


class Fleet(RuleBasedStateMachine):
    """Rules take numbers and use them modulo what there is."""

    def __init__(self) -> None:
        super().__init__()
        self._exit = contextlib.ExitStack()
        self.loop = self._exit.enter_context(virtual_time())
        for module in "workers.runner", "scheduler.service":
            web = mock.Mock(server_port=1)
            self._exit.enter_context(mock.patch(f"{module}.start_http_server", return_value=(web, None)))
        self.errors = _Errors()
        logging.getLogger().addHandler(self.errors)
        self._exit.callback(logging.getLogger().removeHandler, self.errors)
        self.asked: list[Asked] = []
        self.callers: list[Caller] = []
        self.workers: list[Process] = []
        self.ended: list[Process] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.scheduler: tuple[Client, asyncio.Event, asyncio.Task[None]] | None = None
        self.started = 0
        self.strikes = 0
        self.untold: set[str] = set()
        self.run(self._open())

    async def _open(self) -> None:
        config = BrokerConfig(ack_wait=2.0, dedup_window=3600)
        self.server = Server(config, self.loop.unix)
        self.ingress = Client(self.server)
        for service_class in ServiceClass:
            self.server.queue("sim", service_class)
        await self.ingress.start()
        card = ModelCard(id="sim", base="sim", paths=(PATH,))
        await registry.Registry(self.ingress).put(card, int(self.ingress.now_ms()))
        self.mailbox = replies.Mailbox(self.ingress, "box")
        await self.mailbox.__aenter__()
        self.spawn(self._serve())

    async def _serve(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self.server.expire()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    def run(self, *work: Coroutine[Any, Any, Any], pause: float = 0.0) -> None:
        async def all_of() -> None:
            for each in work:
                await each
            await asyncio.sleep(pause)

        self.loop.run_until_complete(all_of())

    # Callers

    @rule(
        http=st.booleans(),
        streams=st.sampled_from([True, True, True, False]),
        choices=st.integers(1, 2),
        tokens=st.sampled_from([1, 3, 8, 20, 60, ENDLESS]),
        deadline=st.sampled_from([600.0, 600.0, 600.0, 3.0]),
        pause=PAUSES,
    )
    def submit(
        self, http: bool, streams: bool, choices: int, tokens: int, deadline: float, pause: float
    ) -> None:
        asked = ask(len(self.asked), "box", streams, choices, tokens, deadline)
        caller = (HttpCaller if http else DirectCaller)(asked, self.ingress, self.mailbox)
        self.asked.append(asked)
        self.callers.append(caller)

        async def submit() -> None:
            self.spawn(caller.run())

        self.run(submit(), pause=pause)

    @precondition(lambda self: self.asked)
    @rule(number=st.integers(0, 9), pause=PAUSES)
    def submit_again(self, number: int, pause: float) -> None:
        """Its acknowledgement seemed lost."""
        request = self.asked[number % len(self.asked)].request

        async def submit() -> None:
            ack = await self.ingress.enqueue(str(request.subject), request.body, request.headers())
            assert (await ack).duplicate

        self.run(asyncio.sleep(0.001), submit(), pause=pause)

    @precondition(lambda self: self.callers)
    @rule(number=st.integers(0, 9), pause=PAUSES)
    def cancel(self, number: int, pause: float) -> None:
        self.run(self.callers[number % len(self.callers)].cancel(), pause=pause)

    @precondition(lambda self: self.asked)
    @rule(number=st.integers(0, 9), pause=PAUSES)
    def read_late(self, number: int, pause: float) -> None:
        self.run(self._read_late(self.asked[number % len(self.asked)]), pause=pause)

    async def _read_late(self, asked: Asked) -> None:
        self.spawn(Reader(asked, late=True).read_on(self.ingress))

    # Workers

    @initialize(count=st.integers(0, 2), scheduler=st.booleans())
    def begin(self, count: int, scheduler: bool) -> None:
        for _ in range(count):
            self.start_worker(0.0)
        if scheduler:
            self.start_scheduler(0.0)

    @precondition(lambda self: len(self.workers) < WORKERS)
    @rule(pause=PAUSES)
    def start_worker(self, pause: float) -> None:
        self.started += 1

        async def start() -> None:
            self.workers.append(await Process.start(f"w{self.started}", self.server))

        self.run(start(), pause=pause)

    def _worker(self, number: int) -> Process:
        return self.workers[number % len(self.workers)]

    def _remove(self, number: int) -> Process:
        self.strikes += 1
        worker = self._worker(number)
        self.workers.remove(worker)
        self.ended.append(worker)
        return worker

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 2), unsent=st.booleans(), pause=PAUSES)
    def kill(self, number: int, unsent: bool, pause: float) -> None:
        self.run(self._remove(number).die(unsent), pause=pause)

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 2), pause=PAUSES)
    def kill_engine(self, number: int, pause: float) -> None:
        if self._worker(number).client.connected:
            self.run(self._remove(number).lose_engine(), pause=pause)

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 2), pause=PAUSES)
    def drain(self, number: int, pause: float) -> None:
        if self._worker(number).client.connected:
            self.run(self._remove(number).drain(), pause=pause)

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 2), pause=PAUSES)
    def stall_or_wake(self, number: int, pause: float) -> None:
        self.strikes += 1
        client = self._worker(number).client

        async def turn() -> None:
            if client.stalled:
                client.wake()
            else:
                client.stall()

        self.run(turn(), pause=pause)

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 2), pause=PAUSES)
    def cut_or_heal(self, number: int, pause: float) -> None:
        self.strikes += 1
        client = self._worker(number).client

        async def turn() -> None:
            if client.connected:
                client.cut()
            else:
                client.heal()

        self.run(turn(), pause=pause)

    # The broker and the scheduler

    @rule(number=st.integers(0, 9), pause=PAUSES)
    def hand_on(self, number: int, pause: float) -> None:
        """Take a request from who has it, lost or not."""
        held = [seq for queue in self.server.queues.values() for seq in queue.unacked]
        if held:
            self.strikes += 1
            queue = self.server.queue("sim", ServiceClass.STANDARD)

            async def turn() -> None:
                self.server.nak(queue, held[number % len(held)])

            self.run(turn(), pause=pause)

    @rule(count=st.sampled_from([1, 1, 3, 30]), pause=PAUSES)
    def lose_frames_live(self, count: int, pause: float) -> None:
        self.server.unheard = count
        self.run(pause=pause)

    @rule(pause=PAUSES)
    def lose_or_elect_leader(self, pause: float) -> None:
        """Of the journal."""

        async def turn() -> None:
            if self.server.leaderless:
                self.server.elect()
            else:
                self.server.leaderless = True
                self.loop.call_later(ELECTION, self.server.elect)

        self.run(turn(), pause=pause)

    @precondition(lambda self: self.asked)
    @rule(number=st.integers(0, 9), pause=PAUSES)
    def frames_again(self, number: int, pause: float) -> None:
        asked = self.asked[number % len(self.asked)]
        self.run(self.ingress.publish(subjects.again(asked.request.reply_to), b"{}"), pause=pause)

    @precondition(lambda self: self.scheduler is None)
    @rule(pause=PAUSES)
    def start_scheduler(self, pause: float) -> None:
        async def start() -> None:
            client, stop = Client(self.server), asyncio.Event()
            await client.start()
            scheduler = Scheduler(SchedulerConfig(name=f"s{self.loop.now}"), client)
            self.scheduler = client, stop, asyncio.create_task(scheduler.run(stop))

        self.run(start(), pause=pause)

    @precondition(lambda self: self.scheduler is not None)
    @rule(pause=PAUSES)
    def kill_scheduler(self, pause: float) -> None:
        assert self.scheduler is not None
        (client, _, task), self.scheduler = self.scheduler, None
        task.cancel()
        # It may have taken a request out of the queue and not said so.
        self.untold |= {asked.request.reply_to for asked in self.asked if self._untold(asked)}
        self.run(client.die(unsent=True), pause=pause)

    def _untold(self, asked: Asked) -> bool:
        if asked.ack is None:
            return False
        queued = self.server.stream(subjects.REQUESTS).select(str(asked.request.subject))
        if any((record.headers or {})[subjects.REPLY_TO] == asked.request.reply_to for record in queued):
            return False
        frames = self.server.stream(subjects.REPLIES).select(asked.request.reply_to)
        return not any(codec.decode(record.data).kind in TERMINAL for record in frames)

    # What always holds

    @invariant()
    def nothing_is_wrong(self) -> None:
        for task in self.tasks:
            if task.done():
                task.result()
        assert not self.errors.found
        assert not self.server.untold, "acknowledged, and its end is in no journal"

    def teardown(self) -> None:
        with self._exit:
            self.run(self._settle())
            self.nothing_is_wrong()
            self.run(self._check())

    async def _settle(self) -> None:
        """Nothing more befalls them: everything ends."""
        self.server.unheard = 0
        self.server.elect()
        for worker in [*self.workers, *self.ended]:
            worker.client.mend()
        if not self.workers:
            self.workers.append(await Process.start("last", self.server))
        end = self.loop.time() + SETTLED
        while (left := self._left()) and self.loop.time() < end:
            self.nothing_is_wrong()
            for caller in self.callers:
                if caller.asked.endless:
                    await caller.cancel()
            await asyncio.sleep(0.25)
        assert not left, left

    def _left(self) -> list[object]:
        """What has not ended."""
        silent = self.untold | {subject for subject, _ in self.server.lost}
        readers = [
            f"a reader of {asked.request.request_id}"
            for asked in self.asked
            for reader in asked.readers
            if not reader.finished and asked.request.reply_to not in silent
        ]
        return [*readers, *self.server.stream(subjects.REQUESTS).entries]

    async def _check(self) -> None:
        await asyncio.sleep(3.0)
        for worker in self.workers:
            assert worker.idle, f"{worker.name} runs what nobody waits for"
        usage = await self._usage()
        for asked in self.asked:
            for reader in asked.readers:
                if reader.finished:
                    self._check_end(asked, reader)
            self._check_usage(asked, usage[asked.request.request_id])

    def _check_end(self, asked: Asked, reader: Reader) -> None:
        if reader.code:
            assert reader.code in self._codes(asked) or (reader.late and reader.code == "not_found"), (
                reader.code
            )
            return
        assert reader.end is not None
        assert {len(ids) for ids in reader.said.values()} == {asked.tokens}
        assert len(reader.said) == asked.choices
        assert reader.end.extra["usage"]["completion_tokens"] == asked.tokens * asked.choices

    def _codes(self, asked: Asked) -> set[str]:
        """Errors that it may have come to."""
        codes = set()
        if asked.cancelled:
            codes.add("cancelled")
        if asked.request.deadline_ms < self.loop.unix() * 1000:
            codes |= {"deadline_exceeded", "overloaded"}  # it was, or would have been, too late
        if self.strikes >= MAX_DEATHS:
            codes.add("poisoned")
        if asked.request.reply_to in self.server.hurt:
            codes |= {"frames_lost", "worker_lost"}
        return codes

    def _check_usage(self, asked: Asked, events: list[UsageEvent]) -> None:
        assert len(events) <= 1, events
        codes = {reader.code for reader in asked.readers if reader.finished}
        if "" in codes and asked.request.reply_to not in self.server.hurt:
            assert [event.outcome for event in events] == ["finished"]
            assert events[0].completion_tokens == asked.tokens * asked.choices

    async def _usage(self) -> dict[str, list[UsageEvent]]:
        found: dict[str, list[UsageEvent]] = {asked.request.request_id: [] for asked in self.asked}
        for record in await self.ingress.read(subjects.USAGE, subjects.ALL_USAGE):
            event = UsageEvent.model_validate_json(record.data)
            found[event.request_id].append(event)
        return found


TestFleet = Fleet.TestCase
# The same runs each time: what a new one finds is for who looks for it, with MODEL_RUNS=2000, not for who
# changes something else.
_runs = int(os.environ.get("MODEL_RUNS", "0"))
TestFleet.settings = settings(max_examples=_runs or 100, stateful_step_count=30, derandomize=not _runs)
