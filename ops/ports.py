"""Ports looked at before something is started on them."""

from __future__ import annotations

import socket

from broker import addresses
from ops.errors import StartFailed


def free(host: str, port: int, named: str) -> int:
    """`port`, or a free one for 0. Raises StartFailed where it can't be had; `named` sets another."""
    try:
        with socket.socket(addresses.family(host)) as probe:
            # As the servers do: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "ports end at 65535"
        raise StartFailed(
            f"port {port} on {host} can't be used ({reason}): name another with {named}, 0 = a free one"
        ) from None
