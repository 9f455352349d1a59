"""Transactions of control, and waking those who wait for what they change. A notification is a hint, sent after the
commit; everybody who waits polls behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TypeVar

from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Connection, Database
from rethaw.log.writer import CHANNEL as SESSION_CHANNEL
from rethaw.model.errors import RethawError

log = logging.getLogger("rethaw.control")

NODE_CHANNEL = "rethaw_node"  # the payload is the node's id
OUTBOX_CHANNEL = "rethaw_outbox"  # something was published, or nothing more will be; the payload is the session's id
TIMER_CHANNEL = "rethaw_timer"  # a deadline that may be the next one; the payload is ANY
QUEUE_CHANNEL = "rethaw_queue"  # a session may be given a slot or a node by now; the payload is ANY
SCHEDULE_CHANNEL = "rethaw_schedule"  # a schedule's next time has changed; the payload is ANY
ANY = "any"

T = TypeVar("T")
_noted: ContextVar[set[tuple[str, str]] | None] = ContextVar("rethaw_control_noted", default=None)


def note(channel: str, key: str) -> None:
    """Whoever waits for (channel, key) is to look again once the current transaction has committed."""
    noted = _noted.get()
    if noted is not None:
        noted.add((channel, key))


class Transactions:
    """Runs each operation in one transaction (repeated while the database is away), then wakes who waits for it."""

    def __init__(self, db: Database, hub: NotifyHub | None) -> None:
        self.db = db
        self.hub = hub
        self._aside: set[asyncio.Task[None]] = set()

    async def run(self, fn: Callable[[Connection], Awaitable[T]]) -> T:
        noted: set[tuple[str, str]] = set()
        token = _noted.set(noted)
        try:
            result = await self.db.run(fn)
        finally:
            _noted.reset(token)
        if self.hub is not None:
            for channel, key in noted:
                self.hub.publish(channel, key)
        return result

    async def once(self, fn: Callable[[Connection], Awaitable[T]]) -> T:
        """`fn`, which makes one statement, or none that needs another: each is a transaction of its own."""

        async def alone() -> T:
            async with self.db.connection() as conn:
                return await fn(conn)

        return await self.db.retrying(alone)

    def aside(self, fn: Callable[[Connection], Awaitable[None]]) -> None:
        """`once` that nobody waits for; it is lost when the server ends meanwhile."""

        async def work() -> None:
            try:
                await self.once(fn)
            except RethawError as error:
                log.info("not written: %s", error)

        task = asyncio.create_task(work())
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)


__all__ = [
    "ANY",
    "NODE_CHANNEL",
    "OUTBOX_CHANNEL",
    "QUEUE_CHANNEL",
    "SCHEDULE_CHANNEL",
    "SESSION_CHANNEL",
    "TIMER_CHANNEL",
    "Transactions",
    "note",
]
