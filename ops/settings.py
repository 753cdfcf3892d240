"""All settings, read once: `headrace.toml`, then `HEADRACE_*` variables, then flags; the later wins.

The only module that reads the environment.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from broker.config import BrokerConfig
from ingress.config import IngressConfig
from ops import schema
from scheduler.config import SchedulerConfig
from scheduler.dispatch.config import DispatchConfig
from workers.config import HttpConfig, SimConfig, VllmConfig, WorkerConfig

PREFIX = "HEADRACE_"
DEFAULT_FILE = Path("headrace.toml")
# Never in the configuration file, nor in a flag, which everybody on the machine can read.
SECRET = ("ingress", "api_keys")

KeyPath = tuple[str, ...]


class SettingsError(Exception):
    """The settings can't be used; the message names each key, its value and what is allowed."""


class Settings(BaseModel):
    """The settings of one process. Relative paths start at the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Field(Path(".data"), description="directory of the queue, the demo model and the logs")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the lowest level of our own lines; libraries' start at warning"
    )
    broker: BrokerConfig = BrokerConfig()
    ingress: IngressConfig = IngressConfig()
    worker: WorkerConfig = WorkerConfig()
    vllm: VllmConfig = VllmConfig()
    sim: SimConfig = SimConfig()
    http: HttpConfig = HttpConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    dispatch: DispatchConfig = DispatchConfig()

    @model_validator(mode="after")
    def _engine_is_complete(self) -> Settings:
        if self.worker.engine == "http" and not self.http.url:
            raise ValueError("worker.engine = http needs http.url, the address of the server to stand before")
        return self


def load(
    file: Path | None = None,
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Read and check the settings. Raises SettingsError with everything that is wrong.

    Args:
        file: a TOML file that must exist; None = `headrace.toml` where there is one.
        flags: dotted key -> text, e.g. `{"ingress.port": "0"}`.
        environ: `HEADRACE_<KEY>` and `HEADRACE_<SECTION>__<KEY>` are read from it.
    """
    tree = {} if file is None and not DEFAULT_FILE.exists() else read_toml(file or DEFAULT_FILE)
    if isinstance(tree.get("ingress"), dict):
        _refuse_secret(tree["ingress"].get("api_keys"), str(file or DEFAULT_FILE))
    origins: dict[KeyPath, str] = {}
    for variable, text in environ.items():
        if variable.startswith(PREFIX):
            path = tuple(variable.removeprefix(PREFIX).lower().split("__"))
            origins[path] = variable
            _put(tree, path, text)
    for key, text in (flags or {}).items():
        path = tuple(key.split("."))
        if path[:2] == SECRET:
            _refuse_secret(text, f"--set {key}")
        origins[path] = f"--set {key}"
        _put(tree, path, text)
    try:
        _read_secret(tree)
        return Settings.model_validate(tree)
    except ValidationError as exc:
        lines = [_explain(error, origins, str(file or DEFAULT_FILE)) for error in exc.errors()]
        raise SettingsError("\n".join(lines)) from None


def read_toml(file: Path) -> dict[str, Any]:
    """Raises SettingsError when it can't be read, or is no TOML."""
    try:
        with file.open("rb") as opened:
            return tomllib.load(opened)
    except OSError as exc:
        raise SettingsError(f"{file}: {exc.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{file} is no TOML: {exc}") from None


def _put(tree: dict[str, Any], path: KeyPath, text: str) -> None:
    """Set one value. JSON where it can't be anything else: `{…}`, `[…]`, and inside a table's table."""
    value: Any = text
    if path[:2] != SECRET and (len(path) > 2 or text[:1] in ("{", "[")):
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = text
    table: Any = tree
    for key in path[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            return  # what the file has there is wrong, and the model will say so
    before = table.get(path[-1])
    table[path[-1]] = before | value if isinstance(before, dict) and isinstance(value, dict) else value


def _refuse_secret(value: object, where: str) -> None:
    if value and not (isinstance(value, str) and value.startswith("@")):
        raise SettingsError(
            f"ingress.api_keys is a secret and must not stand in {where}: set {PREFIX}INGRESS__API_KEYS, "
            'or name a file that holds the keys, as "@/path/to/keys"'
        )


def _read_secret(tree: dict[str, Any]) -> None:
    """Turn `api_keys` from text (`tenant=key,…`, JSON, or `@file` of either) into a table."""
    section = tree.get("ingress")
    text = section.get("api_keys") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(text, str):
        return
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"ingress.api_keys = {section['api_keys']}: {exc}") from None
    try:
        section["api_keys"] = orjson.loads(text) if text.lstrip().startswith("{") else dict(_pairs(text))
    except ValueError:
        raise SettingsError(
            'ingress.api_keys: write tenant=key, several by commas or lines, or {"tenant": "key"}'
        ) from None


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    for part in text.replace(",", "\n").split("\n"):
        if part.strip():
            tenant, equals, key = part.partition("=")
            if not (equals and tenant.strip() and key.strip()):
                raise ValueError
            yield tenant.strip(), key.strip()


def _explain(error: Any, origins: dict[KeyPath, str], file: str) -> str:
    """One line of SettingsError: key, value, where it came from, what is allowed."""
    path = tuple(str(part) for part in error["loc"] if part != "[key]")
    if not path:
        return str(error["ctx"]["error"])
    head = f"{'.'.join(path)}{_value(path, error['input'])} (from {_origin(path, origins) or file}): "
    root = Settings.model_json_schema()
    if error["type"] == "extra_forbidden":
        known = list(schema.at(root, path[:-1])["properties"])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{head}unknown key; {hint}Known here: {', '.join(known)}"
    return f"{head}{error['msg']}. Allowed: {schema.allowed(root, path)}"


def _value(path: KeyPath, value: object) -> str:
    """` = value`; nothing of what may hold a secret, a misspelt one included."""
    if isinstance(value, dict) or any("key" in part for part in path):
        return ""
    return f" = {orjson.dumps(value, default=str).decode()}"


def _origin(path: KeyPath, origins: dict[KeyPath, str]) -> str | None:
    for given, origin in reversed(origins.items()):
        shared = min(len(given), len(path))
        if given[:shared] == path[:shared]:
            return origin
    return None
