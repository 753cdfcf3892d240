"""A fleet's file: the example can be read, and what is wrong with others is said."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ops.settings import SettingsError
from ops.simulate import fleet_file
from ops.simulate.fleet_file import POLICIES

EXAMPLE = Path(__file__).parents[4] / "examples/fleet.toml"

GOOD = """
[[workers]]
count = 2
[[stream]]
name = "a"
rate = 5
prompt = { mean = 10 }
output = { mean = 10 }
"""


def load(tmp_path: Path, text: str) -> fleet_file.FleetFile:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    return fleet_file.load(file)


def test_the_example() -> None:
    fleet = fleet_file.load(EXAMPLE)
    assert sum(section.count for section in fleet.workers) == 24
    assert fleet.stream[0].rate == 950
    assert fleet.policies == POLICIES


@pytest.mark.parametrize("name", ["fleet", "tunes"])
def test_every_key_of_the_examples_is_explained_in_the_docs(name: str) -> None:
    page = (EXAMPLE.parents[1] / "docs/simulator.md").read_text()
    tree = tomllib.loads(EXAMPLE.with_stem(name).read_text())
    fleet_file.load(EXAMPLE.with_stem(name))
    keys = {*tree, *tree["workers"][0], *tree["stream"][0]}
    assert {key for key in keys if f"`{key}" not in page and f"[{key}]" not in page} == set()


def test_changes_replace_what_the_file_has() -> None:
    assert fleet_file.load(EXAMPLE, {"policies": ["fifo"]}).policies == ("fifo",)


def test_defaults(tmp_path: Path) -> None:
    fleet = load(tmp_path, GOOD)
    assert (fleet.block_size, fleet.context, fleet.network.news) == (16, 8192, 1.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[workers]", "is no TOML"),
        ("[[workers]]\ncount = 1", "nothing is asked of it"),
        (GOOD.replace("count = 2", "count = 0"), "workers.0.count = 0"),
        (GOOD.replace("rate = 5", "rate = 0"), "(requests a second, on average)"),
        (GOOD.replace("rate", "speed"), "stream.0.speed = 5"),
        (GOOD + "sigma = 1", "stream.0.sigma = 1"),
        ("warmup = 30\n" + GOOD, "warmup must be less than duration"),
        ('policies = ["best"]\n' + GOOD, 'policies.0 = "best"'),
        ("policies = []\n" + GOOD, "policies"),
        (GOOD + GOOD.partition("2\n")[2], "a name stands there twice"),
        (GOOD.replace("count = 2", "count = 2\nengine = { block_size = 24 }"), "must divide 128"),
        (
            GOOD.replace("count = 2", "count = 2\nengine = { max_num_batched_tokens = 64 }"),
            "must not be more than engine.max_num_batched_tokens",
        ),
        (
            GOOD + '[[workers]]\nname = "b"\ncount = 1\nengine = { block_size = 32 }',
            "engine.block_size must be the same",
        ),
        (GOOD + 'arrivals = "bursts"\npeak = 9', "peak * burst must not be more than 1"),
        (GOOD + 'arrivals = "diurnal"\npeak = 3', "peak must not be more than 2"),
        (GOOD + "max_tokens = 5", "output.most must not be more than max_tokens"),
        (GOOD + "[dispatch]\nnosuch = 1", "dispatch.nosuch = 1"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(tmp_path, text)
    assert says in str(raised.value)
    assert str(tmp_path / "fleet.toml") in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        fleet_file.load(tmp_path / "none.toml")
