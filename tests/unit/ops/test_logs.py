"""The log format: one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from ops.logs import JsonFormatter


def line(record: logging.LogRecord, **fields: object) -> dict[str, Any]:
    text = JsonFormatter(**fields).format(record)
    assert "\n" not in text
    parsed = json.loads(text)
    assert isinstance(parsed, dict)
    return parsed


def record(**extra: object) -> logging.LogRecord:
    return logging.getLogger("workers.job").makeRecord(
        "workers.job", logging.INFO, "f", 1, "took %d\nms", (3,), None, extra=extra or None
    )


def test_has_time_level_logger_message_and_what_the_call_adds() -> None:
    told = line(record(request_id="r1", model="m"), part="worker")
    assert told.pop("ts").endswith("Z")
    assert told == {
        "level": "info",
        "logger": "workers.job",
        "msg": "took 3\nms",
        "part": "worker",
        "request_id": "r1",
        "model": "m",
    }


def test_extras_of_any_type_are_written() -> None:
    told = line(record(subject=ValueError("x"), counts={1: 2}))
    assert told["subject"] == "x"
    assert told["counts"] == {"1": 2}


def test_an_exception_comes_with_its_traceback() -> None:
    try:
        raise RuntimeError("engine gone")
    except RuntimeError:
        failed = record()
        failed.exc_info = sys.exc_info()
    assert "RuntimeError: engine gone" in line(failed)["error"]
