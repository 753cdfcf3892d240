"""Settings of the dispatcher."""

from __future__ import annotations

import itertools
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from broker.messages import ServiceClass

INTERACTIVE, STANDARD, BATCH = ServiceClass


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Pool(BaseModel):
    """Workers by the token budget of their steps, which bounds how long a newcomer waits for one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    least_step_tokens: int = Field(0, ge=0, description="tokens in a step of its workers, at least")
    most_step_tokens: int = Field(2**31, ge=1, description="and at most")


class DispatchConfig(BaseModel):
    """`[dispatch]`. Times in seconds, lengths in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(
        True, description="false: workers pull their requests themselves, first come, first served"
    )
    window: int = Field(
        4096, ge=1, description="requests of a base and class that the scheduler looks at; others wait behind"
    )
    weights: dict[str, Positive] = Field({}, description="shares of tenants; of one that is not named, 1")
    stale_after: float = Field(0.2, gt=0, description="a worker whose figures are older is given nothing")
    theta: dict[ServiceClass, Positive] = Field(
        {INTERACTIVE: 1.0, STANDARD: 1.0, BATCH: 0.5},
        description="a worker is given more while its uncomputed prompt tokens are below so many steps",
    )
    theta_over: float = Field(
        0.05, gt=0, description="the same for tenants above their share, so that others find room at once"
    )
    slots: dict[ServiceClass, Share] = Field(
        {INTERACTIVE: 1.0, STANDARD: 0.95, BATCH: 0.9},
        description="a worker is given more of a class while less than this share of its slots is taken",
    )
    slots_over: float = Field(
        0.9, gt=0, le=1, description="share of a worker's slots that those tenants may fill"
    )
    quanta: dict[ServiceClass, Annotated[int, Field(ge=1)]] = Field(
        {INTERACTIVE: 8192, STANDARD: 2048, BATCH: 512},
        description="prompt tokens of each class in one round, where all classes wait",
    )
    memory: float = Field(10.0, gt=0, description="time constant with which a tenant's use is forgotten")
    burst: int = Field(
        8192, ge=0, description="tokens that a tenant may be above its share and count as within"
    )
    reserve: float = Field(
        1.75,
        ge=1,
        description="so many times the workers that are filled by more urgent classes, or by tenants within "
        "their share, are kept for them",
    )
    pools: dict[ServiceClass, Pool] = Field(
        {},
        description="least_step_tokens and most_step_tokens of each class's workers, where such are there; a "
        "class not named uses all",
    )
    ceilings: dict[ServiceClass, Share] = Field(
        {INTERACTIVE: 1.0, STANDARD: 0.7, BATCH: 0.4},
        description="share of a worker's KV room that each class may fill, while more urgent ones come",
    )
    budget: dict[ServiceClass, Positive] = Field(
        {INTERACTIVE: 1.0},
        description="time to the first token for which running batch requests are taken back",
    )
    sheddable: tuple[ServiceClass, ...] = Field(
        (), description="classes of which some are refused as the fleet fills up, whatever their deadlines"
    )
    load: float = Field(0.5, ge=0, description="time to load an adapter, as the choice of a worker counts it")
    step: float = Field(0.03, gt=0, description="time of an engine's step, until it is known")
    explained: int = Field(
        4096, ge=0, description="requests of each base that `headrace explain` knows of, the last ones"
    )

    @field_validator("theta", "slots", "quanta", "ceilings")
    @classmethod
    def _of_every_class(
        cls, given: dict[ServiceClass, float], info: ValidationInfo
    ) -> dict[ServiceClass, float]:
        """Classes that are not named keep their own."""
        assert info.field_name is not None
        return {**cls.model_fields[info.field_name].default, **given}

    @field_validator("slots")
    @classmethod
    def _more_for_the_urgent(cls, slots: dict[ServiceClass, float]) -> dict[ServiceClass, float]:
        """What gave way for a class that may not have its slot would come back at once."""
        for urgent, other in itertools.pairwise(ServiceClass):
            if slots[urgent] < slots[other]:
                raise ValueError(
                    f"{other} may fill {slots[other]:g} of the slots, and {urgent}, more urgent, only "
                    f"{slots[urgent]:g}: give {urgent} as many, or {other} fewer"
                )
        return slots
