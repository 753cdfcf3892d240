"""An operator's command, as a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys

from tests.waiting import LIMIT


async def run(command: str, url: str, *arguments: str) -> tuple[int, str, str]:
    """`headrace <command> <arguments>` for the fleet at `url`: exit status, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "ops", command, *arguments, "--nats", url],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"TZ": "UTC"},
    )
    async with asyncio.timeout(LIMIT):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err, err.decode()
    return process.returncode, out.decode(), err.decode()
