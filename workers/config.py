"""Settings of one worker process."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WorkerConfig(BaseModel):
    """`[worker]`. Times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="unique in the fleet; made up when empty")
    engine: Literal["vllm", "sim", "http"] = "vllm"
    prefill_steps: float = Field(
        2.0, gt=0, description="unprefilled work taken ahead, in steps of the engine's token budget"
    )
    drain_timeout: float = Field(30.0, ge=0, description="time for running streams to finish on SIGTERM")
    heartbeat: float = Field(0.1, gt=0)
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus; 0 picks a free one")
    metrics_host: str = "127.0.0.1"


class VllmConfig(BaseModel):
    """`[vllm]`. Whatever is not named here goes to vLLM as it stands, through `extra`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("", description="directory with the weights; empty = the demo model")
    served_name: str = Field("", description="name of the base model; empty = the directory's name")
    max_model_len: int = Field(0, ge=0, description="tokens; 0 = 2048 on CPU, the model's own on a GPU")
    max_num_seqs: int = Field(0, ge=0, description="0 = 32 on CPU, vLLM's choice on a GPU")
    max_num_batched_tokens: int = Field(0, ge=0, description="0 = 512 on CPU, vLLM's choice on a GPU")
    kv_cache_bytes: int = Field(
        0, ge=0, description="0 = 512 MiB on CPU, what gpu_memory_utilization leaves on a GPU"
    )
    block_size: int = Field(0, ge=0, description="0 = 32 on CPU, vLLM's choice on a GPU")
    enforce_eager: bool | Literal["auto"] = Field("auto", description="auto = on CPU only")
    tool_call_parser: str = Field("hermes", description="empty = no automatic tool choice")
    extra: dict[str, str | int | float | bool] = Field(default={}, description="more vLLM arguments, by name")


class SimConfig(BaseModel):
    """`[sim]`: the step model `step = beta0 + beta1*prefill + beta2*prefill*context + beta3*sum(decode kv)
    + beta4*batch`, in milliseconds; defaults are near a datacentre GPU's (see docs)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "sim"
    context_tokens: int = Field(8192, ge=16, le=2**18)
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=16)
    kv_blocks: int = Field(8192, ge=1)
    block_size: int = Field(16, ge=1)
    beta0: float = Field(16.5, ge=0)
    beta1: float = Field(0.01518, ge=0)
    beta2: float = Field(4.21e-7, ge=0)
    beta3: float = Field(0.0, ge=0)
    beta4: float = Field(0.0, ge=0)
    ttft_ms: float = Field(0.0, ge=0, description="with itl_ms: each request on its own clock, no step model")
    itl_ms: float = Field(0.0, ge=0)

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
    connect_timeout: float = Field(5.0, gt=0)
    read_timeout: float = Field(600.0, gt=0, description="silence of the server that ends a request")
    health_interval: float = Field(1.0, gt=0)
    health_failures: int = Field(
        5, ge=1, description="health checks failed in a row after which the server counts as dead"
    )
