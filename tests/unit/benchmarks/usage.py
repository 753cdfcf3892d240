"""A usage event of which only the times count."""

from __future__ import annotations

from benchmarks import stages
from broker.messages import Latency, UsageEvent


def event(latency: Latency) -> UsageEvent:
    return UsageEvent(
        request_id="r",
        tenant="bench",
        model="a@1",
        base="m",
        service_class="standard",
        path=stages.PATH,
        worker=stages.WORKER,
        outcome="finished",
        status=200,
        finished_ms=0,
        latency=latency,
    )
