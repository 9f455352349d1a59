"""Connections to PostgreSQL, and the rule of the ports: what is transient is tried again for 30 s, then `Unavailable`.

Our own small pool: psycopg_pool waits longer and longer between its attempts to connect while PostgreSQL is away, so a
database that is back after ten seconds may be missed for another ten. Here each caller tries by itself, at most a
second apart, and a connection whose socket has something to say while idle (it was closed) is never handed out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import select
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, errors, pq
from psycopg.rows import TupleRow

from rethaw.model.errors import Conflict, Fenced, InvalidInput, NotFound, RethawError, StorageFull, Unavailable

log = logging.getLogger("rethaw.db")

Connection = AsyncConnection[TupleRow]
T = TypeVar("T")

DEADLINE_S = 30.0  # rethaw.model.ports: implementations retry for so long, then raise Unavailable
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 0.3
# A statement is prepared when a connection runs it again (psycopg waits for the sixth time: 1-2 ms more for each of the first
# ten messages to an agent, benchmarks/sdk.py). At most so many stay prepared on a connection.
_PREPARED_AFTER, _PREPARED_MAX = 1, 200

# Read-only: a standby answers during a fail-over. Idle-in-transaction: the server ended a transaction of a paused process.
_TRANSIENT = (
    psycopg.OperationalError, psycopg.InterfaceError,
    errors.ReadOnlySqlTransaction, errors.IdleInTransactionSessionTimeout,
)  # fmt: skip
_OWN: dict[str, tuple[type[RethawError], str]] = {
    "RT001": (Fenced, "another life owns it now: stop writing"),
    "RT002": (NotFound, "check the id"),
    "RT003": (Conflict, "the log is append-only"),
    "RT004": (Conflict, ""),
}
# None: psycopg itself refuses it (a NUL in a text). The others: no such character in the encoding, a bad \u escape.
_UNFIT = (None, "22021", "22P02", "22P05")


def translated(error: psycopg.Error) -> RethawError | None:
    """What an error means that our own SQL raised (SQLSTATE RT...), or a value PostgreSQL cannot hold; else None."""
    known = _OWN.get(error.sqlstate or "")
    text = error.diag.message_primary or str(error)
    if known is not None:
        cls, remedy = known
        return cls(f"no {text}" if cls is NotFound else text, remedy=remedy or None)
    if isinstance(error, psycopg.DataError) and error.sqlstate in _UNFIT:
        return InvalidInput(f"the database cannot hold this value: {text}")
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: connection lost, server starting, deadlock, serialization failure."""
    return isinstance(error, _TRANSIENT)


class Database:
    """A pool of autocommit connections to `dsn` (any libpq connection string). Bound to one event loop.

    `size`: connections at most; further callers wait. Connections are opened when first needed.
    """

    def __init__(self, dsn: str, *, size: int = 10, deadline_s: float = DEADLINE_S) -> None:
        self.dsn = dsn
        self.deadline_s = deadline_s
        self._idle: deque[Connection] = deque()
        self._slots = asyncio.Semaphore(size)
        self._closed = False

    async def open(self) -> None:
        """Check that the database answers. Raises Unavailable after the deadline."""

        async def ping() -> None:
            async with self.connection() as conn:
                await conn.execute("SELECT 1")

        await self.retrying(ping)

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            with contextlib.suppress(psycopg.Error, OSError):
                await self._idle.pop().close()

    async def __aenter__(self) -> Database:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def connect(self) -> Connection:
        """A connection of the caller's own, outside the pool (LISTEN, advisory locks)."""
        conn = await AsyncConnection.connect(
            self.dsn,
            autocommit=True,
            connect_timeout=10,
            application_name="rethaw",
            client_encoding="utf8",
            prepare_threshold=_PREPARED_AFTER,
        )
        conn.prepared_max = _PREPARED_MAX
        return conn

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection in autocommit mode: each statement is a transaction of its own."""
        async with self._slots:
            if self._closed:
                raise Unavailable("the database pool is closed")
            conn = await self._take()
            try:
                yield conn
            finally:
                if not self._closed and _usable(conn):
                    self._idle.append(conn)
                else:
                    with contextlib.suppress(psycopg.Error, OSError):
                        await conn.close()

    @asynccontextmanager
    async def tx(self) -> AsyncGenerator[Connection]:
        """A connection inside one transaction: committed at the end, rolled back by an exception."""
        async with self.connection() as conn, conn.transaction():
            yield conn

    async def _take(self) -> Connection:
        while self._idle:
            conn = self._idle.pop()
            if _usable(conn) and not _hung_up(conn):
                return conn
            with contextlib.suppress(psycopg.Error, OSError):
                await conn.close()
        return await self.connect()

    async def retrying(self, fn: Callable[[], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """`await fn()`, again while it fails transiently. `fn` must be safe to repeat: the reply to a COMMIT may have
        been lost. Raises Unavailable (StorageFull when the database's disk is full) after the deadline, and our own
        errors (Fenced, NotFound, Conflict, InvalidInput) for what our SQL raised."""
        limit = self.deadline_s if deadline_s is None else deadline_s
        start, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return await fn()
            except psycopg.Error as e:
                own = translated(e)
                if own is not None:
                    raise own from e
                if not is_transient(e):
                    raise
                waited = time.monotonic() - start
                if waited + pause > limit:
                    if isinstance(e, errors.DiskFull):
                        raise StorageFull(f"the database's disk is full: {e}", remedy="make room on it") from e
                    raise Unavailable(
                        f"the database did not answer for {waited:.0f} s: {str(e).strip() or type(e).__name__}",
                        remedy="check that PostgreSQL runs and can be reached",
                    ) from e
                log.debug("trying again in %.2f s: %s", pause, e)
                await asyncio.sleep(pause * random.uniform(0.7, 1.0))
                pause = min(pause * 2, _LAST_PAUSE_S)

    async def run(self, fn: Callable[[Connection], Awaitable[T]]) -> T:
        """`fn(conn)` inside one transaction, by the rule of `retrying`."""

        async def once() -> T:
            async with self.tx() as conn:
                return await fn(conn)

        return await self.retrying(once)

    async def fetch(self, query: str, params: tuple[Any, ...] = (), *, binary: bool = False) -> list[TupleRow]:
        """All rows of one statement that is its own transaction, by the rule of `retrying`."""

        async def once() -> list[TupleRow]:
            async with self.connection() as conn:
                cursor = await conn.execute(query.encode(), params or None, binary=binary)
                return await cursor.fetchall()

        return await self.retrying(once)


def _usable(conn: Connection) -> bool:
    return not conn.closed and conn.info.transaction_status == pq.TransactionStatus.IDLE


def _hung_up(conn: Connection) -> bool:
    poll = select.poll()
    poll.register(conn.fileno(), select.POLLIN)
    return bool(poll.poll(0))
