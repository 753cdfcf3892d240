"""The command line: flags to settings, exit statuses, and what a command loads."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ops import cli, logs


def headrace(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environ,
    )


def test_flags_are_settings() -> None:
    done = headrace("config", "--set", "ingress.port=1", "--log-level", "debug")
    loaded = json.loads(done.stdout)
    assert (loaded["ingress"]["port"], loaded["log_level"]) == (1, "debug")


def test_a_wrong_setting_is_one_message_and_status_2() -> None:
    done = headrace("worker", "--engine", "tpu")
    assert done.returncode == 2
    assert 'worker.engine = "tpu"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nosuch"],
        ["up", "--workers", "0"],
        ["up", "--workers", "many"],
        ["up", "--nats-port", "-1"],
        ["up", "--nats-port", "65536"],
        ["config", "--set", "x"],
    ],
)
def test_wrong_flags_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.parser().parse_args(arguments)
    assert raised.value.code == 2


def test_a_service_without_broker_fails_with_a_json_line() -> None:
    done = headrace("scheduler", "--nats", "nats://127.0.0.1:1", "--set", "broker.timeout=0.2")
    assert done.returncode == 1
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["level"] == "error"
    assert told["part"] == "scheduler"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("part", "setting", "named"),
    [
        ("ingress", "ingress.port", "--port"),
        ("sim-engine", "ingress.port", "--port"),
        ("worker", "worker.metrics_port", "worker.metrics_port"),
        ("scheduler", "scheduler.metrics_port", "scheduler.metrics_port"),
    ],
)
def test_a_taken_port_is_told_at_once_in_one_line(part: str, setting: str, named: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = headrace(part, "--set", f"{setting}={port}", "--set", "worker.engine=sim")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["msg"] == (
        f"{part} failed: port {port} on 127.0.0.1 can't be used (Address already in use): "
        f"name another with {named}, 0 = a free one"
    )


@pytest.mark.parametrize("command", [["demo-model"], ["up", "--engine", "vllm"]])
def test_a_demo_model_out_of_reach_is_told_without_a_traceback(tmp_path: Path, command: list[str]) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:1/", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = headrace(*command, "--data", str(tmp_path), **nowhere)
    assert done.returncode == 1
    assert f"headrace {command[0]}: pip could not fetch" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_library_that_vllm_misses_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.setattr(logs, "configure", lambda level, **fields: None)
    assert cli.main(["up", "--engine", "vllm"]) == 1
    assert "Debian: libnuma1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "never"),
    [
        ("import ops.cli", ["pydantic", "asyncio", "nats"]),
        (
            "from workers.engines import sim; from workers import runner; from ops import parts",
            ["torch", "vllm"],
        ),
        ("from ops import up", ["torch", "vllm", "nats", "httpx"]),
    ],
)
def test_commands_load_only_what_they_run(command: str, never: list[str]) -> None:
    code = f"{command}\nimport sys\nprint([name for name in {never} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_service_is_a_part() -> None:
    from ops import parts

    for name, handler in cli._COMMANDS.items():
        if handler is cli._service:
            assert callable(getattr(parts, name.replace("-", "_")))


def test_the_reference_command_prints_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--markdown"]) == 0
    docs = Path(__file__).parents[3] / "docs/configuration.md"
    assert capsys.readouterr().out == docs.read_text()
