"""What a caller is told of the choice, and the paths of a dry run."""

from __future__ import annotations

import pytest

from broker import errors
from broker.messages import ServiceClass
from ingress import steering
from ingress.admit import Asked
from ingress.routing import Choice


def test_what_was_named_and_serves_is_not_told() -> None:
    assert steering.told("m", Choice("m", "m")) == []


def test_another_model_is_told_with_the_reason_in_ascii_on_one_line_and_bounded() -> None:
    choice = Choice("ü\n1", "b", ("alias x: ü", "y" * 5000))
    (_, model), (_, why) = steering.told("x", choice)
    assert model == b"%C3%BC%0A1"
    assert why.startswith(b"alias x: %C3%BC; yyy")
    assert len(why) == 1000


def test_the_class_is_the_requests_then_the_models_then_standard() -> None:
    named = Asked("m", False, ServiceClass.BATCH, {})
    silent = Asked("m", False, None, {})
    urgent = Choice("m", "m", latency_class=ServiceClass.INTERACTIVE)
    assert steering.service_class(named, urgent) is ServiceClass.BATCH
    assert steering.service_class(silent, urgent) is ServiceClass.INTERACTIVE
    assert steering.service_class(silent, Choice("m", "m")) is ServiceClass.STANDARD


@pytest.mark.parametrize("query", [b"path=/v1/embeddings", b"path=%2Fv1%2Fembeddings"])
def test_a_dry_run_may_be_for_another_path(query: bytes) -> None:
    assert steering.dry_path(query) == "/v1/embeddings"
    assert steering.dry_path(b"") == "/v1/chat/completions"


@pytest.mark.parametrize("query", [b"x=/v1/embeddings", b"path=/metrics", b"path", b"path=%ff", b"path=%"])
def test_a_dry_run_for_nothing_is_refused(query: bytes) -> None:
    with pytest.raises(errors.InvalidRequest):
        steering.dry_path(query)
