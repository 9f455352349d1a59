"""The gateway of one node process."""

from __future__ import annotations

import asyncio

from rethaw.gateway.contracts import Books
from rethaw.gateway.providers import Providers
from rethaw.gateway.session import SessionGateway
from rethaw.gateway.shared import Shared
from rethaw.model.ports import LogSink
from rethaw.model.types import AgentSpec


class Gateway:
    """One per node process. `owner` is the process incarnation that owns its exchanges. `adopt_window_s`: how long an
    exchange whose client hung up goes on. `batch_ms`: how often response bytes go into the log, at most. `books`: who is
    asked about budgets."""

    def __init__(
        self,
        log: LogSink,
        providers: Providers,
        owner: str,
        *,
        adopt_window_s: float = 120.0,
        batch_ms: float = 50.0,
        books: Books | None = None,
    ) -> None:
        self._shared = Shared(log, providers, owner, adopt_window_s, batch_ms, books)
        self._sessions: dict[str, SessionGateway] = {}

    @property
    def provider_names(self) -> list[str]:
        """Names under which the guest reaches providers, those without a key included: asking them says what to do."""
        return self._shared.providers.names()

    async def start(self) -> None:
        await self._shared.upstream.start()
        self._shared.batcher.start()

    async def close(self) -> None:
        """End of the process: upstream connections are closed, what was received is flushed. Exchanges still open
        stay open in the log and are issued again by the next owner."""
        tasks = list(self._shared.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._shared.batcher.close()
        await self._shared.upstream.close()

    def session(self, session_id: str, agent: AgentSpec) -> SessionGateway:
        """The session's part of the gateway; the same object until its `close`."""
        known = self._sessions.get(session_id)
        if known is None:
            known = SessionGateway(self._shared, session_id, agent, lambda s: self._sessions.pop(s, None))
            self._sessions[session_id] = known
        return known
