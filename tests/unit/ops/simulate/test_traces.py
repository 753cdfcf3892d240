"""Recorded requests, and what is said of lines that are none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ops.errors import TraceError
from ops.simulate import traces, workload
from ops.simulate.calls import Call
from ops.simulate.fleet_file import TraceSection
from tests.unit.ops.simulate.fleets import fleet

MOONCAKE = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}
BURSTGPT = {"Timestamp": 5, "Model": "ChatGPT", "Request tokens": 472, "Response tokens": 18}


def read(
    tmp_path: Path, form: str, *lines: dict[str, Any] | str, source: int = 3, **changes: Any
) -> list[Call]:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    section = TraceSection.model_validate({"file": file, "format": form} | changes)
    return list(traces.calls(section, source, 16, 2048))


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


def test_what_is_left_out_is_in_no_cache(tmp_path: Path) -> None:
    long = MOONCAKE | {"input_length": 3000, "hash_ids": [46, 47, 48, 49, 50, 51]}
    failed = MOONCAKE | {"output_length": 0}
    first, second = read(tmp_path, "mooncake", long, failed, MOONCAKE, MOONCAKE)
    assert (first.shareable, second.shareable) == (0, 1088)


def test_traces_share_nothing_with_each_other_nor_with_streams(tmp_path: Path) -> None:
    lines = [MOONCAKE | {"hash_ids": ids} for ids in ([0, 1, 2], [2**15, 2**15 + 1, 2**15 + 2])]
    lines.append(MOONCAKE | {"hash_ids": [2**40 - 3, 2**40 - 2, 2**40 - 1]})
    one, other = (read(tmp_path, "mooncake", *lines, source=source) for source in (1, 2))
    streams = [{"name": name, "groups": 4, "prefix": 64} for name in "ab"]
    made = list(itertools.islice(workload.calls(fleet(*streams)), 100))
    apart = [
        {block for call in calls for block in call.hashes}
        for calls in (one, other, [call for call in made if call.source == 0])
    ]
    assert not any(a & b for a, b in itertools.combinations(apart, 2))
    assert len(apart[0]) == 3 * 68


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
        ("mooncake", MOONCAKE | {"hash_ids": [46, 47, -1]}, "'hash_ids' is no list"),
        ("mooncake", MOONCAKE | {"hash_ids": [46, 47, 2**40]}, "'hash_ids' is no list"),
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
