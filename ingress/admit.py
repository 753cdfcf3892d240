"""From an HTTP request to a queued one: who asks, what for, how urgent, until when.

Ingress reads only what routing needs; the body travels untouched and the engine judges the rest.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from broker import errors, subjects
from broker.messages import ServiceClass
from ingress import keys
from ingress.config import IngressConfig

ANONYMOUS = "anonymous"

# OpenAI's `service_tier` values onto our classes; ours are understood as well.
_TIERS = {
    "auto": ServiceClass.STANDARD,
    "default": ServiceClass.STANDARD,
    "scale": ServiceClass.STANDARD,
    "priority": ServiceClass.INTERACTIVE,
    "flex": ServiceClass.BATCH,
}
_PRIORITIES = {str(c): c for c in ServiceClass}
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_LANGUAGE = re.compile(rb"[a-z]{2,3}(-[a-z0-9]{1,8})*")
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_MAX_NAME = subjects.MAX_NAME


@dataclass(frozen=True, slots=True)
class Asked:
    """What ingress read of a request. `service_class` is None where it names none."""

    model: str
    stream: bool
    service_class: ServiceClass | None
    body: Mapping[str, Any]


def read_body(body: bytes, priority: str | None) -> Asked:
    """Pick model, stream flag and class out of the caller's JSON.

    Raises errors.InvalidRequest when it is no JSON object, errors.InvalidType when one of the
    three has a wrong type or value.
    """
    try:
        parsed: Any = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise errors.InvalidRequest(f"the body is not valid JSON: {exc}") from exc
    if not isinstance(parsed, dict):
        raise errors.InvalidRequest(f"the body must be a JSON object, not {type(parsed).__name__}")
    if b"\\u0000" in body and _NUL.search(body):  # the first is far quicker and almost always enough
        raise errors.InvalidRequest("the body holds a NUL character (\\u0000), which no prompt or name may")
    model = parsed.get("model")
    if model is None:
        raise errors.InvalidRequest("`model` is missing: name one of GET /v1/models", param="model")
    if not isinstance(model, str) or not 0 < len(model.encode()) <= _MAX_NAME:
        raise errors.InvalidType(f"`model` must be a string of 1 to {_MAX_NAME} bytes", param="model")
    stream = parsed.get("stream")
    if not isinstance(stream, bool | None):
        raise errors.InvalidType("`stream` must be true or false", param="stream")
    return Asked(model, bool(stream), _service_class(parsed.get("service_tier"), priority), parsed)


def _service_class(tier: Any, priority: str | None) -> ServiceClass | None:
    """`X-Priority` decides where both are given: it is Headrace's own."""
    if priority is not None:
        found = _PRIORITIES.get(priority.strip().lower())
        if found is None:
            raise errors.InvalidType(f"X-Priority must be one of {', '.join(_PRIORITIES)}, not {priority!r}")
        return found
    if tier is None:
        return None
    known = _TIERS | _PRIORITIES
    if not isinstance(tier, str) or tier not in known:
        raise errors.InvalidType(f"`service_tier` must be one of {', '.join(known)}", param="service_tier")
    return known[tier]


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The caller's `X-Request-Id` where it can be used, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode("ascii") if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def check_request_id(headers: Mapping[bytes, bytes]) -> None:
    """Raises errors.InvalidRequest for an `X-Request-Id` that can't be used."""
    given = headers.get(b"x-request-id")
    if given is not None and not _REQUEST_ID.fullmatch(given):
        raise errors.InvalidRequest("X-Request-Id must be 1 to 128 visible ASCII characters")


def detached(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the request goes on when its client goes: as it says, else where a key tells that the client
    may come again. Raises errors.InvalidType."""
    given = headers.get(b"x-detach", b"true" if keys.HEADER in headers else b"false").strip().lower()
    if given not in (b"true", b"false"):
        raise errors.InvalidType("X-Detach must be true or false")
    return given == b"true"


def fallback(headers: Mapping[bytes, bytes], tenant: str, config: IngressConfig) -> bool:
    """Whether another model may serve where the first is down or full: the tenant's setting, unless the
    request forbids it. Raises errors.InvalidType."""
    given = headers.get(b"x-headrace-fallback", b"on").strip().lower()
    if given not in (b"on", b"off"):
        raise errors.InvalidType("X-Headrace-Fallback must be on or off")
    return given == b"on" and tenant not in config.no_fallback


def language(headers: Mapping[bytes, bytes]) -> str:
    """The language that a request says it is in, as a primary subtag; "" where it doesn't.
    Raises errors.InvalidType."""
    given = headers.get(b"x-headrace-language", b"").strip().lower()
    if given and not _LANGUAGE.fullmatch(given):
        raise errors.InvalidType("X-Headrace-Language must be a language tag such as en or pt-BR")
    return given.partition(b"-")[0].decode("ascii")


def traceparent(headers: Mapping[bytes, bytes]) -> str:
    """The caller's W3C trace context; "" where there is none, or an invalid one, which counts as none."""
    given = headers.get(b"traceparent", b"")
    return given.decode("ascii") if _TRACEPARENT.fullmatch(given) else ""


def timeout(headers: Mapping[bytes, bytes], service_class: ServiceClass, config: IngressConfig) -> float:
    """Seconds that a request may take: `X-Headrace-Timeout`, or its class's default.
    Raises errors.InvalidType."""
    seconds = config.deadlines.get(service_class, 600.0)
    given = headers.get(b"x-headrace-timeout")
    if given is not None:
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds <= 7 * 86400:
            raise errors.InvalidType(
                "X-Headrace-Timeout must be seconds, more than 0 and at most a week, "
                f"not {given.decode('latin-1')!r}"
            )
    return seconds


class Tenants:
    """Who asks. Without configured keys everyone is `anonymous`, and a loopback ingress lets
    `X-Headrace-Tenant` name another; with keys, the key names the tenant."""

    def __init__(self, config: IngressConfig) -> None:
        # By digest: a lookup then tells an attacker's clock nothing about the keys.
        self._by_key = {
            _digest(key.get_secret_value().encode()): tenant for tenant, key in config.api_keys.items()
        }
        self._loopback = _is_loopback(config.host)

    def of(self, headers: Mapping[bytes, bytes]) -> str:
        """Raises errors.Unauthorized or, for a tenant header where none may be, errors.InvalidRequest."""
        named = headers.get(b"x-headrace-tenant")
        if self._by_key:
            tenant = self._by_key.get(_digest(_key(headers)))
            if tenant is None:
                raise errors.Unauthorized("the API key is missing or wrong: send Authorization: Bearer <key>")
            return tenant
        if named is None:
            return ANONYMOUS
        if not self._loopback:
            raise errors.InvalidRequest(
                "X-Headrace-Tenant is taken only by an ingress that listens on a loopback address"
            )
        name = named.decode("utf-8", "replace").strip()
        if not 0 < len(name.encode()) <= _MAX_NAME:
            raise errors.InvalidRequest(f"X-Headrace-Tenant must be 1 to {_MAX_NAME} bytes")
        return name


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return headers.get(b"x-api-key") or (bearer.strip() if scheme.lower() == b"bearer" else b"")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
