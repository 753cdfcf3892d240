"""Settings of the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from broker.messages import ServiceClass
from scheduler.dispatch.config import DispatchConfig


def test_what_is_set_for_one_class_leaves_the_others_as_they_are() -> None:
    config = DispatchConfig.model_validate({"theta": {"batch": 2.0}, "quanta": {"standard": 4096}})
    assert config.theta == DispatchConfig().theta | {ServiceClass.BATCH: 2.0}
    assert config.quanta == DispatchConfig().quanta | {ServiceClass.STANDARD: 4096}


@pytest.mark.parametrize(
    "wrong",
    [
        {"theta": {"batch": 0}},
        {"slots": {"batch": 1.5}},
        {"slots": {"interactive": 0.5}},
        {"ceilings": {"batch": -0.1}},
        {"quanta": {"batch": 0}},
        {"weights": {"acme": 0}},
        {"budget": {"interactive": 0}},
        {"theta": {"urgent": 1}},
        {"pools": {"batch": {"most": 3}}},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DispatchConfig.model_validate(wrong)
