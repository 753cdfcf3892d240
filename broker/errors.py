"""What can go wrong, for every layer: one tree, each error with a code and an HTTP status.

Only `ingress` speaks HTTP, but a status travels in every `error` frame, so that a direct NATS
publisher and an HTTP client are told the same thing about the same fault.
"""

from __future__ import annotations

import orjson


class HeadraceError(Exception):
    """Root of every error that Headrace raises on purpose.

    Attributes:
        code: stable machine-readable name, sent as `error.code`.
        status: HTTP status that a caller sees.
        kind: OpenAI's `error.type`.
        retry: whether the same request may succeed later, unchanged.
        retry_after: seconds after which to try again, where that is known.
    """

    code = "internal_error"
    status = 500
    kind = "server_error"
    retry = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The OpenAI error object, as JSON bytes."""
        return error_body(self.message, self.kind, self.code, self.param)


def error_body(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """`{"error": {message, type, param, code}}` as OpenAI's API sends it."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


class InvalidRequest(HeadraceError):
    code, status, kind = "invalid_request", 400, "invalid_request_error"


class InvalidType(InvalidRequest):
    """Well-formed JSON whose value has the wrong type or is out of range."""

    code, status = "invalid_value", 422


class Unauthorized(HeadraceError):
    code, status, kind = "invalid_api_key", 401, "authentication_error"


class UnknownModel(HeadraceError):
    code, status, kind = "model_not_found", 404, "invalid_request_error"


class Incapable(InvalidRequest):
    """The named model lacks what the request needs; the message names models that have it."""

    code = "model_incapable"


class AdapterFailed(HeadraceError):
    """An adapter's files are missing, damaged, or none that the engine takes. Other models are served."""

    code, status, kind = "adapter_failed", 422, "invalid_request_error"


class NotFound(HeadraceError):
    code, status, kind = "not_found", 404, "invalid_request_error"


class MethodNotAllowed(HeadraceError):
    code, status, kind = "method_not_allowed", 405, "invalid_request_error"


class BodyTimeout(HeadraceError):
    """The client did not deliver its request body in time."""

    code, status, kind, retry = "request_timeout", 408, "invalid_request_error", True


class ReaderTooSlow(HeadraceError):
    """The client takes its answer more slowly than it comes. The request goes on, to be read later."""

    code, status, kind, retry = "reader_too_slow", 408, "invalid_request_error", True


class DuplicateRequest(HeadraceError):
    """The id was used within the dedup window; the first request stands."""

    code, status, kind = "duplicate_request", 409, "invalid_request_error"


class KeyReused(InvalidRequest):
    """One `Idempotency-Key` for two different requests."""

    code, status = "idempotency_key_reused", 422


class TooLarge(HeadraceError):
    code, status, kind = "request_too_large", 413, "invalid_request_error"


class BodyLost(HeadraceError):
    """The request's body was to lie in the object store, and does not, or is another than was stored."""

    code, status, kind = "body_lost", 500, "server_error"


class Overloaded(HeadraceError):
    code, status, kind, retry = "overloaded", 429, "rate_limit_error", True


class Cancelled(HeadraceError):
    """The caller went away or asked for the end. 499 is nginx's "client closed request"."""

    code, status, kind = "cancelled", 499, "cancelled"


class Unavailable(HeadraceError):
    """No broker, or no worker, within the limit. Nothing was half-queued."""

    code, status, kind, retry = "unavailable", 503, "server_error", True


class Unconfirmed(Unavailable):
    """The broker was told, and its answer never came: it may have accepted the request or not."""

    code = "unconfirmed"


class IngressStopped(HeadraceError):
    """The ingress went before the answer was complete. The request goes on, to be read at another one."""

    code, status, kind, retry = "ingress_stopped", 503, "server_error", True


class EngineFailed(HeadraceError):
    """The engine died or broke under the request."""

    code, status, kind, retry = "engine_failed", 500, "server_error", True


class WorkerLost(HeadraceError):
    """The worker died after output had reached the caller, and the output can't be continued."""

    code, status, kind, retry = "worker_lost", 500, "server_error", True


class Poisoned(HeadraceError):
    """Too many workers died under the request; it is kept among the dead letters."""

    code, status, kind = "poisoned", 500, "server_error"


class FramesLost(HeadraceError):
    """A gap in the reply frames that the journal can't fill."""

    code, status, kind, retry = "frames_lost", 500, "server_error", True


class DeadlineExceeded(HeadraceError):
    code, status, kind = "deadline_exceeded", 504, "server_error"


class MalformedMessage(HeadraceError):
    """A NATS message that is no request: a header is missing or unreadable."""

    code, status, kind = "malformed_message", 400, "invalid_request_error"
