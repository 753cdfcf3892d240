"""Host and port as they stand in a URL, seen from here and from other machines."""

from __future__ import annotations

import socket

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def url(scheme: str, host: str, port: int) -> str:
    """An IPv6 address stands in brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def here(host: str) -> str:
    """Where this machine reaches what listens on `host`."""
    return _LOOPBACK.get(host, host)


def elsewhere(host: str) -> str:
    """Where other machines reach it: by this one's name when it listens on every address."""
    return socket.gethostname() if host in _LOOPBACK else host
