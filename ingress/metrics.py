"""What one ingress measures. Label children are looked up once a request, never once a token."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LABELS = ["model", "class"]

REQUESTS = Counter("headrace_requests_total", "HTTP requests answered", ["path", "status"])
STREAMS = Gauge("headrace_ingress_streams", "Requests open in this ingress")
ADMIT = Histogram(
    "headrace_ingress_admit_seconds", "Request line read until published to the queue", buckets=_BUCKETS
)
PUBLISH = Histogram("headrace_publish_ack_seconds", "Published until durable in the queue", buckets=_BUCKETS)
TTFT = Histogram(
    "headrace_ttft_seconds", "Request line read until the first payload went out", _LABELS, buckets=_BUCKETS
)
FRAME = Histogram(
    "headrace_frame_seconds", "A head or end frame on its way from worker to ingress", buckets=_BUCKETS
)
TOTAL = Histogram(
    "headrace_request_seconds",
    "Request line read until the answer was complete",
    [*_LABELS, "outcome"],
    buckets=_BUCKETS,
)
CANCEL = Histogram(
    "headrace_cancel_seconds",
    "Client's disconnect until the worker confirmed the engine's abort",
    buckets=_BUCKETS,
)
KEEPALIVES = Counter("headrace_sse_comments_total", "SSE keep-alive comments sent")
ROUTED = Counter(
    "headrace_routed_total",
    "Requests that another model served than the one they named, or that a choice was made for",
    ["asked", "model"],
)
