"""Structured logs: one JSON object a line on stderr.

    {"ts": "2026-11-23T14:55:05.602Z", "level": "info", "logger": "workers.job", "msg": "finished",
     "part": "worker", "request_id": "…", "model": "…"}

What a call passes as `extra={...}` becomes fields of its line. Nothing is ever logged per token.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import orjson

PACKAGES = ("broker", "ingress", "kvstate", "ops", "scheduler", "workers")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """`fields` stand in every line."""

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "ts": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **self._fields,
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                line.setdefault(name, value)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def configure(level: str, **fields: object) -> None:
    """Send all logs of this process to stderr as JSON: ours from `level` on, others' warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**fields))
    ours = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(ours, logging.WARNING), handlers=[handler], force=True)
    # On our own loggers, not the root: libraries set that one's level as they like (vLLM's do).
    for package in PACKAGES:
        logging.getLogger(package).setLevel(ours)
    logging.captureWarnings(True)


def hold_back_broker() -> None:
    """For a command that tells of the broker's exceptions: what its client warns of is the same."""
    logging.getLogger("broker").setLevel(logging.ERROR)
