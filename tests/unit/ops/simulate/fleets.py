"""Small fleets to simulate."""

from __future__ import annotations

from typing import Any

from ops.simulate.fleet_file import FleetFile

STREAM: dict[str, Any] = {
    "name": "s",
    "rate": 50.0,
    "prompt": {"mean": 100},
    "output": {"mean": 5},
}
ENGINE: dict[str, Any] = {"max_num_batched_tokens": 512, "max_num_seqs": 32, "kv_blocks": 1024}


def fleet(*streams: dict[str, Any], engine: dict[str, Any] | None = None, **changes: Any) -> FleetFile:
    """Two workers, and 50 requests a second for ten seconds; `streams` say what differs from `STREAM`."""
    workers = {"count": changes.pop("count", 2), "engine": ENGINE | (engine or {})}
    asked = [STREAM | stream for stream in streams or ({},)]
    tree = {"duration": 10.0, "workers": [workers], "stream": asked}
    return FleetFile.model_validate(tree | changes)
