"""The settings reference in the docs says what the models say."""

from __future__ import annotations

from pathlib import Path

from ops import reference

ROOT = Path(__file__).parents[3]


def test_docs_are_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == reference.markdown() + "\n", "run `make docs`"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in reference.markdown().splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_section_and_secret_is_told() -> None:
    text = reference.markdown()
    for section in ("broker", "ingress", "worker", "vllm", "sim", "http", "scheduler"):
        assert f"## `[{section}]`" in text
    assert '| `engine` | vllm \\| sim \\| http | `"vllm"` |' in text
