"""What the documentation says of the code, held to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker import errors
from broker.messages import PATHS

ROOT = Path(__file__).parents[3]
HTTP = (ROOT / "docs/http.md").read_text()


def test_every_error_stands_with_its_status() -> None:
    told = {(int(status), code) for status, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", HTTP, re.M)}
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)} - {errors.MalformedMessage}
    assert told == {(kind.status, kind.code) for kind in kinds if issubclass(kind, errors.HeadraceError)}


def test_every_endpoint_stands_there() -> None:
    rows = "".join(line for line in HTTP.splitlines() if line.startswith("| `POST "))
    assert set(re.findall(r"`(?:POST )?(/\S+)`", rows)) == set(PATHS)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))])
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
