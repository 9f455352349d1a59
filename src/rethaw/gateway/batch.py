"""Background writes to the log, in batches: one writer for all streams of a node, so that fifty streams do not become
a thousand transactions a second."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from rethaw.model.errors import RethawError

log = logging.getLogger("rethaw.gateway")

_SHARE = 4.0  # rest this many times as long as the last round took: at most a fifth of the time goes into batches


class Flushable(Protocol):
    async def flush(self) -> None:
        """Make what was collected so far durable. Keeps it after an error, to be tried again."""
        ...


class Batcher:
    """Flushes what is marked, every `batch_ms` or more slowly under load."""

    def __init__(self, batch_ms: float) -> None:
        self._pause = batch_ms / 1000
        self._dirty: dict[Flushable, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="gateway-batcher")

    async def close(self) -> None:
        """One last round, without retries."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._round()

    def mark(self, item: Flushable) -> None:
        """`item` has something to write."""
        self._dirty[item] = None
        self._wake.set()

    async def _run(self) -> None:
        took = 0.0
        while True:
            await self._wake.wait()
            await asyncio.sleep(max(self._pause, took * _SHARE))
            self._wake.clear()
            started = time.monotonic()
            await self._round()
            took = time.monotonic() - started

    async def _round(self) -> None:
        items, self._dirty = list(self._dirty), {}
        for item in items:
            try:
                await item.flush()
            except RethawError as error:
                log.warning("a batch could not be written, it is tried again: %s", error)
                self.mark(item)
            except Exception:
                log.exception("a batch could not be written")
