"""A settings model's JSON schema, put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Node = Mapping[str, Any]


def at(root: Node, path: Sequence[str]) -> Node:
    """The node of one setting; of the table it is in, where that table's keys are free."""
    node = root
    for key in path:
        properties = node.get("properties", {})
        if key not in properties:
            break
        node = properties[key]
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def allowed(root: Node, path: Sequence[str]) -> str:
    """What may stand at `path`."""
    return _words(at(root, path))


def _words(node: Node) -> str:
    if "enum" in node:
        return " | ".join(map(str, node["enum"]))
    if "const" in node:
        return str(node["const"])
    if "anyOf" in node:
        return " or ".join(_words(option) for option in node["anyOf"])
    if node.get("format") == "path":
        return "path"
    kind = str(node["type"])
    if kind == "object":
        values = node.get("additionalProperties")
        if not isinstance(values, dict):
            return "table"
        return "table of tables" if "$ref" in values else f"table of {_words(values)}"
    return " ".join([kind, _range(node)]).strip()


def _range(node: Node) -> str:
    if "minimum" in node and "maximum" in node:
        return f"{node['minimum']} to {node['maximum']}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {node[name]}" for name, sign in limits.items() if name in node)
