"""Settings of the scheduler process."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SchedulerConfig(BaseModel):
    """`[scheduler]`. Times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="unique in the fleet; made up when empty")
    lost_after: float = Field(0.3, gt=0, description="a worker without heartbeat for so long is lost")
    lease: float = Field(
        0.7, gt=0, description="a leader silent for so long loses its lead to another scheduler"
    )
    sweep: float = Field(1.0, gt=0, description="interval of the look for requests that nobody serves")
    orphan_after: float = Field(
        5.0, ge=0, description="a base that nobody ever served is given so long before its requests fail"
    )
    forget_after: float = Field(
        7 * 86400.0, gt=0, description="a model that no worker served for so long leaves the registry"
    )
    plan_interval: float = Field(1.0, gt=0, description="time between two plans of what is loaded where")
    dwell: float = Field(
        60.0, ge=0, description="an adapter's replicas, and the workers wanted, change no sooner again"
    )
    demand_window: float = Field(
        15.0, gt=0, description="time constant of the running means of what is asked for"
    )
    utilisation: float = Field(
        0.7, gt=0, le=1, description="share of a replica's capacity that the plan fills"
    )
    spare: float = Field(
        0.2, ge=0, lt=1, description="share of it that must stay free on the rest for a replica to go"
    )
    gone_after: float = Field(
        3.0, gt=0, description="a worker silent for so long loses its place in the plan"
    )
    load_timeout: float = Field(60.0, gt=0, description="a worker may take so long to load an adapter")
    retry_load: float = Field(
        5.0, gt=0, description="pause before an adapter that failed on a worker is tried there again; doubled"
    )
    retry_load_most: float = Field(300.0, gt=0, description="the longest such pause")
    min_workers: int = Field(1, ge=0, description="workers of a base that autoscaling asks for, at least")
    max_workers: int = Field(1000, ge=1, description="and at most")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus; 0 picks a free one")
    metrics_host: str = Field("127.0.0.1", description="address that Prometheus is answered on")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} must not be more than max_workers={self.max_workers}"
            )
        return self
