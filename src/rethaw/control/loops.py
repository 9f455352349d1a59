"""What control does by itself as time passes: timers, longest durations, leases, placement.

Everything is found by looking at the database, never remembered, so any number of processes may run these loops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, LiteralString

from rethaw.control import budgets, children, naps, rows, schedules, sessions, waits
from rethaw.control.control import Control
from rethaw.control.rows import Conn
from rethaw.control.wakeups import ANY, QUEUE_CHANNEL, SCHEDULE_CHANNEL, TIMER_CHANNEL
from rethaw.model.errors import NotFound

log = logging.getLogger("rethaw.control")

_BATCH = 200
# What is due now, by name, and `left`: seconds until the next known time. One statement: it is asked whenever a deadline is
# made, which is often, and there is next to never something due.
_DUE = """
SELECT EXISTS (SELECT 1 FROM waits WHERE state = 'open' AND deadline <= t) AS waits,
       EXISTS (SELECT 1 FROM sessions WHERE give_up_at <= t) AS give_up,
       EXISTS (SELECT 1 FROM sessions WHERE cancel_by <= t) AS cancel,
       EXISTS (SELECT 1 FROM session_specs WHERE expires_at <= t AND slot = 'waiting') AS expire,
       EXISTS (SELECT 1 FROM sessions WHERE retry_at <= t) AS retry,
       EXISTS (SELECT 1 FROM sessions WHERE wall_at <= t) AS wall,
       EXISTS (SELECT 1 FROM sessions WHERE nap_until <= t) AS nap,
       EXISTS (SELECT 1 FROM children WHERE state = 'due') OR EXISTS (SELECT 1 FROM sessions WHERE untold)
           OR EXISTS (SELECT 1 FROM children WHERE state = 'ended' AND NOT told)
           OR EXISTS (SELECT 1 FROM child_acts WHERE done_at IS NULL) AS children,
       (SELECT extract(epoch FROM min(at) - t) FROM (
           SELECT min(deadline) AS at FROM waits WHERE state = 'open' AND deadline IS NOT NULL
           UNION ALL SELECT min(expires_at) FROM session_specs WHERE expires_at IS NOT NULL AND slot = 'waiting'
           UNION ALL SELECT min(retry_at) FROM sessions WHERE retry_at > t
           UNION ALL SELECT min(wall_at) FROM sessions WHERE wall_at IS NOT NULL
           UNION ALL SELECT min(nap_until) FROM sessions WHERE nap_until IS NOT NULL
           UNION ALL SELECT min(give_up_at) FROM sessions WHERE give_up_at IS NOT NULL
           UNION ALL SELECT min(cancel_by) FROM sessions WHERE cancel_by IS NOT NULL) n) AS left
FROM (SELECT clock_timestamp() AS t OFFSET 0) c"""

_NEXT_DELAY = """
SELECT extract(epoch FROM min(not_before) - clock_timestamp()) AS left FROM session_specs
WHERE slot = 'waiting' AND not_before > clock_timestamp()"""


class ControlLoops:
    """`run()` goes on until it is cancelled; errors are logged and tried again."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._policy = control.policy
        # Nobody could renew a lease while this process or the database was away: both grant one full lease.
        self._reap_from = time.monotonic() + self._policy.lease_s
        self._last_seen = time.monotonic()

    async def run(self) -> None:
        """Fire timers, give up, reap and place, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever("timers", self._time))
            group.create_task(self._forever("leases", self.reap))
            group.create_task(self._forever("placement", self._place))
            group.create_task(self._forever("schedules", self._schedules))

    async def _forever(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
                if name == "leases":
                    await asyncio.sleep(self._policy.poll_s)
            except Exception as error:
                log.warning("%s: %s", name, error, exc_info=not isinstance(error, OSError))
                await asyncio.sleep(self._policy.poll_s)

    async def _time(self) -> None:
        """Do what is due, then wait for the next deadline, or for a sooner one to be made."""
        with self._control.hub.subscribe(TIMER_CHANNEL, ANY) as sooner:
            left = await self.fire()
            await sooner.wait(max(0.005, left))

    async def _place(self) -> None:
        """Place who can be, then wait until a slot or a node may be free, or somebody's delay is over."""
        with self._control.hub.subscribe(QUEUE_CHANNEL, ANY) as sooner:
            began = time.monotonic()
            await self._control.place_waiting()
            # Many who find no room are not asked again at each session's end.
            await asyncio.sleep(min(self._policy.poll_s, 2 * (time.monotonic() - began - 0.05)))
            await sooner.wait(max(0.005, await self._left(_NEXT_DELAY)))

    async def _schedules(self) -> None:
        """Start what is due by schedules, then wait for the next time."""
        with self._control.hub.subscribe(SCHEDULE_CHANNEL, ANY) as sooner:
            if not await self._control.schedules.fire():
                await sooner.wait(max(0.005, await self._left(schedules.SOONEST)))

    async def _left(self, query: LiteralString) -> float:
        """Seconds until what `query` finds, at most `poll_s`."""
        found = await self._control.transactions.once(lambda conn: rows.one(conn, query))
        return self._soon(found["left"] if found else None)

    def _soon(self, left: Any) -> float:
        return self._policy.poll_s if left is None else min(self._policy.poll_s, float(left))

    async def fire(self) -> float:
        """Do everything whose time has come. Seconds until the next time, at most `poll_s`."""
        run = self._control.transactions.run
        due = await self._control.transactions.once(lambda conn: rows.one(conn, _DUE))
        assert due is not None
        if due["waits"]:
            await self._each(
                """SELECT DISTINCT session AS id FROM waits
                   WHERE state = 'open' AND deadline <= clock_timestamp() LIMIT %s""",
                self._settle,
            )
        if due["give_up"]:
            await self._each(
                "SELECT id FROM sessions WHERE give_up_at <= clock_timestamp() LIMIT %s",
                lambda s: run(lambda conn: sessions.give_up(conn, s)),
            )
        if due["cancel"]:
            await self._each(
                "SELECT id FROM sessions WHERE cancel_by <= clock_timestamp() LIMIT %s",
                lambda s: run(lambda conn: sessions.end_cancel(conn, s)),
            )
        if due["children"]:
            await children.work(self._control.transactions, self._policy)
        if due["expire"]:
            await self._each(
                """SELECT session AS id FROM session_specs
                   WHERE expires_at <= clock_timestamp() AND slot = 'waiting' LIMIT %s""",
                lambda s: run(lambda conn: sessions.expire(conn, s)),
            )
        if due["retry"]:
            await self._each(
                "SELECT id FROM sessions WHERE retry_at <= clock_timestamp() LIMIT %s",
                lambda s: run(lambda conn: sessions.place(conn, s, self._policy)),
            )
        if due["wall"]:
            await self._each(
                "SELECT id FROM sessions WHERE wall_at <= clock_timestamp() LIMIT %s",
                lambda s: run(lambda conn: budgets.look_at_wall(conn, s)),
            )
        if due["nap"]:
            await self._each(
                "SELECT id FROM sessions WHERE nap_until <= clock_timestamp() LIMIT %s",
                lambda s: run(lambda conn: naps.over(conn, s, self._policy)),
            )
        return self._soon(due["left"])

    async def reap(self) -> None:
        """Recover what lost its node. A lease counts as run out only once this process has seen the database for a full
        lease without a gap: during an outage nobody could renew."""
        now = time.monotonic()
        if now - self._last_seen > max(2 * self._policy.poll_s, self._policy.lease_s / 3):
            self._reap_from = now + self._policy.lease_s
        await self._control.recover_lost(expired=now >= self._reap_from)
        done = time.monotonic()
        if done - now > self._policy.lease_s / 3:
            self._reap_from = done + self._policy.lease_s
        self._last_seen = done
        await self._control.transactions.run(_tidy)

    async def _settle(self, session: str) -> None:
        async def fn(conn: Conn) -> None:
            row = await rows.load(conn, session, lock=True)
            await waits.settle(conn, row, self._policy)

        await self._control.transactions.run(fn)

    async def _each(self, query: str, act: Callable[[str], Awaitable[object]]) -> None:
        found = await self._control.transactions.db.fetch(query, (_BATCH,))
        for (session,) in found:
            with contextlib.suppress(NotFound):  # erased meanwhile
                await act(session)


async def _tidy(conn: Conn) -> None:
    await conn.execute("DELETE FROM assignments WHERE action = 'kill' AND at < now() - interval '1 hour'")
