"""Settings of the scheduler process."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SchedulerConfig(BaseModel):
    """`[scheduler]`. Times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="unique in the fleet; made up when empty")
    lost_after: float = Field(0.3, gt=0, description="a worker without heartbeat for so long is lost")
    lease: float = Field(
        1.0, gt=0, description="a leader silent for so long loses its lead to another scheduler"
    )
    sweep: float = Field(1.0, gt=0, description="interval of the look for requests that nobody serves")
    orphan_after: float = Field(
        5.0, ge=0, description="a base that nobody ever served is given so long before its requests fail"
    )
    forget_after: float = Field(
        7 * 86400.0, gt=0, description="a model that no worker served for so long leaves the registry"
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus; 0 picks a free one")
    metrics_host: str = Field("127.0.0.1", description="address that Prometheus is answered on")
