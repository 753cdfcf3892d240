"""compose.yaml and the Dockerfile run commands that exist, with settings that are valid."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops import cli, settings

ROOT = Path(__file__).parents[3]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
OURS = [name for name in SERVICES if name != "nats"]


@pytest.mark.parametrize("name", OURS)
def test_a_service_starts_with_valid_flags_and_settings(name: str) -> None:
    service = SERVICES[name]
    args = cli.parser().parse_args(service["command"])
    assert args.command == name.split("-")[0]
    environ = dict.fromkeys(service.get("environment", {}), "") | {"HEADRACE_DATA": "/data"}
    loaded = settings.load(flags=cli.flags_of(args), environ=environ)
    assert loaded.broker.url == "nats://nats:4222"
    if args.command != "ingress":  # its metrics are at its HTTP port
        part = getattr(loaded, args.command)
        assert (part.metrics_host, part.metrics_port) == ("0.0.0.0", 9100)


@pytest.mark.parametrize("name", OURS)
def test_a_service_has_a_health_check_and_time_to_drain(name: str) -> None:
    service = SERVICES[name]
    assert "healthcheck" in service
    if name != "scheduler":
        limit = settings.Settings().worker.drain_timeout
        assert float(service["stop_grace_period"].removesuffix("s")) > limit


def test_the_image_holds_every_package() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = [name.removesuffix("*") for name in find["include"]]
    dockerfile = (ROOT / "Dockerfile").read_text().splitlines()
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for package in packages:
        assert f"COPY {package} {package}" in dockerfile
        assert f"!{package}" in ignore


def test_every_engine_build_of_the_image_is_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    engines = {service["build"]["args"]["ENGINE"] for service in SERVICES.values() if "build" in service}
    assert engines - {"none"} <= extras.keys()
