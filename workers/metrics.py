"""What one worker measures. Label children are looked up once a request, never once a token."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from broker.messages import Credit
from workers.engines.base import EngineStats

_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LABELS = ["model", "class"]

_FIGURES = ("running", "waiting", "kv_tokens_free", "kv_tokens_total", "preemptions", "steps", "skipped")

OTHER = "other"
"""Label of every model that the worker doesn't serve: a publisher may name as many as it likes."""

QUEUE_WAIT = Histogram(
    "headrace_queue_wait_seconds", "Stored in the queue until taken", _LABELS, buckets=_FAST
)
ENGINE_WAIT = Histogram(
    "headrace_engine_wait_seconds", "Handed to the engine until its first step", _LABELS, buckets=_FAST
)
PREFILL = Histogram("headrace_prefill_seconds", "First step until the first token", _LABELS, buckets=_FAST)
TTFT = Histogram(
    "headrace_worker_ttft_seconds", "Stored in the queue until the first token", _LABELS, buckets=_FAST
)
ITL = Histogram("headrace_itl_seconds", "Between the frames of one stream", _LABELS, buckets=_FAST)
TOTAL = Histogram(
    "headrace_worker_request_seconds",
    "Stored in the queue until the terminal frame",
    [*_LABELS, "outcome"],
    buckets=_FAST,
)
ABORT = Histogram(
    "headrace_abort_seconds", "The caller's cancel (or disconnect) until the engine stopped", buckets=_FAST
)
TOKENS = Counter("headrace_tokens_total", "Tokens, by kind: prompt, cached, completion", ["model", "kind"])
FRAMES = Counter("headrace_frames_total", "Reply frames published")
RETURNED = Counter("headrace_returned_total", "Deliveries handed back, by reason", ["reason"])
DEAD = Counter("headrace_dead_letters_total", "Messages nobody could be told about")
QUARANTINES = Counter("headrace_quarantines_total", "Pauses that failure after failure brought")
ADAPTER_SECONDS = Histogram(
    "headrace_adapter_seconds", "Time to bring an adapter here, by step: fetch, load", ["step"], buckets=_FAST
)
ADAPTER_WAIT = Histogram(
    "headrace_adapter_wait_seconds", "Time that a request waits for its adapter and a slot", buckets=_FAST
)
ADAPTER_LOADS = Counter("headrace_adapter_loads_total", "Adapters loaded, unloaded, failed", ["outcome"])
ADAPTER_SWAPS = Counter("headrace_adapter_swaps_total", "Adapters that left a slot to another")
ADAPTER_SLOTS = Gauge("headrace_adapter_slots", "Adapters of which requests run")
ADAPTER_WAITING = Gauge("headrace_adapter_waiting", "Requests that wait for their adapter, or for a slot")
SKIPPED = Counter(
    "headrace_engine_skipped_total", "Requests that a step of the engine passed over, as for want of a slot"
)
RUNNING = Gauge("headrace_running", "Requests this worker runs")
CREDIT = Gauge("headrace_credit_requests", "Requests this worker could take now")
ENGINE = Gauge(
    "headrace_engine",
    f"The engine's own figures: {', '.join(_FIGURES)}",
    ["figure"],
)


def observe_engine(stats: EngineStats, credit: Credit) -> None:
    CREDIT.set(credit.requests)
    for figure in _FIGURES:
        ENGINE.labels(figure).set(getattr(stats, figure))
