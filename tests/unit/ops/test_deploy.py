"""The manifests in ops/deploy: by the schemas of KEDA and Kubernetes, and by the names that Headrace has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.kubernetes.autoscaling.v2 import HorizontalPodAutoscaler
from prometheus_client import REGISTRY
from pydantic import BaseModel, ValidationError

from broker import subjects
from broker.messages import ServiceClass
from scheduler import metrics

DEPLOY = Path(__file__).parents[3] / "ops/deploy"
KEDA: dict[str, Any] = yaml.safe_load((DEPLOY / "keda.yaml").read_text())
HPA: dict[str, Any] = yaml.safe_load((DEPLOY / "hpa.yaml").read_text())
TRIGGERS: list[dict[str, Any]] = KEDA["spec"]["triggers"]


def misspelt(model: BaseModel, given: Any, path: str = "") -> list[str]:
    """Keys of `given` that the model has not taken: its schema ignores what it does not know."""
    taken = model.model_dump(by_alias=True, exclude_unset=True, mode="json")
    return _lost(given, taken, path)


def _lost(given: Any, taken: Any, path: str) -> list[str]:
    if isinstance(given, dict):
        if not isinstance(taken, dict):
            return [path]
        return [
            lost
            for key, value in given.items()
            for lost in (_lost(value, taken[key], f"{path}.{key}") if key in taken else [f"{path}.{key}"])
        ]
    if isinstance(given, list):
        return [
            lost
            for n, (a, b) in enumerate(zip(given, taken, strict=True))
            for lost in _lost(a, b, f"{path}.{n}")
        ]
    return []


def test_the_scaled_object_is_one() -> None:
    assert misspelt(ScaledObject.model_validate(KEDA), KEDA) == []


def test_the_autoscaler_is_one() -> None:
    assert misspelt(HorizontalPodAutoscaler.model_validate(HPA), HPA) == []


def test_the_schemas_refuse_what_is_wrong() -> None:
    """Else the tests above say nothing."""
    with pytest.raises(ValidationError):
        ScaledObject.model_validate(KEDA | {"spec": KEDA["spec"] | {"maxReplicaCount": "many"}})
    wrong = KEDA | {"spec": KEDA["spec"] | {"maxReplicaCounts": 3}}
    assert misspelt(ScaledObject.model_validate(wrong), wrong) == [".spec.maxReplicaCounts"]


def test_every_class_has_a_trigger_on_its_consumer() -> None:
    watched = {
        (trigger["metadata"]["stream"], trigger["metadata"]["consumer"])
        for trigger in TRIGGERS
        if trigger["type"] == "nats-jetstream"
    }
    assert watched == {(subjects.REQUESTS, subjects.consumer("sim", each)) for each in ServiceClass}
    known = {
        "natsServerMonitoringEndpoint",
        "account",
        "stream",
        "consumer",
        "lagThreshold",
        "activationLagThreshold",
    }
    for trigger in TRIGGERS:
        if trigger["type"] == "nats-jetstream":
            assert set(trigger["metadata"]) == known


def test_both_ask_for_the_metric_that_the_scheduler_has() -> None:
    metrics.DESIRED.labels("sim").set(3)
    assert REGISTRY.get_sample_value("headrace_desired_replicas", {"base": "sim"}) == 3
    (prometheus,) = (trigger for trigger in TRIGGERS if trigger["type"] == "prometheus")
    assert prometheus["metadata"]["query"] == 'max(headrace_desired_replicas{base="sim"})'
    # An average of one a worker: as many workers as the metric says.
    assert (prometheus["metricType"], prometheus["metadata"]["threshold"]) == ("AverageValue", "1")
    (external,) = (each["external"] for each in HPA["spec"]["metrics"])
    assert external["metric"] == {
        "name": "headrace_desired_replicas",
        "selector": {"matchLabels": {"base": "sim"}},
    }
    assert external["target"] == {"type": "AverageValue", "averageValue": "1"}
    metrics.forget_plans()
