"""A worker's sleep: `ctl.<worker>` tells it to give its memory free, and to serve again.

While it sleeps it asks for no work and goes on telling the fleet that it is there. What it was told last
counts: one that is woken while it falls asleep wakes as soon as it sleeps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from broker.messages import Answer, Command
from workers.engines.base import Engine

_log = logging.getLogger(__name__)


class Rest:
    """Carries out the commands `sleep` and `wake`, which `Control` takes.

    Args:
        rest: drains the worker and has its engine sleep.
        rise: the opposite.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        rest: Callable[[], Awaitable[None]],
        rise: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._name = name
        self._rest = rest
        self._rise = rise
        self._to_sleep = False  # what it was told last
        self._told = asyncio.Event()

    async def run(self) -> None:
        """Do what is told, until cancelled. Raises what the engine raises: it is no use then."""
        asleep = False
        while True:
            await self._told.wait()
            self._told.clear()
            if self._to_sleep and not asleep:
                await self._rest()
            elif asleep and not self._to_sleep:
                await self._rise()
            else:
                continue
            asleep = not asleep
            _log.info("asleep" if asleep else "awake", extra={"worker": self._name})
            self._told.set()  # it may have been told otherwise meanwhile

    def obey(self, command: Command) -> Answer:
        """Take `sleep` or `wake` on; `run` does it."""
        if command.do == "sleep" and not self._engine.can_sleep:
            return Answer(ok=False, message=f"the engine {self._engine.name} can't sleep as it was started")
        self._to_sleep = command.do == "sleep"
        self._told.set()
        return Answer(ok=True)
