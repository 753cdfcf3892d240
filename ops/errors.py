"""What keeps a process from starting."""

from __future__ import annotations

from broker.errors import HeadraceError


class StartFailed(HeadraceError):
    """An address, a file or a download is not to be had. The message tells the operator what to do."""

    code = "start_failed"
