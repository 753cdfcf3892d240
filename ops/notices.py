"""What `headrace up` says of how requests are handed out: how long the steps of each pool's workers take, and
which batch request is to give way to a more urgent one."""

from __future__ import annotations

import asyncio
import logging

from pydantic import ValidationError

from broker import errors, subjects
from broker.base import Message
from broker.config import BrokerConfig
from broker.messages import Command, Dispatch, ServiceClass, Steps

logger = logging.getLogger(__name__)

_RETRY = 2.0
_MOVED = 1.5
"""Times that steps take longer, or shorter, before it is said again."""


class Notices:
    """Says what is new in messages on `dispatch` and `ctl.<worker>`."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, tuple[ServiceClass, ...]], Steps] = {}

    def on_dispatch(self, message: Message) -> None:
        try:
            told = Dispatch.model_validate_json(message.data)
        except ValidationError:
            return
        pools = {(each.base, each.classes): each for each in told.steps}
        for key, steps in pools.items():
            if _news(self._said.get(key), steps):
                self._said[key] = steps
                logger.info(
                    "%s requests: %d workers, whose steps take up to %d prompt tokens and %.1f ms",
                    ", ".join(steps.classes),
                    steps.workers,
                    steps.tokens,
                    steps.ms,
                    extra={"base": steps.base},
                )
        if pools:
            self._said = {key: steps for key, steps in self._said.items() if key in pools}

    def on_command(self, message: Message) -> None:
        try:
            command = Command.model_validate_json(message.data)
        except ValidationError:
            return
        if command.do == "preempt":
            worker = message.subject.partition(".")[2]
            told = {"request": command.request, "worker": subjects.name(worker)}
            logger.info("a batch request is to give way, and to go on later: %s", command.reason, extra=told)


def _news(before: Steps | None, now: Steps) -> bool:
    if before is None or (before.workers, before.tokens) != (now.workers, now.tokens):
        return True
    return not before.ms / _MOVED <= now.ms <= before.ms * _MOVED


async def follow(config: BrokerConfig) -> None:
    """For ever."""
    from broker import client  # loads nats-py: only once the fleet serves

    notices = Notices()
    while True:
        try:
            async with await client.connect(config, "headrace up", make_streams=False) as broker:
                await broker.subscribe(subjects.DISPATCH, notices.on_dispatch)
                await broker.subscribe(subjects.ALL_COMMANDS, notices.on_command)
                await asyncio.Future()
        except errors.Unavailable as exc:
            logger.warning("what the scheduler does is not heard: %s", exc.message)
            await asyncio.sleep(_RETRY)
