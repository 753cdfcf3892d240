"""Which model a request goes to, and what its caller is told of that: `routing` with HTTP around it."""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Mapping
from typing import Any

from broker import errors
from broker.messages import PATHS, ServiceClass
from ingress import admit, routing, sticky
from ingress.admit import Asked
from ingress.catalogue import Catalogue
from ingress.config import IngressConfig
from ingress.needs import Needs

DRY_RUN = "/v1/route"
"""Says where the same body would go, and runs nothing."""

_CONVERSATION = b"x-headrace-conversation"
_MOST_HEADER = 1000
"""Bytes of `X-Headrace-Route`."""


class Steering:
    def __init__(self, config: IngressConfig, catalogue: Catalogue) -> None:
        self._config = config
        self._catalogue = catalogue

    def choose(
        self, path: str, asked: Asked, size: int, headers: Mapping[bytes, bytes], tenant: str
    ) -> routing.Choice:
        """Raises errors.UnknownModel, errors.Incapable, errors.InvalidType."""
        needs, caller = self._question(path, asked, size, headers, tenant)
        return routing.resolve(asked.model, needs, caller, self._catalogue)

    def explain(
        self, path: str, asked: Asked, size: int, headers: Mapping[bytes, bytes], tenant: str
    ) -> dict[str, Any]:
        """The answer to a dry run. Raises as `choose` does."""
        catalogue = self._catalogue
        needs, caller = self._question(path, asked, size, headers, tenant)
        found = routing.options(asked.model, needs, caller, catalogue)
        choice = routing.chosen(found, caller, catalogue)
        return {
            "object": "route",
            "asked": asked.model,
            "model": choice.model,
            "base": self._base(choice, tenant),
            "service_class": service_class(asked, choice),
            "why": choice.why,
            "needs": {
                "capabilities": sorted(needs.capabilities),
                "languages": sorted(needs.languages),
                "least_tokens": needs.least_tokens,
                "likely_tokens": needs.likely_tokens,
            },
            "candidates": [
                {
                    "model": each.model,
                    "base": self._base(each, tenant),
                    "serving": catalogue.served(each.base),
                    "full": catalogue.full(each.base),
                    "why": each.why,
                }
                for each in found
            ],
        }

    def _base(self, choice: routing.Choice, tenant: str) -> str | None:
        """None where it is not the tenant's to know, though an adapter of it is."""
        return choice.base if routing.allowed(choice.base, tenant, self._catalogue) else None

    def _question(
        self, path: str, asked: Asked, size: int, headers: Mapping[bytes, bytes], tenant: str
    ) -> tuple[Needs, routing.Caller]:
        needs = Needs(path, asked.body, size, admit.language(headers))
        caller = routing.Caller(
            tenant,
            functools.partial(_conversation, tenant, headers, needs),
            admit.fallback(headers, tenant, self._config),
        )
        return needs, caller


def _conversation(tenant: str, headers: Mapping[bytes, bytes], needs: Needs) -> str:
    named = headers.get(_CONVERSATION)
    return sticky.key(tenant, needs.opening if named is None else f"named {named.decode('latin-1')}")


def service_class(asked: Asked, choice: routing.Choice) -> ServiceClass:
    """What the request names, else its model's, else standard."""
    return asked.service_class or choice.latency_class or ServiceClass.STANDARD


def told(asked: str, choice: routing.Choice) -> list[tuple[bytes, bytes]]:
    """Headers that tell which model answers, where its caller named another, and why."""
    found = []
    if choice.model != asked:
        found.append((b"x-headrace-model", _ascii(choice.model)))
    if choice.why:
        found.append((b"x-headrace-route", _ascii("; ".join(choice.why))[:_MOST_HEADER]))
    return found


def dry_path(query: bytes) -> str:
    """The API's path that a dry run is for. Raises errors.InvalidRequest."""
    if not query:
        return "/v1/chat/completions"
    name, _, value = query.decode("latin-1").partition("=")
    path = urllib.parse.unquote(value)
    if name != "path" or path not in PATHS:
        raise errors.InvalidRequest(f"the query must be path=<one of {', '.join(PATHS)}>")
    return path


def _ascii(text: str) -> bytes:
    """Percent-encoded where it is no visible ASCII."""
    return b"".join(
        bytes([byte]) if 0x20 <= byte < 0x7F else b"%%%02X" % byte
        for byte in text.encode("utf-8", "surrogatepass")
    )
