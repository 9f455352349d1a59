"""Schedules: sessions that start by the clock.

The transaction that starts a session is the one that moves the schedule's next time past it, under the lock of the
schedule's row: whatever is killed and whenever, a time is started once or not yet.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from rethaw.control import arguments, meant, queues, rows, sessions, templates, wakeups
from rethaw.control.calendar import Calendar
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.control.wakeups import Transactions
from rethaw.model import faults
from rethaw.model.errors import Conflict, InvalidInput, NotFound, RethawError
from rethaw.model.ids import new_generation, new_id
from rethaw.model.queue_types import Firing, Schedule, ScheduleSpec
from rethaw.model.starting import check_name
from rethaw.model.types import AgentSpec, SessionView, StartOptions
from rethaw.model.versions import unsigned

log = logging.getLogger("rethaw.control")

KEY = "schedule:"  # keys and tags of the sessions begin with it
LATE = timedelta(seconds=60)  # what is later than that was missed
_KEPT = 100
_SHOWN = 10
_FINAL = ["completed", "failed", "cancelled"]
SOONEST = "SELECT extract(epoch FROM min(next_at) - clock_timestamp()) AS left FROM schedules WHERE NOT paused"


def check_key(key: str | None) -> None:
    """Keys of schedules are nobody else's."""
    if key is not None and key.startswith(KEY):
        raise InvalidInput(f"{key[:80]!r} cannot be a key", remedy=f"keys that begin with {KEY!r} are of schedules")


def _calendar(found: dict[str, Any]) -> Calendar:
    return Calendar(found["cron"], found["tz"], found["every_s"], found["anchor"])


def _options(spec: ScheduleSpec, name: str) -> StartOptions:
    """Of each session that it starts."""
    tags = tuple(dict.fromkeys([*spec.options.tags, f"{KEY}{name}"]))
    return spec.options.model_copy(update={"tags": tags})


def _spec(found: dict[str, Any]) -> ScheduleSpec:
    return ScheduleSpec(
        agent=AgentSpec.model_validate_json(found["agent"]),
        args=json.loads(found["args"]),
        options=StartOptions.model_validate_json(found["options"]),
        **{name: found[name] for name in ("cron", "tz", "every_s", "catch_up", "overlap")},
    )


def _unsigned(spec: ScheduleSpec) -> ScheduleSpec:
    return spec.model_copy(update={"agent": unsigned(spec.agent)})


async def _shown(conn: Conn, found: dict[str, Any], *, firings: bool = True) -> Schedule:
    past = await rows.many(
        conn,
        "SELECT due, what, session, detail FROM firings WHERE schedule = %s ORDER BY due DESC LIMIT %s",
        (found["name"], _SHOWN if firings else 1),
    )
    return Schedule(
        **{name: getattr(spec, name) for spec in [_spec(found)] for name in ScheduleSpec.model_fields},
        **{name: found[name] for name in ("name", "paused", "next_at", "created_at")},
        firings=tuple(Firing(**one) for one in past),
    )


async def _load(conn: Conn, name: str, *, lock: bool = False) -> dict[str, Any]:
    query = "SELECT * FROM schedules WHERE name = %s"
    found = await rows.one(conn, query + " FOR UPDATE" if lock else query, (name,))
    if found is None:
        remedy = await meant.name(conn, "schedules", name, "`rethaw schedule ls` shows those there are")
        raise NotFound(f"there is no schedule {name[:100]!r}", remedy=remedy)
    return found


async def _now(conn: Conn) -> datetime:
    found = await rows.one(conn, "SELECT clock_timestamp() AS now")
    assert found is not None
    return found["now"].astimezone(UTC)


# ---------------------------------------------------------------- what people ask


async def create(conn: Conn, name: str, spec: ScheduleSpec, replace: bool, policy: Policy) -> Schedule:
    """A schedule; the same again is found. `replace`: put it in the place of one that differs.

    Raises InvalidInput, Conflict when the name is another's."""
    check_name("schedule", name)
    sessions.check_agent(spec.agent, policy)
    arguments.check(spec.agent, spec.args)
    queues.check_options(_options(spec, name))
    now = await _now(conn)
    calendar = Calendar(spec.cron, spec.tz, spec.every_s, now)
    calendar.check()
    agent, args = spec.agent.model_dump_json(), sessions.canonical(spec.args)
    columns: dict[str, Any] = {
        "agent": agent,
        "args": args,
        "options": spec.options.model_dump_json(),
        **{field: getattr(spec, field) for field in ("cron", "tz", "every_s", "catch_up", "overlap")},
    }
    times = {"anchor": now, "next_at": calendar.next_after(now)}
    made = await rows.one(
        conn,
        """INSERT INTO schedules (name, agent, args, options, cron, tz, every_s, catch_up, overlap, anchor, next_at)
           VALUES (%(name)s, %(agent)s, %(args)s, %(options)s, %(cron)s, %(tz)s, %(every_s)s, %(catch_up)s, %(overlap)s,
                   %(anchor)s, %(next_at)s) ON CONFLICT DO NOTHING RETURNING *""",
        {"name": name, **columns, **times},
    )
    if made is None:
        made = await _load(conn, name, lock=True)
        if _unsigned(former := _spec(made)) != _unsigned(spec):
            if not replace:
                raise Conflict(
                    f"schedule {name} exists and differs", remedy="replace it (--replace), or choose another name"
                )
            # Another agent or other arguments leave the times alone.
            same = all(getattr(former, field) == getattr(spec, field) for field in ("cron", "tz", "every_s"))
            times = {"anchor": made["anchor"], "next_at": made["next_at"]} if same else times
            made = await rows.one(
                conn,
                """UPDATE schedules SET agent = %(agent)s, args = %(args)s, options = %(options)s, cron = %(cron)s,
                       tz = %(tz)s, every_s = %(every_s)s, catch_up = %(catch_up)s, overlap = %(overlap)s,
                       anchor = %(anchor)s, next_at = %(next_at)s WHERE name = %(name)s RETURNING *""",
                {"name": name, **columns, **times},
            )
            assert made is not None
    wakeups.note(wakeups.SCHEDULE_CHANNEL, wakeups.ANY)
    return await _shown(conn, made)


async def every(conn: Conn) -> list[Schedule]:
    return [
        await _shown(conn, found, firings=False)
        for found in await rows.many(conn, "SELECT * FROM schedules ORDER BY name")
    ]


async def pause(conn: Conn, name: str, paused: bool) -> Schedule:
    """What a paused one misses is not caught up."""
    found = await _load(conn, name, lock=True)
    if found["paused"] != paused:
        next_at = found["next_at"] if paused else _calendar(found).next_after(await _now(conn))
        await conn.execute("UPDATE schedules SET paused = %s, next_at = %s WHERE name = %s", (paused, next_at, name))
        wakeups.note(wakeups.SCHEDULE_CHANNEL, wakeups.ANY)
    return await _shown(conn, await _load(conn, name))


async def trigger(conn: Conn, name: str, session: str, generation: str, policy: Policy) -> Row:
    """A session now, beside its times and whatever still runs."""
    found = await _load(conn, name, lock=True)
    row = await _start(conn, name, _spec(found), session, generation, f"{KEY}{name}:{session}", policy)
    known = await rows.one(
        conn, "SELECT 1 AS ok FROM firings WHERE schedule = %s AND session = %s", (name, row.id)
    )  # fmt: skip
    if known is None:  # else the reply to the commit was lost
        await _record(conn, name, await _now(conn), "triggered", row.id)
    return row


async def remove(conn: Conn, name: str) -> Schedule:
    """Sessions that it started go on."""
    gone = await _shown(conn, await _load(conn, name, lock=True))
    await conn.execute("DELETE FROM schedules WHERE name = %s", (name,))
    return gone


# ---------------------------------------------------------------- by the clock


async def fire(conn: Conn, name: str, session: str, generation: str, policy: Policy) -> bool:
    """Do what is due next and move on to the time after it. Whether one was due."""
    found = await rows.one(conn, "SELECT * FROM schedules WHERE name = %s FOR UPDATE", (name,))
    now = await _now(conn)
    if found is None or found["paused"] or found["next_at"] > now:
        return False
    spec, calendar = _spec(found), _calendar(found)
    first = due = found["next_at"].astimezone(UTC)
    if spec.catch_up != "all":
        due = calendar.latest(now, first)
    if due > first:
        await _record(conn, name, first, "missed", detail=f"as were those up to {due.isoformat()}, apart from the last")
    following = calendar.next_after(due)
    if spec.catch_up == "none" and now - due > LATE:
        if due == first:
            await _record(conn, name, due, "missed", detail="no server was there in time")
    elif (running := await _unfinished(conn, name)) is not None and spec.overlap == "skip":
        await _record(conn, name, due, "skipped", detail=f"session {running} goes on")
    else:
        await _started(conn, name, spec, due, session, generation, policy)
    await conn.execute("UPDATE schedules SET next_at = %s WHERE name = %s", (following, name))
    return True


async def _started(
    conn: Conn, name: str, spec: ScheduleSpec, due: datetime, session: str, generation: str, policy: Policy
) -> None:
    try:
        async with conn.transaction():
            key = f"{KEY}{name}:{due.isoformat()}"
            row = await _start(conn, name, spec, session, generation, key, policy)
    except RethawError as error:  # not this time; the next one may be better
        log.warning("schedule %s could not start a session: %s", name, error)
        await _record(conn, name, due, "failed", detail=str(error))
    else:
        await _record(conn, name, due, "started", row.id)


async def _start(
    conn: Conn, name: str, spec: ScheduleSpec, session: str, generation: str, key: str, policy: Policy
) -> Row:
    options = _options(spec, name)
    if spec.agent.template == "auto":
        found = await templates.start_auto(conn, session, generation, spec.agent, spec.args, key, policy, options)
        if found is not None:
            wakeups.note(wakeups.QUEUE_CHANNEL, wakeups.ANY)
            return found[0]
    row, _ = await sessions.create(conn, session, spec.agent, spec.args, key, policy, options)
    return row


async def _unfinished(conn: Conn, name: str) -> str | None:
    found = await rows.one(
        conn,
        """SELECT s.id FROM firings f JOIN sessions s ON s.id = f.session
           WHERE f.schedule = %s AND s.state <> ALL(%s) ORDER BY f.due DESC LIMIT 1""",
        (name, _FINAL),
    )
    return found["id"] if found is not None else None


async def _record(
    conn: Conn, name: str, due: datetime, what: str, session: str | None = None, detail: str | None = None
) -> None:
    await conn.execute(
        """INSERT INTO firings (schedule, due, what, session, detail) VALUES (%s, %s, %s, %s, %s)
           ON CONFLICT DO NOTHING""",
        (name, due, what, session, None if detail is None else rows.clean(detail)[:1000]),
    )
    await conn.execute(
        """DELETE FROM firings f WHERE f.schedule = %s AND f.due <= (
               SELECT o.due FROM firings o WHERE o.schedule = %s ORDER BY o.due DESC OFFSET %s LIMIT 1)
             AND NOT EXISTS (SELECT 1 FROM sessions s WHERE s.id = f.session AND s.state <> ALL(%s))""",
        (name, name, _KEPT, _FINAL),
    )


class Schedules:
    """What the API asks on people's behalf, and what is done as time passes."""

    def __init__(self, transactions: Transactions, policy: Callable[[], Policy]) -> None:
        self._transactions = transactions
        self._run = transactions.run
        self._policy = policy

    async def create(self, name: str, spec: ScheduleSpec, *, replace: bool = False) -> Schedule:
        return await self._run(lambda conn: create(conn, name, spec, replace, self._policy()))

    async def get(self, name: str) -> Schedule:
        async def fn(conn: Conn) -> Schedule:
            return await _shown(conn, await _load(conn, name))

        return await self._run(fn)

    async def every(self) -> list[Schedule]:
        return await self._run(every)

    async def pause(self, name: str, paused: bool) -> Schedule:
        return await self._run(lambda conn: pause(conn, name, paused))

    async def trigger(self, name: str) -> SessionView:
        session, generation = new_id("s"), new_generation()
        return rows.view(await self._run(lambda conn: trigger(conn, name, session, generation, self._policy())))

    async def remove(self, name: str) -> Schedule:
        return await self._run(lambda conn: remove(conn, name))

    async def fire(self) -> bool:
        """Do what is due, of each schedule the next. Whether there may be more. Raises what kept one of them from it, once
        the others have had theirs."""
        due = await self._transactions.db.fetch(
            "SELECT name FROM schedules WHERE NOT paused AND next_at <= clock_timestamp() ORDER BY next_at LIMIT 100"
        )
        more, failed = False, None
        for (name,) in due:
            session, generation = new_id("s"), new_generation()

            async def fn(conn: Conn, name: str = name, session: str = session, generation: str = generation) -> bool:
                done = await fire(conn, name, session, generation, self._policy())
                faults.point("control.schedule.before_commit")
                return done

            try:
                more = await self._run(fn) or more
            except Exception as error:  # of this one: others have their times too
                log.warning("schedule %s: %s", name, error)
                failed = error
            faults.point("control.schedule.after_commit")
        if failed is not None:
            raise failed
        return more
