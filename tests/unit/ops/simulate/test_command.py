"""`headrace sim`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ops import cli

FLEET = """
duration = 2
policies = ["lanes", "fifo", "greedy"]
[[workers]]
count = 2
[[stream]]
name = "a"
rate = 20
groups = 4
prefix = 256
prompt = { mean = 50 }
output = { mean = 5 }
"""
TRACE = '\n[[trace]]\nfile = "{file}"\nformat = "burstgpt"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def test_a_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", str(file)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "policy",
        "lanes",
        "fifo",
        "greedy",
    ]


def test_json_of_one_policy_at_another_rate_with_plots(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = file.parent / "plots"
    arguments = ["sim", str(file), "--json", "--policy", "lanes", "--scale", "10", "--plots", str(folder)]
    assert cli.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["lanes"]
    assert 300 < printed["lanes"]["requests"] < 500
    assert (folder / "ttft.png").exists()


def test_a_trace_beside_a_stream(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = file.parent / "trace.jsonl"
    trace.write_text('{"Timestamp": 1, "Request tokens": 50, "Response tokens": 3}\n')
    file.write_text(FLEET + TRACE.format(file=trace))
    assert cli.main(["sim", str(file), "--json", "--policy", "fifo"]) == 0
    tenants = json.loads(capsys.readouterr().out)["fifo"]["tenants"]
    assert tenants["trace"]["requests"] == 1
    trace.write_text("{}")
    assert cli.main(["sim", str(file), "--policy", "fifo"]) == 1
    assert "trace.jsonl:1: 'Request tokens' is missing" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--policy", "best"], ["--policy", "-"]])
def test_a_policy_that_there_is_not(file: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", str(file), *flags]) == 2
    assert "policies" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "-1", "x", "nan"])
def test_a_scale_is_a_number_above_0(file: Path, scale: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sim", str(file), "--scale", scale])
