"""Fences that import-linter can't express: who reads the environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ingress", "broker", "workers", "scheduler", "kvstate", "ops")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
READER = ROOT / "ops/settings.py"
ENGINES = ROOT / "workers/engines"


NAMES = {"environ", "environb", "getenv", "putenv"}


def environment_uses(tree: ast.AST, may_set: bool) -> list[int]:
    """Lines that touch the environment; those that set a single variable excepted where `may_set`."""
    nodes = list(ast.walk(tree))
    setting = {
        id(node.value)
        for node in nodes
        if (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.Attribute) and node.attr == "setdefault")
    }
    uses = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr in NAMES and not (may_set and id(node) in setting)
    ]
    uses += [
        node.lineno
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and any(alias.name in NAMES for alias in node.names)
    ]
    return sorted(uses)


@pytest.mark.parametrize(
    "source", [path for path in SOURCES if path != READER], ids=lambda p: str(p.relative_to(ROOT))
)
def test_only_settings_read_the_environment(source: Path) -> None:
    tree = ast.parse(source.read_text())
    assert environment_uses(tree, may_set=ENGINES in source.parents) == [], (
        f"{source} touches the environment; read it in ops/settings.py"
    )


def test_the_fence_sees_every_way_in() -> None:
    ways = [
        "os.environ['A']",
        "os.getenv('A')",
        "os.environ.get('A')",
        "from os import environ",
        "os.environ['A'] = '1'",
        "os.environ.setdefault('A', '1')",
    ]
    tree = ast.parse("\n".join(ways))
    assert environment_uses(tree, may_set=False) == [1, 2, 3, 4, 5, 6]
    assert environment_uses(tree, may_set=True) == [1, 2, 3, 4]
