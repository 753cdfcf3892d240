from __future__ import annotations

import orjson
import pytest

from broker import errors

# What callers program against: changing a line here is a breaking change.
WIRE = {
    "HeadraceError": ("internal_error", 500, "server_error", False),
    "InvalidRequest": ("invalid_request", 400, "invalid_request_error", False),
    "InvalidType": ("invalid_value", 422, "invalid_request_error", False),
    "Unauthorized": ("invalid_api_key", 401, "authentication_error", False),
    "UnknownModel": ("model_not_found", 404, "invalid_request_error", False),
    "Incapable": ("model_incapable", 400, "invalid_request_error", False),
    "AdapterFailed": ("adapter_failed", 422, "invalid_request_error", False),
    "NotFound": ("not_found", 404, "invalid_request_error", False),
    "MethodNotAllowed": ("method_not_allowed", 405, "invalid_request_error", False),
    "BodyTimeout": ("request_timeout", 408, "invalid_request_error", True),
    "ReaderTooSlow": ("reader_too_slow", 408, "invalid_request_error", True),
    "DuplicateRequest": ("duplicate_request", 409, "invalid_request_error", False),
    "KeyReused": ("idempotency_key_reused", 422, "invalid_request_error", False),
    "TooLarge": ("request_too_large", 413, "invalid_request_error", False),
    "BodyLost": ("body_lost", 500, "server_error", False),
    "Overloaded": ("overloaded", 429, "rate_limit_error", True),
    "Cancelled": ("cancelled", 499, "cancelled", False),
    "Unavailable": ("unavailable", 503, "server_error", True),
    "Unconfirmed": ("unconfirmed", 503, "server_error", True),
    "IngressStopped": ("ingress_stopped", 503, "server_error", True),
    "EngineFailed": ("engine_failed", 500, "server_error", True),
    "Poisoned": ("poisoned", 500, "server_error", False),
    "WorkerLost": ("worker_lost", 500, "server_error", True),
    "FramesLost": ("frames_lost", 500, "server_error", True),
    "DeadlineExceeded": ("deadline_exceeded", 504, "server_error", False),
    "MalformedMessage": ("malformed_message", 400, "invalid_request_error", False),
}


def tree(root: type[errors.HeadraceError]) -> list[type[errors.HeadraceError]]:
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


def own() -> list[type[errors.HeadraceError]]:
    return [kind for kind in tree(errors.HeadraceError) if kind.__module__ == errors.__name__]


def test_every_error_keeps_its_code_status_type_and_retry() -> None:
    assert {kind.__name__: (kind.code, kind.status, kind.kind, kind.retry) for kind in own()} == WIRE


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in own()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("kind", own(), ids=lambda kind: kind.__name__)
def test_the_body_is_an_openai_error_object(kind: type[errors.HeadraceError]) -> None:
    exc = kind('a "quoted" fault', param="model", retry_after=2.5)
    assert orjson.loads(exc.body()) == {
        "error": {"message": 'a "quoted" fault', "type": kind.kind, "param": "model", "code": kind.code}
    }
    assert str(exc) == 'a "quoted" fault'
    assert exc.retry_after == 2.5


def test_param_is_null_where_there_is_none() -> None:
    assert orjson.loads(errors.InvalidRequest("x").body())["error"]["param"] is None
