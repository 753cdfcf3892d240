"""`headrace explain`: how long a request waited, which worker got it, and how that one stood beside them."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import orjson

from broker import base, client, errors, subjects
from broker.config import BrokerConfig
from ops import logs
from ops.letters import plain, table

_NOBODY = "no scheduler answered: none leads, or its workers pull by themselves"


def run(args: argparse.Namespace, config: BrokerConfig) -> int:
    """The exit status, 0. Raises errors.NotFound, errors.Unavailable."""
    logs.hold_back_broker()
    told = asyncio.run(_ask(args, config))
    print(orjson.dumps(told).decode() if args.json else shown(args.request, told))
    return 0


async def _ask(args: argparse.Namespace, config: BrokerConfig) -> dict[str, Any]:
    async with await client.connect(config, "headrace explain", make_streams=False) as broker:
        return await ask(broker, args.request, args.tenant)


async def ask(broker: base.Broker, request: str, tenant: str | None) -> dict[str, Any]:
    """What the dispatcher knows of a request. Raises errors.NotFound, errors.Unavailable."""
    named = (request,) if tenant is None else (tenant, request)
    key = ".".join(map(subjects.token, named))
    try:
        told = orjson.loads(await broker.ask(subjects.EXPLAIN, key.encode()))
    except errors.Unavailable as exc:
        raise errors.Unavailable(f"{_NOBODY} ({exc.message})") from exc
    if told is None:
        raise errors.NotFound(
            f"the dispatcher knows no request {request!r}: it remembers the last ones that it handed out, "
            "and none from before it led"
        )
    return dict(told)


def shown(request: str, told: dict[str, Any]) -> str:
    """In words, with the workers that were compared, best first."""
    where = f" to {plain(told['worker'])}" if told["worker"] else ""
    lines = [
        f"{plain(request)} of {plain(told['tenant'])}, {told['service_class']}, for {plain(told['model'])}",
        f"{told['outcome']}{where} after {1000 * told['queue_s']:.1f} ms in the queue, "
        f"its first token expected in {1000 * told['predicted_ttft_s']:.1f} ms",
        f"because {plain(told['why'])}",
    ]
    lines += [f"taken back from {plain(worker)}: {plain(why)}" for worker, why in told["taken_back"]]
    if told["step_tokens"]:
        steps = f"at most {told['step_tokens']} prompt tokens and {1000 * told['step_s']:.1f} ms"
        lines.append(f"a step of its class's workers takes {steps}")
    if told["candidates"]:
        head = ("WORKER", "SCORE", "PENDING", "BACKLOG", "UNCACHED", "LOAD")
        rows = [
            (plain(each["worker"]), *(f"{each[part.lower()]:.0f}" for part in head[1:]))
            for each in told["candidates"]
        ]
        lines += ["", table(head, rows)]
    return "\n".join(lines)
