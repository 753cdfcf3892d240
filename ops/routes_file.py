"""A file of routes, and texts with the route that is meant: read, and judged."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from broker import routes
from ops.errors import RoutesError
from ops.routes_learn import Example

_Text = Annotated[str, Field(min_length=1)]


class _Route(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: _Text
    model: _Text
    examples: list[_Text] = Field(min_length=1)


class RoutesFile(BaseModel):
    """`routes.toml`: the routes with their examples, and what serves where none leads by `margin`."""

    model_config = ConfigDict(extra="forbid")

    default: _Text
    margin: float = Field(0.1, ge=0, le=2)
    route: list[_Route] = Field(min_length=2)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        twice = [name for name, n in Counter(each.name for each in self.route).items() if n > 1]
        if twice:
            raise ValueError(f"two routes are called {twice[0]!r}")
        return self

    @property
    def routes(self) -> list[routes.Route]:
        return [routes.Route(name=each.name, model=each.model) for each in self.route]

    @property
    def examples(self) -> list[Example]:
        return [Example(text, number) for number, each in enumerate(self.route) for text in each.examples]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys([self.default, *(each.model for each in self.route)]))


class Labelled(NamedTuple):
    route: str
    text: str


def read(path: Path) -> RoutesFile:
    """Raises RoutesError, which says where and what is wrong."""
    try:
        return RoutesFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise RoutesError(f"{path} can't be read: {exc}") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RoutesError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from exc


def labelled(path: Path) -> list[Labelled]:
    """`{"route": …, "text": …}` a line. Raises RoutesError."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise RoutesError(f"{path} can't be read: {exc}") from exc
    for number, line in enumerate(lines, 1):
        try:
            one = orjson.loads(line)
            found.append(Labelled(str(one["route"]), str(one["text"])))
        except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
            raise RoutesError(f"{path}:{number} is no JSON object with `route` and `text`") from exc
    return found


def accuracy(meant: Sequence[str], guessed: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(meant, guessed, strict=True)) / max(1, len(meant))


def confusion(names: Sequence[str], meant: Sequence[str], guessed: Sequence[str]) -> list[list[int]]:
    """Counts: a row for each meant route, a column for each guessed one, both as `names`."""
    counts = Counter(zip(meant, guessed, strict=True))
    return [[counts[row, column] for column in names] for row in names]


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The confusion as text: meant down, guessed across."""
    width = max(5, *(len(name) for name in names)) + 1
    head = " " * width + "".join(f"{name:>{width}}" for name in names)
    rows = [
        f"{name:<{width}}" + "".join(f"{n or '.':>{width}}" for n in row)
        for name, row in zip(names, counts, strict=True)
    ]
    return "\n".join([head, *rows])
