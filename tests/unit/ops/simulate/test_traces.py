"""Recorded requests, and what is said of lines that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ops.errors import TraceError
from ops.simulate import traces
from ops.simulate.calls import Call
from ops.simulate.fleet_file import TraceSection

MOONCAKE = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}
BURSTGPT = {"Timestamp": 5, "Model": "ChatGPT", "Request tokens": 472, "Response tokens": 18}


def read(tmp_path: Path, form: str, *lines: dict[str, Any] | str, **changes: Any) -> list[Call]:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    section = TraceSection.model_validate({"file": file, "format": form} | changes)
    return list(traces.calls(section, 3, 16, 2048))


def test_mooncake(tmp_path: Path) -> None:
    again = MOONCAKE | {"timestamp": 28482, "input_length": 1200, "hash_ids": [46, 47, 99]}
    first, second = read(tmp_path, "mooncake", MOONCAKE, "", again, tenant="t")
    assert (first.at, first.source, first.tenant, first.prompt, first.output) == (0.0, 3, "t", 1100, 52)
    assert (len(first.hashes), first.shareable) == (68, 0)
    assert second.at == 1.0
    assert second.hashes[:64] == first.hashes[:64]
    assert not set(second.hashes[64:]) & set(first.hashes)
    assert second.shareable == 1024


def test_a_repeated_prompt_shares_all_but_its_last_token(tmp_path: Path) -> None:
    whole = MOONCAKE | {"input_length": 1024, "hash_ids": [1, 2]}
    _, second = read(tmp_path, "mooncake", whole, whole)
    assert second.shareable == 1008


def test_burstgpt(tmp_path: Path) -> None:
    failed = BURSTGPT | {"Timestamp": 6, "Response tokens": 0}
    later = BURSTGPT | {"Timestamp": 9.5}
    first, second = read(tmp_path, "burstgpt", BURSTGPT, failed, later, speed=2.0)
    assert (first.at, first.prompt, first.output, first.hashes) == (0.0, 472, 18, ())
    assert second.at == 2.25


def test_what_no_engine_takes_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, "burstgpt", BURSTGPT | {"Request tokens": 2040}) == []


@pytest.mark.parametrize(
    ("form", "line", "says"),
    [
        ("mooncake", "{", "unexpected end of data"),
        ("mooncake", "[1]", "no JSON object"),
        ("mooncake", BURSTGPT, "'input_length' is missing"),
        ("mooncake", MOONCAKE | {"input_length": 0}, "'input_length' is 0"),
        ("mooncake", MOONCAKE | {"input_length": "9"}, "'input_length' is '9'"),
        ("mooncake", MOONCAKE | {"output_length": -1}, "'output_length' is -1"),
        ("mooncake", MOONCAKE | {"hash_ids": "46"}, "'hash_ids' is no list"),
        ("mooncake", MOONCAKE | {"hash_ids": [46]}, "'hash_ids' has 1 of 3"),
        ("mooncake", MOONCAKE | {"timestamp": None}, "'timestamp' is None"),
        ("mooncake", MOONCAKE | {"timestamp": 1}, "comes before the line above"),
        ("burstgpt", MOONCAKE, "'Request tokens' is missing"),
        ("burstgpt", BURSTGPT | {"Response tokens": True}, "'Response tokens' is True"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, form: str, line: dict[str, Any] | str, says: str) -> None:
    good = MOONCAKE if form == "mooncake" else BURSTGPT
    with pytest.raises(TraceError) as raised:
        read(tmp_path, form, good, line)
    assert str(raised.value).startswith(f"{tmp_path / 'trace.jsonl'}:2: ")
    assert says in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    section = TraceSection.model_validate({"file": tmp_path / "none", "format": "burstgpt"})
    with pytest.raises(TraceError, match="can't be read: No such file"):
        list(traces.calls(section, 0, 16, 2048))
