"""The log format: one JSON object a line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from ops.logs import PACKAGES, JsonFormatter


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


def test_a_library_that_sets_the_root_level_does_not_silence_us() -> None:
    code = (
        "import logging\n"
        "from ops import logs\n"
        "logs.configure('info', part='worker')\n"
        "logging.getLogger().setLevel(logging.ERROR)\n"
        "logging.getLogger('workers.job').info('ours')\n"
        "logging.getLogger('httpx').info('theirs')\n"
        "logging.getLogger('ops.up').debug('too fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert [json.loads(told)["msg"] for told in done.stderr.splitlines()] == ["ours"]


def test_every_package_of_ours_has_its_level() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert sorted(PACKAGES) == sorted(project["tool"]["importlinter"]["root_packages"])
