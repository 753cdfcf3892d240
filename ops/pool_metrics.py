"""Prometheus metrics of an instance pool."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

MEMORY = Gauge(
    "headrace_pool_memory_bytes",
    "What a pool's engines may take together (limit), are counted with (used), and take (resident)",
    ["figure"],
)
INSTANCES = Gauge("headrace_pool_instances", "Bases of a pool by state", ["base", "state"])
ACTIONS = Counter("headrace_pool_actions", "What a pool had its engines do", ["base", "do"])
START = Gauge("headrace_pool_start_seconds", "What a base's last way to serving took", ["base", "from"])
