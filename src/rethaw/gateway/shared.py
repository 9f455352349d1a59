"""What all sessions of a gateway share, and the upstream tasks, which belong to none of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from rethaw.gateway.batch import Batcher
from rethaw.gateway.contracts import Books
from rethaw.gateway.providers import Providers
from rethaw.gateway.run import FINAL, Run
from rethaw.gateway.upstream import Upstream
from rethaw.model.enums import ExchangeState
from rethaw.model.ports import LogSink

log = logging.getLogger("rethaw.gateway")


class Shared:
    def __init__(
        self,
        sink: LogSink,
        providers: Providers,
        owner: str,
        adopt_window_s: float,
        batch_ms: float,
        books: Books | None = None,
    ) -> None:
        self.log = sink
        self.books = books
        self.providers = providers
        self.owner = owner
        self.adopt_window_s = adopt_window_s
        self.batcher = Batcher(batch_ms)
        self.upstream = Upstream()
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the gateway at the latest. Its exception is logged."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%r", error, exc_info=error)

    def abandon(self, run: Run, why: str) -> None:
        """Cut upstream off and close the exchange as failed, unless it is closed."""
        if not run.done:
            self.spawn(self._abandon(run, why))

    async def _abandon(self, run: Run, why: str) -> None:
        if run.task is not None:
            run.task.cancel()
            await asyncio.gather(run.task, return_exceptions=True)
        if not run.done:
            try:
                await run.finish(ExchangeState.FAILED, why)
            except FINAL as error:
                log.info("exchange %s: %s", run.id, error)
