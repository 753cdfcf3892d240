"""What the scheduler measures."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

WORKERS = Gauge("headrace_workers", "Workers whose heartbeats arrive, by base and state", ["base", "state"])
LEADER = Gauge("headrace_leader", "1 on the scheduler that leads, 0 on a standby")
LOST = Counter("headrace_workers_lost_total", "Workers that fell silent without saying goodbye")
HANDED_ON = Counter("headrace_handed_on_total", "Requests held by lost workers that were handed on at once")
QUEUED = Gauge("headrace_queued", "Requests in the queue, running ones included", ["base", "class"])
SWEPT = Counter("headrace_swept_total", "Queued requests that the scheduler ended, by reason", ["reason"])
