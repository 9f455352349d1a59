"""Events that nobody waits for (released, served, diverged), written in the background."""

from __future__ import annotations

import asyncio
import logging

from rethaw.gateway.batch import Batcher
from rethaw.model.errors import Fenced, NotFound
from rethaw.model.ports import LogSink
from rethaw.model.types import Fence, NewEvent

log = logging.getLogger("rethaw.gateway")


class Notes:
    """One session's. Each event has a key, so that writing it again does no harm."""

    def __init__(self, sink: LogSink, batcher: Batcher) -> None:
        self._sink = sink
        self._batcher = batcher
        self._waiting: list[tuple[Fence, NewEvent]] = []
        self._lock = asyncio.Lock()

    def add(self, fence: Fence, event: NewEvent) -> None:
        self._waiting.append((fence, event))
        self._batcher.mark(self)

    async def flush(self) -> None:
        """All noted so far is durable. What belongs to a life that is over is dropped: its line has ended."""
        async with self._lock:
            while self._waiting:
                fence = self._waiting[0][0]
                same = [e for f, e in self._waiting if f == fence]
                try:
                    await self._sink.append(fence, same)
                except (Fenced, NotFound) as error:
                    log.info("session %s: %d notes of a life that is over dropped: %s", fence.session, len(same), error)
                done = set(map(id, same))
                self._waiting = [w for w in self._waiting if id(w[1]) not in done]
