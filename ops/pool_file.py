"""The file of an instance pool: which bases a host may run, and within what memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from broker.messages import ModelCard
from ops import schema, settings
from workers.pool import Policy

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_WEIGHT_FACTOR = 1.2
_CPU_KV = 512 * 2**20
_OURS = ("worker.name", "worker.engine", "worker.metrics_port", "vllm.model", "vllm.served_name", "sim.model")
_TEXT_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
_SIM_PATHS = (*_TEXT_PATHS[:4], "/tokenize")
"""What a base answers, as far as is known before it was started for the first time."""


class PoolSection(BaseModel):
    """`[pool]`. Times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="unique in the fleet; empty = pool-<host>")
    memory: ByteSize = Field(
        description='of the accelerator, or of the machine on CPU, for all engines together, e.g. "12GiB"'
    )
    sleep_memory: ByteSize = Field(
        ByteSize(0), description="of the machine, for weights of engines that sleep; 0 = none sleeps"
    )
    dwell: float = Field(10.0, ge=0, description="a busy base keeps its place at least so long")
    turn_factor: float = Field(10.0, ge=0, description="and at least so many times what its start took")
    starve_after: float = Field(15.0, ge=0, description="a busy base makes room for one that waited so long")
    linger: float = Field(1.0, ge=0, description="an idle base makes room after so long")
    idle_least: float = Field(30.0, ge=0, description="without need for room a base idles at least so long")
    idle_factor: float = Field(
        1.0, ge=0, description="and at least so many times what bringing it back takes"
    )
    start_limit: float = Field(900.0, gt=0, description="a start or a wake that takes longer has failed")
    hung_after: float = Field(
        30.0, gt=0, description="an engine of the pool that gives no heartbeat for so long is killed"
    )
    poll: float = Field(0.25, gt=0, description="interval of the look at the queues")
    lost_after: float = Field(1.0, gt=0, description="a worker without heartbeat for so long serves nothing")

    def policy(self) -> Policy:
        return Policy(
            memory=self.memory,
            sleep_memory=self.sleep_memory,
            dwell=self.dwell,
            turn_factor=self.turn_factor,
            starve_after=self.starve_after,
            linger=self.linger,
            idle_least=self.idle_least,
            idle_factor=self.idle_factor,
        )


class BaseSection(BaseModel):
    """`[[base]]`: a base that the pool may run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="the model's name, by which it is asked for")
    engine: Literal["vllm", "sim"] = "vllm"
    model: str = Field("", description="directory with the weights; empty = the demo model")
    hot_bytes: ByteSize = Field(
        ByteSize(0), description="memory that it takes while it serves; 0 = weights * 1.2 and KV cache"
    )
    warm_bytes: ByteSize = Field(ByteSize(0), description="what it keeps of that while it sleeps")
    sleep_bytes: ByteSize = Field(
        ByteSize(0), description="of sleep_memory while it sleeps; 0 = as its weights' files"
    )
    keep: bool = Field(False, description="keep it hot always")
    start_seconds: float = Field(0.0, ge=0, description="guess until a start was measured; 0 = 20 s, sim 1 s")
    paths: tuple[str, ...] = Field((), description="API paths; empty = those for text, until it has served")
    settings: dict[str, str | int | float | bool] = Field(
        default={}, description="settings of its worker, by dotted key"
    )


class PoolFile(BaseModel):
    """A pool's file. Relative paths start at the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: PoolSection
    base: tuple[BaseSection, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Base:
    """A base, measured. `settings` are those of its worker, by dotted key; `given` are the fields of `card`
    that the file or a setting states, so that nothing a worker once announced is truer."""

    name: str
    hot: int
    warm: int
    asleep: int
    can_sleep: bool
    keep: bool
    start: float
    card: ModelCard
    settings: dict[str, str]
    given: tuple[str, ...] = ()

    def known(self, remembered: ModelCard | None) -> ModelCard:
        """Its card, with what the fleet remembers of it where nothing is given."""
        if remembered is None:
            return self.card
        return remembered.model_copy(update={field: getattr(self.card, field) for field in self.given})


def load(file: Path) -> PoolFile:
    """Raises SettingsError with everything that is wrong: key, value, what is allowed."""
    tree = settings.read_toml(file)
    try:
        loaded = PoolFile.model_validate(tree)
    except ValidationError as exc:
        raise settings.SettingsError("\n".join(_explain(error, file) for error in exc.errors())) from None
    names = [base.name for base in loaded.base]
    if twice := {name for name in names if names.count(name) > 1}:
        raise settings.SettingsError(
            f"base.name (from {file}): {', '.join(sorted(twice))} stands there twice"
        )
    for base in loaded.base:
        for key in base.settings:
            if key in _OURS or key.startswith("broker."):
                raise settings.SettingsError(
                    f"base {base.name}: settings.{key} (from {file}): the pool sets it itself; leave it out"
                )
    return loaded


def bases(loaded: PoolFile, config: Path | None, flags: Mapping[str, str]) -> list[Base]:
    """Each base with its sizes. `config` and `flags` are the settings of all, as in `settings.load`.

    Raises SettingsError where a setting is wrong, or a base does not fit.
    """
    found = [_base(section, config, flags) for section in loaded.base]
    memory = loaded.pool.memory
    kept = sum(base.hot for base in found if base.keep)
    for base in found:
        beside = 0 if base.keep else kept
        if base.hot + beside > memory:
            others = f" beside {beside} of those that are kept" if beside else ""
            raise settings.SettingsError(
                f"base {base.name}: it takes {base.hot} bytes{others}, and pool.memory = {memory}: it would "
                "never be started. Allow more, or give it less (hot_bytes, vllm.kv_cache_bytes)"
            )
    if kept > memory:
        raise settings.SettingsError(f"the bases that are kept take {kept} bytes, pool.memory = {memory}")
    return found


def _base(section: BaseSection, config: Path | None, flags: Mapping[str, str]) -> Base:
    own = {key: _text(value) for key, value in section.settings.items()} | {"worker.engine": section.engine}
    try:
        its = settings.load(config, {**flags, **own})
    except settings.SettingsError as exc:
        raise settings.SettingsError(f"base {section.name}: {exc}") from None
    match section.engine:
        case "sim":
            return _sim(section, its, own)
        case "vllm":
            return _vllm(section, its, own)


def _vllm(section: BaseSection, its: settings.Settings, own: dict[str, str]) -> Base:
    directory = Path(section.model or _demo(its))
    config = directory / "config.json"
    if not config.is_file():
        raise settings.SettingsError(
            f"base {section.name}: model = {section.model!r} is no directory with a model in it"
        )
    weights = _size(directory)
    context = its.vllm.max_model_len or json.loads(config.read_bytes()).get("max_position_embeddings") or 0
    return Base(
        name=section.name,
        hot=section.hot_bytes or round(_WEIGHT_FACTOR * weights) + (its.vllm.kv_cache_bytes or _CPU_KV),
        warm=section.warm_bytes,
        asleep=section.sleep_bytes or weights,
        can_sleep=its.vllm.sleep,
        keep=section.keep,
        start=section.start_seconds or 20.0,
        card=_card(section, int(context), _TEXT_PATHS),
        settings=own | {"vllm.model": str(directory), "vllm.served_name": section.name},
        given=_given(section, bool(its.vllm.max_model_len)),
    )


def _sim(section: BaseSection, its: settings.Settings, own: dict[str, str]) -> Base:
    if not section.hot_bytes:
        raise settings.SettingsError(
            f"base {section.name}: a sim engine has no weights to measure: give it hot_bytes"
        )
    return Base(
        name=section.name,
        hot=section.hot_bytes,
        warm=section.warm_bytes,
        asleep=section.sleep_bytes or section.hot_bytes,
        can_sleep=its.sim.sleep,
        keep=section.keep,
        start=section.start_seconds or 1.0,
        card=_card(section, its.sim.context_tokens, _SIM_PATHS),
        settings=own | {"sim.model": section.name},
        given=_given(section, context=True),
    )


def _card(section: BaseSection, context: int, paths: tuple[str, ...]) -> ModelCard:
    return ModelCard(id=section.name, base=section.name, context_tokens=context, paths=section.paths or paths)


def _given(section: BaseSection, context: bool) -> tuple[str, ...]:
    return (*(["context_tokens"] if context else []), *(["paths"] if section.paths else []))


def _demo(its: settings.Settings) -> str:
    from ops import demo_model

    return str(demo_model.ensure(its.data, progress=True))


def _size(directory: Path) -> int:
    """Bytes of the weights; formats beside each other are counted once."""
    for pattern in _WEIGHTS:
        if size := sum(file.stat().st_size for file in directory.glob(pattern)):
            return size
    raise settings.SettingsError(
        f"{directory}: no weights ({', '.join(_WEIGHTS)}) are there to measure: give hot_bytes"
    )


def _text(value: str | int | float | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _explain(error: Any, file: Path) -> str:
    path = [str(part) for part in error["loc"]]
    section: type[BaseModel] = PoolFile
    rest = path
    if len(path) > 1 and path[0] == "pool":
        section, rest = PoolSection, path[1:]
    elif len(path) > 2 and path[0] == "base":
        section, rest = BaseSection, path[2:]
    value = "" if isinstance(error["input"], dict | list) else f" = {json.dumps(error['input'], default=str)}"
    head = f"{'.'.join(path)}{value} (from {file}): "
    known = section.model_json_schema()
    if error["type"] == "extra_forbidden":
        return f"{head}unknown key. Known here: {', '.join(known['properties'])}"
    node = schema.at(known, rest) if rest else {}
    what = node.get("description", "")
    return f"{head}{error['msg']}" + (f" ({what})" if what else "")
