"""Everything that is no inference: models, health, metrics, and "no such path"."""

from __future__ import annotations

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from broker import base, errors
from ingress import admit
from ingress import errors as wording
from ingress.catalogue import Catalogue
from ingress.listing import Listing

_MOST = 100
"""Names in an error message."""


def app(broker: base.Broker, catalogue: Catalogue, tenants: admit.Tenants) -> Starlette:
    def seen(request: Request) -> Listing:
        return Listing.of(catalogue, tenants.of(dict(request.scope["headers"])))

    async def models(request: Request) -> Response:
        return _json(200, {"object": "list", "data": seen(request).all()})

    async def model(request: Request) -> Response:
        listing, name = seen(request), request.path_params["model"]
        found = listing.one(name)
        if found is None:
            known = ", ".join(listing.names()[:_MOST]) or "none yet: no worker has announced itself"
            raise errors.UnknownModel(
                f"there is no model {name[:200]!r}; known models: {known}", param="model"
            )
        return _json(200, found)

    async def live(_: Request) -> Response:
        return _json(200, {"status": "live"})

    async def ready(_: Request) -> Response:
        """Ready = the broker answers and a worker takes requests."""
        state = {"broker": broker.connected, "worker": catalogue.serving}
        ok = all(state.values())
        return _json(200 if ok else 503, {"status": "ready" if ok else "not ready", **state})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: _http_error, errors.HeadraceError: _our_error},
    )


def _json(status: int, value: object) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


async def _http_error(request: Request, exc: Exception) -> Response:
    """Starlette's own: no such path, or not with this method."""
    assert isinstance(exc, HTTPException)
    kind = errors.MethodNotAllowed if exc.status_code == 405 else errors.NotFound
    fault = kind(f"{request.method} {request.url.path} is not served here")
    return _error(request, fault, dict(exc.headers or {}))


async def _our_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, errors.HeadraceError)
    return _error(request, exc, {})


def _error(request: Request, fault: errors.HeadraceError, more: dict[str, str]) -> Response:
    request_id = admit.request_id(dict(request.scope["headers"]))
    head = {name.decode(): value.decode() for name, value in wording.headers(fault, request_id)}
    return Response(wording.body(fault.body(), request.url.path), fault.status, head | more)
