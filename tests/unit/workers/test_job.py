"""One request in an engine whose behaviour the test decides."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

import orjson
import pytest

from broker import codec, errors, subjects
from broker.memory import MemoryBroker
from broker.messages import Frame, FrameKind, Request, UsageEvent
from tests.waiting import LIMIT, until
from tests.workbench import PATH, WaxEngine, gone, metric, soon, start_response
from workers import job as jobs
from workers import recovery
from workers.engines.base import ASGIApp, Receive, Refused, Scope, Send, current_tap

REPLY = "out.acme.box.r1"


@dataclass
class Delivery:
    """A message in a worker's hands, and what became of it."""

    subject: str = "req.sim.standard.acme.sim"
    headers: dict[str, str] | None = None
    data: bytes = b"{}"
    seq: int = 1
    attempt: int = 1
    pending: int = 0
    enqueued_ms: float = field(default_factory=lambda: time.time() * 1000)
    receipt: str = ""
    verdicts: list[str] = field(default_factory=list)

    async def ack(self) -> None:
        self.verdicts.append("ack")

    async def nak(self) -> None:
        self.verdicts.append("nak")

    async def in_progress(self) -> None:
        self.verdicts.append("wpi")


class Killed(BaseException):
    """The worker's end, in the middle of whatever it was doing."""


@dataclass
class Bench:
    """A job, what it runs on, and what it said."""

    app: ASGIApp
    deadline_ms: int = 0
    model: str = "sim"
    broker: MemoryBroker = field(default_factory=MemoryBroker)
    delivery: Delivery = field(default_factory=Delivery)

    def __post_init__(self) -> None:
        subject = subjects.RequestSubject("sim", "standard", "acme", self.model)
        request = Request(subject, "r1", REPLY, PATH, b"{}", self.deadline_ms, traceparent="00-1-2-01")
        self.engine = WaxEngine(self.app)
        self.job = jobs.Job(
            request, self.delivery, self.broker, self.engine, "w1", jobs.Share(), jobs.Touch()
        )

    async def run(self) -> list[Frame]:
        await asyncio.wait_for(self.job.run(), LIMIT)
        await asyncio.wait_for(self.job.settle(), LIMIT)
        assert self.engine.running == 0
        return await self.frames()

    async def frames(self) -> list[Frame]:
        return [codec.decode(r.data) for r in await self.broker.read(subjects.REPLIES, REPLY)]

    async def usage(self) -> list[UsageEvent]:
        records = await self.broker.read(subjects.USAGE, subjects.ALL_USAGE)
        return [UsageEvent.model_validate_json(record.data) for record in records]


async def failure(bench: Bench, code: str) -> Frame:
    """The job ends in one error frame, an ack, and one usage event that says the same."""
    frames = await bench.run()
    assert [f.seq for f in frames] == list(range(len(frames)))
    assert [f.kind for f in frames].count(FrameKind.ERROR) == 1
    assert frames[-1].extra["code"] == code
    assert bench.delivery.verdicts == ["ack"]
    (event,) = await bench.usage()
    assert event.code == code
    assert event.status == frames[-1].extra["status"]
    return frames[-1]


async def test_frames_carry_the_engines_bytes_and_the_taps_tokens(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tap = current_tap.get()
        assert tap is not None
        tap.prompt_tokens, tap.cached_tokens, tap.scheduled_at = 11, 4, 0.0
        headers = [(b"Content-Type", b"text/event-stream"), (b"server", b"x"), (b"X-Request-Id", b"r1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        tap.tokens(1.0, 0, [5])
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        tap.tokens(2.0, 0, [6])
        tap.tokens(2.0, 1, [7])
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        await send({"type": "http.response.body", "body": b"[DONE]", "more_body": False})

    bench = Bench(app)
    before = metric("headrace_frames_total")
    head, two, done, end = await bench.run()
    assert (head.kind, head.payload, head.ids, head.extra["status"]) == (FrameKind.HEAD, b"one", [5], 200)
    assert head.extra["headers"] == {"Content-Type": "text/event-stream", "X-Request-Id": "r1"}
    assert (two.payload, two.off, two.ids, two.choices) == (b"two", 1, [6], [[1, 0, [7]]])
    assert (done.payload, done.off, done.ids) == (b"[DONE]", 2, [])
    assert end.extra["usage"] == {"prompt_tokens": 11, "cached_tokens": 4, "completion_tokens": 3}
    assert bench.delivery.verdicts == ["ack"]
    (event,) = await bench.usage()
    assert (event.outcome, event.status, event.code, event.worker) == ("finished", 200, "", "w1")
    assert (event.prompt_tokens, event.cached_tokens, event.completion_tokens) == (11, 4, 3)
    assert event.gpu_seconds > 0
    assert None not in event.latency.model_dump().values()
    assert metric("headrace_frames_total") - before == 4


async def test_a_reader_is_told_when_the_first_token_takes_its_time(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await until(told)
        await start_response(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def told() -> bool:
        return bool(await bench.frames())

    monkeypatch.setattr("workers.job._BEAT_AFTER", 0.01)
    bench = Bench(app)
    beat, head, end = await bench.run()
    assert (beat.kind, beat.extra["worker"]) == (FrameKind.BEAT, "w1")
    assert [f.seq for f in (beat, head, end)] == [0, 1, 2]


async def test_the_app_is_called_as_a_server_calls_it(anyio_backend: object) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    await Bench(app).run()
    (scope,) = seen
    assert (scope["method"], scope["path"]) == ("POST", PATH)
    assert dict(scope["headers"])[b"x-request-id"] == b"r1"
    assert dict(scope["headers"])[b"traceparent"] == b"00-1-2-01"


async def test_the_engines_refusal_is_the_answer(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": "not JSON"}', "more_body": False})

    bench = Bench(app)
    head, end = await bench.run()
    assert (head.extra["status"], head.payload) == (400, b'{"error": "not JSON"}')
    assert end.kind is FrameKind.END
    (event,) = await bench.usage()
    assert (event.outcome, event.status) == ("failed", 400)


@pytest.mark.parametrize("raised", [ValueError("a defect"), TimeoutError(), errors.EngineFailed("broken")])
async def test_an_app_that_raises_fails_its_request_only(anyio_backend: object, raised: Exception) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise raised

    await failure(Bench(app), "engine_failed")


async def test_an_app_that_raises_in_the_middle(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send)
        raise ValueError("a defect")

    bench = Bench(app)
    await failure(bench, "engine_failed")
    assert [f.kind.value for f in await bench.frames()] == ["head", "error"]


@pytest.mark.parametrize("started", [False, True])
async def test_an_app_that_just_returns_has_failed(anyio_backend: object, started: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await start_response(send)

    await failure(Bench(app), "engine_failed")


async def test_a_500_of_a_living_engine_is_the_answer(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"inter", "more_body": True})
        await send({"type": "http.response.body", "body": b"nal", "more_body": False})

    head, end = await Bench(app).run()
    assert (head.extra["status"], head.payload, end.kind) == (500, b"internal", FrameKind.END)


@pytest.mark.parametrize("sign", ["a 500", "an exception", "silence"])
async def test_what_a_dying_engine_had_not_begun_goes_back(anyio_backend: object, sign: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bench.engine.died.set_exception(errors.EngineFailed("out of memory"))
        if sign == "a 500":
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"internal", "more_body": False})
        elif sign == "an exception":
            raise RuntimeError("EngineDeadError")

    bench = Bench(app)
    (trace,) = await bench.run()
    assert (trace.kind, trace.extra["worker"]) == (FrameKind.BEAT, "w1"), "a death that can be counted"
    assert bench.delivery.verdicts == ["nak"]
    assert await bench.usage() == []
    assert bench.engine.died.exception() is not None


async def test_what_it_had_begun_is_told_to_the_caller(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_response(send)
        bench.engine.died.set_exception(errors.EngineFailed("out of memory"))
        raise RuntimeError("EngineDeadError")

    bench = Bench(app)
    await failure(bench, "engine_failed")
    assert bench.engine.died.exception() is not None


async def test_what_comes_to_an_engine_that_is_dead_is_not_what_it_died_of(anyio_backend: object) -> None:
    bench = Bench(answer)
    bench.engine.died.set_exception(errors.EngineFailed("crash"))
    frames = await bench.run()
    assert frames
    assert recovery.died(frames) == (), "that would count as a death"
    assert bench.delivery.verdicts == ["nak"]
    assert bench.engine.seen == []
    bench.engine.died.exception()


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    raise Refused("its server is away")


@pytest.mark.parametrize(("before", "handed_on"), [(0, True), (2, True), (3, False)])
async def test_what_the_engine_refuses_goes_to_another_worker_a_few_times_and_is_then_answered(
    anyio_backend: object, before: int, handed_on: bool
) -> None:
    bench = Bench(refuse, delivery=Delivery(attempt=9))
    bench.job.past = recovery.Past(left=before)
    if handed_on:
        (frame,) = await bench.run()
        assert frame.extra["left"] == "its server is away"
        assert bench.delivery.verdicts == ["nak"]
        assert await bench.usage() == []
    else:
        frame = await failure(bench, "unavailable")
        assert frame.extra["status"] == 503


async def test_usage_is_told_before_the_ack(anyio_backend: object) -> None:
    """So that a worker that dies between the two leaves a request that is looked at again."""

    class Dying(Delivery):
        async def ack(self) -> None:
            raise Killed

    bench = Bench(answer, delivery=Dying(seq=7))
    with pytest.raises(Killed):
        await bench.run()
    (record,) = await bench.broker.read(subjects.USAGE, subjects.ALL_USAGE)
    assert record.headers == {"Nats-Msg-Id": "acme:r1:7"}


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await start_response(send)
    tap = current_tap.get()
    assert tap is not None
    tap.tokens(time.monotonic(), 0, [5])
    await send({"type": "http.response.body", "body": b"two", "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def test_a_request_leaves_one_line_in_the_log(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await Bench(answer).run()
    (record,) = caplog.records
    line = vars(record)
    assert record.getMessage() == "request finished"
    assert (line["request_id"], line["tenant"], line["model"], line["worker"]) == ("r1", "acme", "sim", "w1")
    assert (line["outcome"], line["status"], line["completion_tokens"]) == ("finished", 200, 1)
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["total_s"]


async def test_a_failed_request_leaves_one_line_too(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await failure(Bench(wait_for_the_end, deadline_ms=soon(0.02)), "deadline_exceeded")
    (record,) = caplog.records
    assert (vars(record)["outcome"], vars(record)["code"]) == ("failed", "deadline_exceeded")


async def test_models_that_the_engine_does_not_serve_share_one_label(anyio_backend: object) -> None:
    def counted(model: str) -> float:
        return metric("headrace_queue_wait_seconds_count", model=model, **{"class": "standard"})

    before = counted("other")
    for model in ("made", "up"):
        bench = Bench(answer, model=model)
        bench.job.stop(errors.UnknownModel("nobody serves it"))
        await failure(bench, "model_not_found")
    assert counted("other") - before == 2
    assert counted("made") == counted("up") == 0


async def test_the_engines_retry_after_reaches_the_head(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"retry-after", b"17"), (b"server", b"x")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})

    head, _ = await Bench(app).run()
    assert head.extra["headers"] == {"retry-after": "17"}


async def wait_for_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    await start_response(send)
    await gone(receive)
    await send({"type": "http.response.body", "body": b"too late", "more_body": False})


async def test_stop_disconnects_the_app_and_what_it_still_says_is_nobodys(anyio_backend: object) -> None:
    bench = Bench(wait_for_the_end)
    before = metric("headrace_abort_seconds_count")
    run = asyncio.create_task(failure(bench, "cancelled"))
    await until(lambda: bench.engine.running)
    bench.job.stop(errors.Cancelled("gone"), time.time() * 1000)
    bench.job.stop(errors.DeadlineExceeded("too late to matter"))
    await run
    assert all(b"too late" not in f.payload for f in await bench.frames())
    assert (await bench.usage())[0].outcome == "cancelled"
    assert metric("headrace_abort_seconds_count") - before == 1


async def test_an_engine_deaf_to_its_disconnect_is_cut_off(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_ABORT_GRACE", 0.01)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    bench = Bench(app)
    run = asyncio.create_task(failure(bench, "cancelled"))
    await until(lambda: bench.engine.running)
    bench.job.stop(errors.Cancelled("gone"))
    await run


async def test_a_deadline_ends_a_run(anyio_backend: object) -> None:
    await failure(Bench(wait_for_the_end, deadline_ms=soon(0.05)), "deadline_exceeded")


async def test_a_run_stopped_before_its_start_never_starts(anyio_backend: object) -> None:
    bench = Bench(wait_for_the_end)
    bench.job.stop(errors.Cancelled("gone"))
    await failure(bench, "cancelled")
    assert bench.engine.seen == []


@pytest.mark.parametrize("begun", [False, True])
async def test_a_hand_back_is_a_nak_before_output_and_an_error_after(
    anyio_backend: object, begun: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await start_response(send)
        await gone(receive)

    bench = Bench(app)
    run = asyncio.create_task(failure(bench, "worker_lost") if begun else bench.run())
    await until(lambda: bench.engine.running)
    bench.job.stop(jobs.HandBack("drained"))
    await run
    assert bench.delivery.verdicts == ["ack" if begun else "nak"]
    assert len(await bench.usage()) == begun


async def test_a_stop_after_the_last_byte_changes_nothing(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all", "more_body": False})
        bench.job.stop(errors.Cancelled("gone"))

    bench = Bench(app)
    assert (await bench.run())[-1].kind is FrameKind.END


async def test_an_answer_with_more_tokens_than_a_frame_can_name_is_an_error(anyio_backend: object) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tap = current_tap.get()
        assert tap is not None
        tap.tokens(0.0, 0, list(range(10**9, 10**9 + 200_000)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all", "more_body": False})

    frame = await failure(Bench(app), "request_too_large")
    assert orjson.loads(frame.payload)["error"]["type"] == "invalid_request_error"


def test_engine_time_is_shared_by_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    share = jobs.Share()
    first = share.enter()
    now = 2.0
    second = share.enter()
    now = 6.0
    assert share.leave(first) == pytest.approx(2 + 4 / 2)
    now = 7.0
    assert share.leave(second) == pytest.approx(4 / 2 + 1)
    now = 50.0
    third = share.enter()
    now = 51.0
    assert share.leave(third) == pytest.approx(1)
