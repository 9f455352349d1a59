"""Being told that something changed: LISTEN on one connection, with polling behind it.

A notification is a hint. It may be lost (the connection broke, the writer died between COMMIT and NOTIFY), so every wait
ends after `poll_s` at the latest and its caller looks again. Writers of this process wake their waiters directly;
their NOTIFY for other processes is sent after COMMIT and in batches, because a transaction that notifies makes every
other such transaction wait for its flush to disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import TracebackType

import psycopg
from psycopg import sql

from rethaw.db.pool import Connection, Database

log = logging.getLogger("rethaw.db")

# Before a batch of NOTIFY and after it. Sent at once it would take the time of what it tells this process's own waiters.
_GATHER_S, _BATCH_S = 0.01, 0.05
_RECONNECT_S = 0.5


class Subscription:
    """Wakes on each notification of one (channel, key). Made before looking, so that none is missed in between:
    `with hub.subscribe(c, k) as s: while not look(): await s.wait(timeout)`."""

    def __init__(self, hub: NotifyHub, channel: str, key: str) -> None:
        self._hub, self._id = hub, (channel, key)
        self._event = asyncio.Event()

    def __enter__(self) -> Subscription:
        self._hub._add(self._id, self._event)  # pyright: ignore[reportPrivateUsage]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hub._drop(self._id, self._event)  # pyright: ignore[reportPrivateUsage]

    async def wait(self, timeout: float | None = None) -> bool:
        """True when notified since the last wait; False after `timeout` or the hub's `poll_s`: look again anyway."""
        limit = self._hub.poll_s if timeout is None else min(timeout, self._hub.poll_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, limit)):
                await self._event.wait()
        told = self._event.is_set()
        self._event.clear()
        return told


class NotifyHub:
    """One listening connection for a process. Without `start` (or while PostgreSQL is away) waits only poll."""

    def __init__(self, db: Database, *, poll_s: float = 1.0) -> None:
        self.poll_s = poll_s
        self._db = db
        self._waiters: dict[tuple[str, str], set[asyncio.Event]] = {}
        self._channels: dict[str, bool] = {}  # wanted: listening
        self._outgoing: set[tuple[str, str]] = set()
        self._own = 0  # pid of the backend that sends our batches, and nothing else: what it says is known here
        self._poke = asyncio.Event()  # something to do for the listener
        self._push = asyncio.Event()  # something to send
        self._tasks: list[asyncio.Task[None]] = []
        self.listening = asyncio.Event()  # set while every wanted channel is listened to

    async def start(self) -> None:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._listen(), name="rethaw-listen"),
                           asyncio.create_task(self._send(), name="rethaw-notify")]  # fmt: skip

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def __aenter__(self) -> NotifyHub:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def subscribe(self, channel: str, key: str) -> Subscription:
        return Subscription(self, channel, key)

    async def wait(self, channel: str, key: str, timeout: float | None = None) -> bool:
        """True when notified while waiting; False after `timeout` or `poll_s`, whichever is less. Look again either
        way. What came before the call is missed: use `subscribe` where that matters."""
        with self.subscribe(channel, key) as subscription:
            return await subscription.wait(timeout)

    def publish(self, channel: str, key: str) -> None:
        """Wake the waiters here at once, and those of other processes soon. Call it after COMMIT."""
        self._wake(channel, key)
        if self._tasks:
            self._outgoing.add((channel, key))
            self._push.set()

    def _wake(self, channel: str, key: str) -> None:
        for event in self._waiters.get((channel, key), ()):
            event.set()

    def _wake_all(self) -> None:
        for events in self._waiters.values():
            for event in events:
                event.set()

    def _add(self, name: tuple[str, str], event: asyncio.Event) -> None:
        self._waiters.setdefault(name, set()).add(event)
        if name[0] not in self._channels:
            self._channels[name[0]] = False
            self.listening.clear()
            self._poke.set()

    def _drop(self, name: tuple[str, str], event: asyncio.Event) -> None:
        events = self._waiters.get(name)
        if events is not None:
            events.discard(event)
            if not events:
                del self._waiters[name]

    async def _listen(self) -> None:
        while True:
            conn: Connection | None = None
            try:
                conn = await self._db.connect()
                conn.add_notify_handler(lambda n: None if n.pid == self._own else self._wake(n.channel, n.payload))
                self._channels = dict.fromkeys(self._channels, False)
                await self._serve(conn)
            except (psycopg.Error, OSError) as e:
                log.info("not listening, polling instead: %s", str(e).strip() or type(e).__name__)
            finally:
                self.listening.clear()
                if conn is not None:
                    await conn.close()
            await asyncio.sleep(_RECONNECT_S)

    async def _serve(self, conn: Connection) -> None:
        loop = asyncio.get_running_loop()
        fileno = conn.fileno()
        while True:
            self._poke.clear()
            missing = [c for c, done in self._channels.items() if not done]
            for channel in missing:
                await conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                self._channels[channel] = True
            if not self.listening.is_set() and all(self._channels.values()):
                self._wake_all()  # what was notified before LISTEN is lost: let everybody look again
                self.listening.set()
            loop.add_reader(fileno, self._poke.set)
            try:
                await self._poke.wait()
            finally:
                loop.remove_reader(fileno)
            conn.pgconn.consume_input()
            while (told := conn.pgconn.notifies()) is not None:
                if told.be_pid == self._own:
                    continue
                self._wake(told.relname.decode(), told.extra.decode("utf-8", "replace"))

    async def _send(self) -> None:
        conn: Connection | None = None
        try:
            while True:
                await self._push.wait()
                await asyncio.sleep(_GATHER_S)
                self._push.clear()
                batch, self._outgoing = list(self._outgoing), set()
                try:
                    if conn is None:
                        conn = await self._db.connect()
                        self._own = conn.info.backend_pid
                    await conn.execute(
                        "SELECT pg_notify(c, k) FROM unnest(%s::text[], %s::text[]) AS u (c, k)",
                        ([channel for channel, _ in batch], [key for _, key in batch]),
                    )
                except (psycopg.Error, OSError) as e:
                    log.debug("notifications dropped, others will poll: %s", e)
                    if conn is not None:
                        await conn.close()
                        conn, self._own = None, 0  # another backend may get its pid
                await asyncio.sleep(_BATCH_S)
        finally:
            if conn is not None:
                await conn.close()
