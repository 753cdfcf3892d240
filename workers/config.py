"""Settings of one worker process."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WorkerConfig(BaseModel):
    """`[worker]`. Times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="unique in the fleet; made up when empty")
    engine: Literal["vllm", "sim", "http"] = Field(
        "vllm", description="what runs the requests; its settings are in the section of its name"
    )
    prefill_steps: float = Field(
        2.0, gt=0, description="unprefilled work taken ahead, in steps of the engine's token budget"
    )
    drain_timeout: float = Field(30.0, ge=0, description="time for running streams to finish on SIGTERM")
    heartbeat: float = Field(
        0.1,
        gt=0,
        description="interval at which the fleet is told of state and credit; a third of lost_after, at most",
    )
    max_deaths: int = Field(
        4, ge=1, description="workers or engines that may die under one request before it is buried"
    )
    max_failures: int = Field(
        5, ge=1, description="requests in a row on which the engine may fail before the worker takes a pause"
    )
    adapter_cache: str = Field(
        "", description="directory of the adapters' files; empty = adapters in the data directory"
    )
    adapter_bytes: int = Field(
        10 * 2**30, ge=2**20, description="that they may take; the least recently used ones go"
    )
    adapter_turn: float = Field(
        2.0, gt=0, description="time after which an adapter gives its slot up to others that wait"
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus; 0 picks a free one")
    metrics_host: str = Field("127.0.0.1", description="address that Prometheus is answered on")


class VllmConfig(BaseModel):
    """`[vllm]`. Whatever is not named here goes to vLLM as it stands, through `extra`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("", description="directory with the weights; empty = the demo model")
    served_name: str = Field("", description="name of the base model; empty = the directory's name")
    max_model_len: int = Field(0, ge=0, description="tokens; 0 = the model's own, on CPU at most 2048")
    max_num_seqs: int = Field(0, ge=0, description="0 = 32 on CPU, vLLM's choice on a GPU")
    max_num_batched_tokens: int = Field(0, ge=0, description="0 = 512 on CPU, vLLM's choice on a GPU")
    kv_cache_bytes: int = Field(
        0, ge=0, description="0 = 512 MiB on CPU, what gpu_memory_utilization leaves on a GPU"
    )
    block_size: int = Field(0, ge=0, description="0 = 32 on CPU, vLLM's choice on a GPU")
    enforce_eager: bool | Literal["auto"] = Field("auto", description="auto = on CPU only")
    sleep: bool = Field(
        False,
        description="on a GPU: the engine can give its memory free, and keep the weights in the machine's",
    )
    kv_events: bool = Field(
        True, description="tell the scheduler what the prefix cache takes in and evicts, as vLLM tells it"
    )
    hang_after: float = Field(
        120.0, ge=0, description="seconds without a step, with requests to run, until it is killed; 0 = never"
    )
    adapter_slots: int = Field(
        0, ge=0, description="adapters in one step, vLLM's max_loras; 0 = no adapters are served"
    )
    adapters_in_memory: int = Field(
        32, ge=0, description="adapters loaded at once; as many as adapter_slots, at least"
    )
    max_rank: int = Field(
        16, ge=1, le=512, description="largest rank of an adapter, rounded up to one that vLLM knows"
    )
    tool_call_parser: str = Field("hermes", description="empty = no automatic tool choice")
    extra: dict[str, str | int | float | bool] = Field(default={}, description="more vLLM arguments, by name")


class SimConfig(BaseModel):
    """`[sim]`: an engine without weights whose steps take `beta0 + beta1*prefill + beta2*prefill*context +
    beta3*decoded + beta4*batch` milliseconds. `prefill` counts the prompt tokens of a step, `context` those
    of their requests so far, `decoded` the KV tokens that its decodes read, `batch` its requests. A prompt of
    x tokens in one step so takes 4.21e-7 x² + 0.01518 x + 16.5 ms: the default prefill time of NVIDIA
    Dynamo's engine simulator (`PerfModel::Polynomial` in its mocker), rounded. beta3 and beta4 are not
    from there: by default a decode costs no more than the step that it is part of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("sim", description="the name it serves")
    context_tokens: int = Field(8192, ge=16, le=2**20, description="prompt and answer together, at most")
    max_num_seqs: int = Field(256, ge=1, description="requests in one step")
    max_num_batched_tokens: int = Field(2048, ge=16, description="tokens in one step")
    kv_blocks: int = Field(8192, ge=1, description="KV blocks that it has; without a free one it preempts")
    block_size: int = Field(16, ge=1, description="tokens in one KV block")
    beta0: float = Field(16.5, ge=0, description="ms a step, whatever is in it")
    beta1: float = Field(0.01518, ge=0, description="ms a prompt token")
    beta2: float = Field(4.21e-7, ge=0, description="ms a prompt token and token of its context")
    beta3: float = Field(0.0, ge=0, description="ms a KV token that a decode reads")
    beta4: float = Field(0.0, ge=0, description="ms a request in the step")
    kappa: float = Field(0.0, ge=0, description="share by which each adapter in a step makes it longer")
    adapter_slots: int = Field(8, ge=0, description="adapters in one step; 0 = it takes none")
    adapters_in_memory: int = Field(
        32, ge=0, description="adapters loaded at once; as many as adapter_slots, at least"
    )
    max_rank: int = Field(64, ge=1, description="largest rank of an adapter")
    load_ms: float = Field(0.0, ge=0, description="ms that it takes to load an adapter")
    ttft_ms: float = Field(0.0, ge=0, description="with itl_ms: each request on its own clock, no step model")
    itl_ms: float = Field(0.0, ge=0, description="ms between two tokens of a request, likewise")
    sleep: bool = Field(False, description="it can sleep, as vLLM can on a GPU")
    wake_ms: float = Field(100.0, ge=0, description="ms that it takes to wake")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        room = self.kv_blocks * self.block_size
        if self.context_tokens > room:
            raise ValueError(
                f"context_tokens={self.context_tokens} must fit into kv_blocks * block_size = {room}"
            )
        return self


class HttpConfig(BaseModel):
    """`[http]`: an OpenAI-compatible server to stand before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field("", pattern=r"^(https?://\S+)?$", description="e.g. http://127.0.0.1:30000")
    base: str = Field("", description="queue name; empty = the server's first model")
    concurrency: int = Field(64, ge=1, description="requests in flight at once")
    connect_timeout: float = Field(5.0, gt=0, description="time for the server to take a connection")
    read_timeout: float = Field(600.0, gt=0, description="silence of the server that ends a request")
    health_interval: float = Field(1.0, gt=0, description="time between two health checks")
    health_failures: int = Field(
        5, ge=1, description="health checks failed in a row after which the server counts as dead"
    )
