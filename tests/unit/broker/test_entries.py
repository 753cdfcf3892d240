"""The catalogue's entries: what is taken for one, and under which name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import ValidationError

from broker import entries, errors, subjects
from broker.entries import File, ModelEntry, Version
from broker.memory import MemoryBroker
from tests.waiting import until

VERSION = Version(number=1, digest="sha256:d", rank=8)


def entry(name: str = "ada", **more: Any) -> ModelEntry:
    facts: dict[str, Any] = {"kind": "adapter", "base": "llama", "current": 1, "versions": (VERSION,)}
    return ModelEntry(name=name, **(facts | more))


@pytest.mark.parametrize(
    ("made", "field", "value"),
    [
        (File(name="a", size=1, digest="d", object="o"), "size", -1),
        (File(name="a", size=1, digest="d", object="o"), "name", "a" * 256),
        (File(name="a", size=1, digest="d", object="o"), "digest", "a" * 256),
        (File(name="a", size=1, digest="d", object="o"), "object", "a" * 1001),
        (VERSION, "size", -1),
        (VERSION, "rank", 0),
        (VERSION, "digest", "a" * 256),
        (entry(), "name", "\N{SNOWMAN}" * 86),
        (entry(), "base", "b" * 257),
        (entry(kind="alias", base="", versions=()), "base", "b" * 257),
        (entry(kind="alias", base="", versions=()), "targets", [{"model": ""}]),
    ],
)
def test_what_would_break_others_is_no_entry(
    made: File | Version | ModelEntry, field: str, value: Any
) -> None:
    with pytest.raises(ValidationError):
        type(made).model_validate({**made.model_dump(), field: value})


def test_a_name_fills_its_bound_and_three_of_them_fit_a_subject() -> None:
    longest = "\N{SNOWMAN}" * 85 + "x"
    assert len(longest.encode()) == subjects.MAX_NAME
    assert entry(longest, base=longest).base == longest
    worst = subjects.RequestSubject(longest, "interactive", longest, longest)
    assert len(str(worst)) <= subjects.MAX


async def test_the_key_is_the_name_whatever_the_entry_says() -> None:
    broker = MemoryBroker()
    known = entries.Entries(broker)
    watching = await known.watch()
    data = entry("bob").model_dump_json().encode()
    await broker.put(subjects.KV_CATALOGUE, subjects.token("ada"), data)
    await until(lambda: known.entries == {"ada": entry("ada")})
    assert await entries.read(broker, "ada") == entry("ada")
    assert (await entries.read_all(broker))[0] == {"ada": entry("ada")}
    await watching.close()


async def test_an_entry_whose_key_is_no_name_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    broker = MemoryBroker()
    known = entries.Entries(broker)
    watching = await known.watch()
    with caplog.at_level(logging.WARNING):
        await broker.put(subjects.KV_CATALOGUE, "b" * 400, entry().model_dump_json().encode())
    await until(lambda: "at most 256 bytes" in caplog.text)
    assert known.entries == {}
    with pytest.raises(errors.MalformedMessage):
        await entries.read(broker, "b" * 400)
    await watching.close()
