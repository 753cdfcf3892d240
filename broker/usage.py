"""One usage event a request, whoever ends it: the worker that ran it, or who stopped it in the queue."""

from __future__ import annotations

from broker import base, errors, replies, subjects
from broker.messages import LAST_EPOCH, OUTCOME, Latency, Request, UsageEvent


async def publish(broker: base.Broker, event: UsageEvent, seq: int) -> None:
    """`seq`: the request's in REQUESTS. USAGE drops a second event of the same one."""
    subject = subjects.usage(event.tenant, event.model)
    headers = {subjects.MSG_ID: subjects.usage_id(event.tenant, event.request_id, seq)}
    await broker.publish(subject, event.model_dump_json().encode(), headers)


async def unrun(broker: base.Broker, request: Request, fault: errors.HeadraceError, seq: int) -> None:
    """What is told of a request that was deleted from the queue: its end, to all who follow it, and its
    usage event."""
    await replies.Writer(broker, request.reply_to, LAST_EPOCH, seq).error(fault)
    await publish(broker, event(request, fault, "", broker.now_ms()), seq)


def failed(event: UsageEvent, status: int, code: str) -> UsageEvent:
    """The event of a request whose `error` frame says so. Raises TypeError, ValueError for no such."""
    ended: OUTCOME = "cancelled" if code == errors.Cancelled.code else "failed"
    return event.model_copy(update={"outcome": ended, "status": int(status), "code": str(code)})


def outcome(fault: errors.HeadraceError | None, status: int) -> OUTCOME:
    if isinstance(fault, errors.Cancelled):
        return "cancelled"
    return "failed" if fault is not None or status >= 400 else "finished"


def event(
    request: Request,
    fault: errors.HeadraceError | None,
    worker: str,
    finished_ms: float,
    *,
    status: int = 0,
    epoch: int = 1,
    gpu_seconds: float = 0.0,
    latency: Latency | None = None,
    prompt_tokens: int = 0,
    cached_tokens: int = 0,
    completion_tokens: int = 0,
) -> UsageEvent:
    subject = request.subject
    return UsageEvent(
        request_id=request.request_id,
        tenant=subject.tenant,
        model=subject.model,
        asked=request.asked,
        base=subject.base,
        service_class=subject.service_class,
        path=request.path,
        worker=worker,
        outcome=outcome(fault, status),
        status=fault.status if fault is not None else status,
        code=fault.code if fault is not None else "",
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        gpu_seconds=gpu_seconds,
        epoch=epoch,
        finished_ms=int(finished_ms),
        latency=latency or Latency(),
    )
