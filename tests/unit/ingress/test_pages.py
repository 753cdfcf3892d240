"""The pages beside inference, and what every error of theirs looks like."""

from __future__ import annotations

import httpx
import pytest

from broker import subjects
from broker.memory import MemoryBroker
from broker.messages import ModelCard
from ingress import admit, pages
from ingress.catalogue import Catalogue
from ingress.config import IngressConfig


async def get(path: str, broker: MemoryBroker | None = None, method: str = "GET") -> httpx.Response:
    broker = broker or MemoryBroker()
    for name in ("b", "a/x y"):
        card = ModelCard(id=name, base="b", context_tokens=9, paths=("/v1/completions",))
        await broker.put(subjects.KV_MODELS, subjects.token(name), card.model_dump_json().encode())
    async with Catalogue(broker) as catalogue:
        transport = httpx.ASGITransport(app=pages.app(broker, catalogue, admit.Tenants(IngressConfig())))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
            return await http.request(method, path, headers={"X-Request-Id": "mine"})


async def test_models_are_listed_by_name_and_an_adapter_names_its_base() -> None:
    adapter, base = (await get("/v1/models")).json()["data"]
    assert (adapter["id"], adapter["parent"]) == ("a/x y", "b")
    assert (base["id"], base["parent"], base["max_model_len"]) == ("b", None, 9)
    assert base["serving"] is False
    assert (await get("/v1/models/a%2Fx%20y")).json() == adapter


async def test_live_is_not_ready() -> None:
    assert (await get("/health/live")).status_code == 200
    response = await get("/health/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "not ready", "broker": True, "worker": False}


async def test_metrics_are_prometheus_text() -> None:
    response = await get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE headrace_publish_ack_seconds histogram" in response.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_errors_have_one_shape_and_carry_the_request_id(
    method: str, path: str, status: int, code: str
) -> None:
    response = await get(path, method=method)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code
