"""The page of all benchmarks."""

from __future__ import annotations

from benchmarks import report


def test_sections_of_a_page_can_be_put_together_again() -> None:
    page = (report.DOCS / "benchmarks.md").read_text()
    found = report.sections(page)
    assert {"Added latency", "Journal and recovery"} <= found.keys()
    head = page[: page.index("## ")]
    assert "\n".join([head.rstrip("\n") + "\n", *found.values()]) == page
