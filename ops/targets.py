"""Where the parts' metrics are, as a file that Prometheus reads (`file_sd_configs`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)


def write(file: Path, urls: Mapping[str, str]) -> None:
    """`urls`: of the metrics of each part, by its name. What can't be written is logged."""
    groups = [
        {"targets": [urlsplit(url).netloc], "labels": {"part": part}} for part, url in sorted(urls.items())
    ]
    scratch = file.with_suffix(".tmp")
    try:
        scratch.write_text(json.dumps(groups, indent=1))
        scratch.replace(file)  # a reader sees the old list or the new one, whole
    except OSError as exc:  # a full disk must not take the fleet down
        logger.warning("%s could not be written: %s", file, exc)
