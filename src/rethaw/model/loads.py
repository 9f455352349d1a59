"""What sessions take of their machine, for `rethaw top`."""

from __future__ import annotations

from datetime import datetime

from rethaw.model.enums import Reason, State
from rethaw.model.wire import Wire


class SessionLoad(Wire):
    """One session. `cpu_s` and `memory_bytes` are of its sandbox, engine included, None while it has none here; CPU seconds
    begin again at 0 with each sandbox. Counts are of the whole session, all lines."""

    id: str
    agent: str
    version: int | None = None
    state: State
    reason: Reason
    degraded: bool = False
    cpu_s: float | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int
    model_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    snapshots: int = 0  # that are kept
    stored_bytes: int = 0  # what these added to the store
    active_at: datetime  # when its log got its newest event
    created_at: datetime


class MachineLoad(Wire):
    """The sessions of a server that have not ended (newest first), and its machine. `clock_s`: a monotonic clock, to tell
    from two of these how much of a CPU was used between them."""

    clock_s: float
    cpus: int
    memory_bytes: int
    states: dict[str, int]  # how many sessions are in each, those left out below too
    sessions: list[SessionLoad]
