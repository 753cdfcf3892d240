"""Files of routes: what is read, what is refused with the place, how guesses are judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops import cli, routes_file, routes_learn
from ops.errors import RoutesError

GOOD = """
default = "a"
[[route]]
name = "x"
model = "a"
examples = ["one", "two"]
[[route]]
name = "y"
model = "b@2"
examples = ["three"]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "routes.toml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    file = routes_file.read(written(tmp_path, GOOD))
    assert [(route.name, route.model) for route in file.routes] == [("x", "a"), ("y", "b@2")]
    assert file.examples == [("one", 0), ("two", 0), ("three", 1)]
    assert file.models == ["a", "b@2"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("default =", "defualt =", "default: Field required"),
        ("default =", "margin = -1\ndefault =", "margin: Input should be greater than or equal to 0"),
        ('name = "y"', 'name = "x"', "two routes are called 'x'"),
        ('["three"]', "[]", r"route\.1\.examples: List should have at least 1 item"),
        ('["three"]', '["three"', "can't be read"),
        ('model = "a"', 'model = ""', r"route\.0\.model"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, before: str, after: str, said: str) -> None:
    with pytest.raises(RoutesError, match=said):
        routes_file.read(written(tmp_path, GOOD.replace(before, after)))


def test_one_route_is_nothing_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(RoutesError, match="at least 2 items"):
        routes_file.read(written(tmp_path, GOOD.partition('[[route]]\nname = "y"')[0]))


def test_labelled_texts_are_read_or_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text('{"route": "x", "text": "one"}\n{"text": "two"}\n')
    with pytest.raises(RoutesError, match=r"held\.jsonl:2 is no JSON object"):
        routes_file.labelled(path)
    path.write_text('{"route": "x", "text": "one"}\n')
    assert routes_file.labelled(path) == [("x", "one")]


def test_guesses_are_judged() -> None:
    meant, guessed = ["x", "x", "y"], ["x", "y", "y"]
    assert routes_file.accuracy(meant, guessed) == 2 / 3
    assert routes_file.confusion(["x", "y"], meant, guessed) == [[1, 1], [0, 1]]
    assert routes_file.matrix(["x", "y"], [[1, 1], [0, 1]]).splitlines()[1].split() == ["x", "1", "1"]


def test_eval_needs_no_broker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, GOOD))
    nowhere = ["--nats", "nats://127.0.0.1:1"]
    assert cli.main(["routes", "learn", path, "--eval", "--no-embeddings", *nowhere]) == 0
    out = capsys.readouterr().out
    assert "of 3 examples by cross-validation" in out
    assert "meant down, guessed across" in out


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RoutesError, match="holds no static model"):
        routes_learn.embeddings(tmp_path)
