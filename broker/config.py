"""Settings of the broker connection and its streams."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BrokerConfig(BaseModel):
    """`[broker]`. Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field("nats://127.0.0.1:4222", description="one URL, or several with commas between")
    timeout: float = Field(2.0, gt=0, description="limit for one answer of the broker")
    replicas: int = Field(1, ge=1, le=5, description="copies of each stream: 3 in a cluster")
    max_queued: int = Field(100_000, ge=1, description="requests in the queue; one more is refused (429)")
    max_queued_bytes: int = Field(8 * 2**30, ge=2**20, description="likewise, by the size of their bodies")
    dedup_window: float = Field(120.0, gt=0, description="a request id is refused a second time for so long")
    ack_wait: float = Field(
        10.0, ge=0.5, description="a worker silent for so long loses its requests to another"
    )
    payload_bytes: int = Field(
        2 * 2**30, ge=2**20, description="bodies too large for a message, on disk; one more is refused (429)"
    )
    payload_age: float = Field(
        8 * 86400.0, gt=0, description="such a body is kept no longer; more than any deadline"
    )
    artifact_bytes: int = Field(
        2 * 2**30, ge=2**20, description="adapters' files on disk; one more is refused"
    )
    journal_bytes: int = Field(256 * 2**20, ge=2**20, description="reply frames kept in memory")
    journal_age: float = Field(900.0, gt=0, description="reply frames are kept no longer")
    usage_bytes: int = Field(2**30, ge=2**20, description="usage events on disk; the oldest go first")
    usage_age: float = Field(30 * 86400.0, gt=0, description="usage events are kept no longer")
    dead_bytes: int = Field(2**30, ge=2**20, description="dead letters on disk; the oldest go first")
    dead_age: float = Field(30 * 86400.0, gt=0, description="dead letters are kept no longer")
