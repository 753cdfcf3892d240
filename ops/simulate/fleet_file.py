"""The file of a simulated fleet: its workers, what it is asked, and which policies dispatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from broker.messages import ServiceClass
from kvstate import prefix
from ops import schema, settings
from scheduler.config import SchedulerConfig
from scheduler.dispatch.config import DispatchConfig
from workers.config import SimConfig

PolicyName = Literal[
    "lanes",
    "fifo",
    "round_robin",
    "least_loaded",
    "consistent_hashing",
    "greedy",
    "push_fresh",
    "push_stale",
    "push_stale_blind",
]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


class WorkersSection(BaseModel):
    """`[[workers]]`: so many workers with the same engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("worker", min_length=1, description="they are called <name>-0, <name>-1, …")
    count: int = Field(ge=1, le=10_000, description="how many")
    engine: SimConfig = Field(SimConfig(), description="as `[sim]`; what is for real time alone is not used")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if prefix.BLOCK_TOKENS % self.engine.block_size:
            raise ValueError(f"engine.block_size must divide {prefix.BLOCK_TOKENS}, the tokens of a hash")
        if self.engine.max_num_seqs > self.engine.max_num_batched_tokens:
            raise ValueError("engine.max_num_seqs must not be more than engine.max_num_batched_tokens")
        return self


class NetworkSection(BaseModel):
    """`[network]`. Times in ms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    send: float = Field(0.5, ge=0, description="from the dispatcher to a worker")
    news: float = Field(1.0, ge=0, description="from a worker to the dispatcher")
    heartbeat: float = Field(100.0, gt=0, description="a worker tells its state at least so often")


class LengthsSection(BaseModel):
    """Lengths of a lognormal distribution, in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float = Field(ge=1, description="mean of the distribution")
    sigma: float = Field(0.0, ge=0, le=3, description="spread of its logarithm; 0 = all the same")
    most: int = Field(2**20, ge=1, description="longer ones are cut to this")


class Source(BaseModel):
    """What streams and traces have in common: how their requests are served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service_class: ServiceClass = Field(ServiceClass.STANDARD, alias="class", description="of its requests")
    goal_ms: float = Field(
        0.0, ge=0, description="a first token within so many ms is good; 0 = any that comes"
    )
    deadline_ms: float = Field(0.0, ge=0, description="the requests' deadline, after they come; 0 = none")
    weight: float = Field(1.0, gt=0, description="of its tenants")


class StreamSection(Source):
    """`[[stream]]`: requests that are made up. Times in seconds, lengths in tokens."""

    name: str = Field(min_length=1, description="its tenants are called <name>-0, <name>-1, …")
    rate: float = Field(gt=0, description="requests a second, on average")
    arrivals: Literal["poisson", "bursts", "diurnal"] = Field(
        "poisson", description="at an even rate, at `peak` times it by turns, or in waves up to it"
    )
    peak: float = Field(2.0, ge=1, description="highest rate of bursts and waves, as a multiple of `rate`")
    period: float = Field(10.0, gt=0, description="from one burst or wave to the next")
    burst: float = Field(0.2, gt=0, lt=1, description="share of the time that is a burst")
    tenants: int = Field(1, ge=1, description="how many")
    tenant_zipf: float = Field(0.0, ge=0, description="tenant n asks as 1/n^s; 0 = all the same")
    groups: int = Field(0, ge=0, description="prefixes that requests share; 0 = none shares one")
    zipf: float = Field(1.0, ge=0, description="prefix n is asked for as 1/n^s")
    prefix: int = Field(0, ge=0, description="tokens of each")
    adapters: int = Field(0, ge=0, description="that requests are for, <name>-0@1 and so on; 0 = the base")
    adapter_zipf: float = Field(1.0, ge=0, description="adapter n is asked for as 1/n^s")
    turns: float = Field(1.0, ge=1, description="mean number of a conversation's requests")
    think: float = Field(10.0, ge=0, description="mean time between two of them")
    prompt: LengthsSection = Field(description="what a request adds to its prefix, or its conversation")
    output: LengthsSection = Field(description="what it makes")
    max_tokens: int = Field(0, ge=0, description="the bound that requests name; 0 = none")

    def adapter(self, number: int) -> str:
        return f"{self.name}-{number}@1"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.arrivals == "bursts" and self.peak * self.burst > 1:
            raise ValueError("peak * burst must not be more than 1: the bursts alone exceed the mean rate")
        if self.arrivals == "diurnal" and self.peak > 2:
            raise ValueError("peak must not be more than 2 in waves: they would fall below nothing")
        if self.max_tokens and self.output.most > self.max_tokens:
            raise ValueError("output.most must not be more than max_tokens, the bound that requests name")
        return self


class TraceSection(Source):
    """`[[trace]]`: requests that were recorded."""

    file: Path = Field(description="one JSON object a line")
    format: Literal["mooncake", "burstgpt"]
    tenant: str = Field("trace", min_length=1, description="whose they are")
    speed: float = Field(1.0, gt=0, description="how many times as fast as recorded")


class FleetFile(BaseModel):
    """A fleet's file. Times in seconds. Relative paths start at the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(1, ge=0, description="of all that is drawn: the same file gives the same figures")
    duration: float = Field(30.0, gt=0, description="requests come for so long; then those that are left end")
    warmup: float = Field(0.0, ge=0, description="requests that come before are not counted")
    policies: Annotated[tuple[PolicyName, ...], Field(min_length=1)] = POLICIES
    workers: tuple[WorkersSection, ...] = Field(min_length=1)
    network: NetworkSection = NetworkSection()
    stream: tuple[StreamSection, ...] = ()
    trace: tuple[TraceSection, ...] = ()
    dispatch: DispatchConfig = Field(DispatchConfig(), description="`[dispatch]` of the settings")
    scheduler: SchedulerConfig = Field(SchedulerConfig(), description="`[scheduler]` of the settings")
    plan: bool = Field(
        True, description="adapters are placed by the planner; false: loaded when asked for alone"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.stream and not self.trace:
            raise ValueError("nothing is asked of it: give a [[stream]] or a [[trace]]")
        if self.warmup >= self.duration:
            raise ValueError("warmup must be less than duration")
        if len({section.engine.block_size for section in self.workers}) > 1:
            raise ValueError("engine.block_size must be the same for all workers")
        for sections in (self.workers, self.stream):
            names = [section.name for section in sections]
            if len(set(names)) < len(names):
                raise ValueError(f"a name stands there twice among {', '.join(names)}")
        if self.adapters and not any(section.engine.adapter_slots for section in self.workers):
            raise ValueError("no worker takes adapters: give one engine.adapter_slots")
        return self

    @property
    def block_size(self) -> int:
        return self.workers[0].engine.block_size

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that requests are for."""
        return tuple(each.adapter(n) for each in self.stream for n in range(each.adapters))

    @property
    def context(self) -> int:
        """Tokens of prompt and output that every worker takes."""
        return min(section.engine.context_tokens for section in self.workers)

    @property
    def sources(self) -> tuple[Source, ...]:
        """By their number in `Call.source`."""
        return (*self.stream, *self.trace)


def load(file: Path, changes: dict[str, Any] | None = None) -> FleetFile:
    """`changes` replace keys of the file. Raises SettingsError with everything that is wrong."""
    tree = settings.read_toml(file)
    try:
        return FleetFile.model_validate(tree | (changes or {}))
    except ValidationError as exc:
        raise settings.SettingsError("\n".join(_explain(error, file) for error in exc.errors())) from None


def _explain(error: Any, file: Path) -> str:
    path = [str(part) for part in error["loc"]]
    value = "" if isinstance(error["input"], dict | list) else f" = {json.dumps(error['input'], default=str)}"
    head = f"{'.'.join(path) or 'it'}{value} (from {file}): "
    if error["type"] == "extra_forbidden":
        return f"{head}unknown key"
    what = _node(FleetFile.model_json_schema(), path).get("description", "")
    return f"{head}{error['msg']}" + (f" ({what})" if what else "")


def _node(root: schema.Node, path: list[str]) -> schema.Node:
    """As `schema.at`, through the tables of a list too."""
    node = root
    for key in path:
        if key.isdigit() and "items" in node:
            node = schema.at({"properties": {key: node["items"]}, "$defs": root["$defs"]}, [key])
        else:
            node = schema.at({**node, "$defs": root["$defs"]}, [key])
    return node
