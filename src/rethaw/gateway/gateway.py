"""The gateway of one node process."""

from __future__ import annotations

from rethaw.gateway.providers import Providers
from rethaw.gateway.session import SessionGateway
from rethaw.model.ports import LogSink
from rethaw.model.types import AgentSpec


class Gateway:
    """One per node process. `owner` is the process incarnation that exchanges are owned by."""

    def __init__(
        self, log: LogSink, providers: Providers, owner: str, *, adopt_window_s: float = 120.0, batch_ms: float = 50.0
    ) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        """End of the process: what was received is flushed, upstream connections are closed. Exchanges still open
        stay open in the log and are issued again by the next owner."""
        raise NotImplementedError

    def session(self, session_id: str, agent: AgentSpec) -> SessionGateway:
        """The session's part of the gateway; the same object until its `close`."""
        raise NotImplementedError
