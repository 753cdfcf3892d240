"""`docs/configuration.md`, written from the settings models: `make docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ops import schema
from ops.settings import Settings

_HEAD = """\
# Configuration

Written by `make docs` from the settings models; a test holds it to them.

Each process reads `headrace.toml` in its working directory (or `--config FILE`), then the environment,
then its flags; the later wins. `HEADRACE_INGRESS__PORT=8001`, `--set ingress.port=8001` and

    [ingress]
    port = 8001

say the same. Tables are written in JSON outside TOML: `HEADRACE_VLLM__EXTRA='{"seed": 1}'`, or one key at
a time: `HEADRACE_VLLM__EXTRA__SEED=1`. An unknown key or a bad value stops the start with exit status 2
and a message that names the key, the value and what is allowed. `headrace config` prints what is in force.

`ingress.api_keys` is a secret: it is read from `HEADRACE_INGRESS__API_KEYS` (`tenant=key,…` or JSON), or from
a file of either form that any source may name: `api_keys = "@/run/secrets/api_keys"`.
"""


def markdown() -> str:
    root = Settings.model_json_schema()
    own = [name for name, node in root["properties"].items() if "$ref" not in node]
    sections = [name for name in root["properties"] if name not in own]
    blocks = [_HEAD, "## At the top of the file", "\n".join(_table(root, (), own))]
    for name in sections:
        node = schema.at(root, (name,))
        about = re.sub(r"^`\[\w+\]`[.:] ", "", node["description"])
        blocks += [f"## `[{name}]`", about, "\n".join(_table(root, (name,), list(node["properties"])))]
    return "\n\n".join(block.strip() for block in blocks)


def _table(root: schema.Node, path: tuple[str, ...], keys: list[str]) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key in keys:
        node = schema.at(root, (*path, key))
        default = json.dumps(node["default"], ensure_ascii=False)
        cells = (f"`{key}`", schema.allowed(root, (*path, key)), f"`{default}`", node.get("description", ""))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
