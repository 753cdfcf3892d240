"""What goes wrong at an operator's hands."""

from __future__ import annotations

from broker.errors import HeadraceError


class StartFailed(HeadraceError):
    """An address, a file or a download is not to be had. The message tells the operator what to do."""

    code = "start_failed"


class NotReplayable(HeadraceError):
    """A dead letter whose request can't be put back into the queue. The message says why."""

    code = "not_replayable"


class RoutesError(HeadraceError):
    """A file of routes, or the embeddings they are learned with, can't be used. The message says why."""

    code = "routes_error"


class TraceError(HeadraceError):
    """A recorded workload can't be read. The message says which line of it, and why."""

    code = "trace_error"


class SimulationError(HeadraceError):
    """A simulation can't go on, or its figures can't be drawn. The message says why."""

    code = "simulation_error"
