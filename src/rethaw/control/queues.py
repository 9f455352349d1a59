"""Queues: who starts next, and how many at once.

A slot is given out in `placement.dispatch`, by which everything passes that wants a node, under the lock of the queue's
row; it is given back in `rows.move`, by which every end and every suspending passes. A queue without a row has no limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rethaw.control import rows, wakeups
from rethaw.control.rows import Conn, Row
from rethaw.control.wakeups import Transactions
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.nearest import did_you_mean
from rethaw.model.queue_types import Queue
from rethaw.model.starting import (
    DEFAULT_QUEUE,
    check_concurrency_key,
    check_name,
    check_priority,
    check_tags,
    check_wait,
)
from rethaw.model.types import StartOptions

UNCOUNTED = ""  # the queue of children and of templates' own sessions: no limit can be set for it
_LEAST_TTL_S = 0.1
_SHOWN = 10
# Sessions (s, with spec p and queue q) that want a slot now, and that some live node could take.
_WANTS = """p.slot = 'waiting' AND s.node IS NULL AND s.state IN ('created', 'queued', 'resuming', 'recovering')
    AND (p.not_before IS NULL OR p.not_before <= clock_timestamp())
    AND (p.expires_at IS NULL OR p.expires_at > clock_timestamp())"""
PLACEABLE = """EXISTS (
    SELECT 1 FROM nodes n WHERE n.lease_until > now() AND n.memory_bytes >= s.memory_bytes
      AND (s.restored IS NULL OR n.id = (SELECT x.node FROM snapshots x WHERE x.id = s.restored)))"""
# Ids are in the order of their making.
_ORDER = "-p.priority, p.session"
_BATCH = 200


def check_options(options: StartOptions) -> None:
    """Raises InvalidInput naming the value and the remedy."""
    check_name("queue", options.queue)
    check_priority(options.priority)
    check_tags(options.tags)
    if options.concurrency_key is not None:
        check_concurrency_key(options.concurrency_key)
    if options.delay_s is not None:
        check_wait("a delay", options.delay_s)
    if options.ttl_s is not None:
        check_wait("a ttl", options.ttl_s, least=_LEAST_TTL_S)


async def enter(conn: Conn, session: str, options: StartOptions, *, queue: str | None = None) -> None:
    """A new session wants a slot. `queue`: in place of that of `options`."""
    await conn.execute(
        """UPDATE session_specs SET queue = %s, priority = %s, concurrency_key = %s, tags = %s, slot = 'waiting',
               not_before = CASE WHEN %s::float8 > 0 THEN now() + make_interval(secs => %s::float8) END,
               expires_at = now() + make_interval(secs => coalesce(%s::float8, 0) + %s::float8)
           WHERE session = %s""",
        (
            options.queue if queue is None else queue,
            options.priority,
            options.concurrency_key,
            list(dict.fromkeys(options.tags)),
            options.delay_s,
            options.delay_s,
            options.delay_s,
            options.ttl_s,
            session,
        ),
    )
    if options.ttl_s is not None:
        wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    if options.delay_s:
        wakeups.note(wakeups.QUEUE_CHANNEL, wakeups.ANY)


# ---------------------------------------------------------------- slots


async def admits(conn: Conn, row: Row) -> bool:
    """Whether the locked row has a slot of its queue, or it is its turn to have one; then nobody else is given one until
    the transaction ends."""
    found = await rows.one(
        conn,
        """SELECT p.slot, p.queue, p.not_before > clock_timestamp() AS early, q.name FROM session_specs p
           LEFT JOIN queues q ON q.name = p.queue WHERE p.session = %s""",
        (row.id,),
    )
    assert found is not None
    if found["slot"] == "held":
        return True
    if found["early"]:
        return False
    if found["name"] is None:
        return True
    limits = await rows.one(conn, "SELECT * FROM queues WHERE name = %s FOR UPDATE", (found["queue"],))
    return limits is None or row.id in await _turn(conn, limits, until=row.id)


async def would_wait(conn: Conn, options: StartOptions) -> bool:
    """Whether a session that is started now would not get a slot at once. Of a queue with limits: perhaps, unless it is
    empty."""
    if options.delay_s:
        return True
    found = await rows.one(
        conn,
        """SELECT q.paused OR EXISTS (
               SELECT 1 FROM session_specs p WHERE p.slot = 'waiting' AND p.queue = q.name)
             OR (SELECT count(*) FROM session_specs p WHERE p.slot = 'held' AND p.queue = q.name) >= q.max_sessions
             OR (SELECT count(*) FROM session_specs p WHERE p.slot = 'held' AND p.queue = q.name
                 AND p.concurrency_key = %s) >= q.max_per_key AS wait
           FROM queues q WHERE q.name = %s""",
        (options.concurrency_key, options.queue),
    )
    return bool(found and found["wait"])


async def take(conn: Conn, row: Row) -> None:
    """Its slot is the locked row's from now on."""
    await conn.execute(
        "UPDATE session_specs SET slot = 'held', expires_at = NULL WHERE session = %s AND slot <> 'held'", (row.id,)
    )


async def _turn(conn: Conn, limits: dict[str, Any], *, until: str | None = None, most: int = 1_000_000) -> list[str]:
    """Those whose turn it is in a queue with `limits`, first come first: as many as there are free slots (at most `most`, no
    more after `until`), of one key as many as it may have."""
    if limits["paused"]:
        return []
    per_key, free = limits["max_per_key"], most
    held = await rows.many(
        conn,
        """SELECT concurrency_key AS key, count(*) AS n FROM session_specs
           WHERE slot = 'held' AND queue = %s GROUP BY 1""",
        (limits["name"],),
    )
    if limits["max_sessions"] is not None:
        free = min(free, limits["max_sessions"] - sum(r["n"] for r in held))
    used: dict[str, int] = {r["key"]: r["n"] for r in held if r["key"] is not None}
    out: list[str] = []
    after: tuple[int, str] | None = None
    while len(out) < free:
        found = await rows.many(
            conn,
            f"""SELECT p.session, p.priority, p.concurrency_key AS key
                FROM session_specs p JOIN sessions s ON s.id = p.session
                WHERE p.queue = %(queue)s AND {_WANTS} AND {PLACEABLE}
                  AND (p.concurrency_key IS NULL OR p.concurrency_key <> ALL(%(full)s))
                  AND (%(session)s::text IS NULL OR (-p.priority, p.session) > (%(minus)s::int, %(session)s::text))
                ORDER BY {_ORDER} LIMIT %(batch)s""",
            {
                "queue": limits["name"], "batch": min(_BATCH, free - len(out)) if per_key is None else _BATCH,
                "full": [key for key, n in used.items() if per_key is not None and n >= per_key],
                "minus": after and after[0], "session": after and after[1],
            },
        )  # fmt: skip
        for one in found:
            key, after = one["key"], (-one["priority"], one["session"])
            if per_key is not None and key is not None:
                if used.get(key, 0) >= per_key:
                    continue
                used[key] = used.get(key, 0) + 1
            out.append(one["session"])
            if len(out) == free or one["session"] == until:
                return out
        if not found:
            return out
    return out


async def next_up(conn: Conn, limit: int) -> list[str]:
    """Sessions that a slot is free for, in the order that they are to have one; those of queues without limits first."""
    found = await rows.many(
        conn,
        f"""SELECT p.session FROM session_specs p JOIN sessions s ON s.id = p.session
            WHERE {_WANTS} AND {PLACEABLE} AND NOT EXISTS (SELECT 1 FROM queues q WHERE q.name = p.queue)
            ORDER BY {_ORDER} LIMIT %s""",
        (limit,),
    )
    out = [r["session"] for r in found]
    for limits in await rows.many(
        conn,
        """SELECT q.* FROM queues q WHERE NOT q.paused AND EXISTS (
               SELECT 1 FROM session_specs p WHERE p.slot = 'waiting' AND p.queue = q.name)
           ORDER BY q.name""",
    ):
        out += await _turn(conn, limits, most=limit)
    return out


async def overdue(conn: Conn, session: str) -> Row | None:
    """The row, locked, of one that has not started and was to have by now."""
    row = await rows.load(conn, session, lock=True)
    found = await rows.one(
        conn,
        """SELECT 1 AS ok FROM session_specs
           WHERE session = %s AND slot = 'waiting' AND expires_at <= clock_timestamp()""",
        (session,),
    )
    return None if found is None or row.state.final else row


# ---------------------------------------------------------------- why


@dataclass(frozen=True)
class Obstacle:
    """Why a session gets no slot now. `kind`: "timer" or "queue"."""

    kind: str
    text: str
    ends_with: str


async def obstacle(conn: Conn, row: Row, *, counted: bool = False) -> Obstacle | None:
    """None when the row has a slot or would get one. `counted`: its text has how many are before it, which is true for
    the moment only."""
    found = await rows.one(
        conn,
        f"""SELECT p.slot, p.not_before, p.not_before > clock_timestamp() AS early, {PLACEABLE} AS placeable, q.*
            FROM session_specs p JOIN sessions s ON s.id = p.session
            LEFT JOIN queues q ON q.name = p.queue WHERE p.session = %s""",
        (row.id,),
    )
    if found is None or found["slot"] != "waiting":
        return None
    if found["early"]:
        at = found["not_before"].isoformat(timespec="seconds")
        return Obstacle("timer", f"it starts at {at}", f"time: {at}")
    if found["name"] is None:
        return None
    if found["paused"]:
        return Obstacle("queue", f"queue {row.queue} is paused", f"rethaw queue resume {row.queue}")
    if row.id in await _turn(conn, found, until=row.id):
        return None
    numbers = await rows.one_named(
        conn,
        f"""SELECT count(*) FILTER (WHERE p.slot = 'held') AS held,
                   count(*) FILTER (WHERE p.slot = 'held' AND p.concurrency_key = %(key)s) AS held_key,
                   count(*) FILTER (WHERE {_WANTS} AND (-p.priority, p.session) < (%(minus)s, %(id)s)) AS ahead
            FROM session_specs p JOIN sessions s ON s.id = p.session WHERE p.queue = %(queue)s AND p.slot <> 'free'""",
        {
            "key": row.concurrency_key, "minus": -row.priority, "id": row.id, "queue": row.queue,
        },
    )  # fmt: skip
    most, key_most, key = found["max_sessions"], found["max_per_key"], row.concurrency_key
    if key_most is not None and key is not None and numbers["held_key"] >= key_most:
        said = f"queue {row.queue} lets {key_most} run at once with key {key!r}, now {numbers['held_key']} do"
    elif most is not None and numbers["held"] >= most:
        said = f"queue {row.queue} lets {most} run at once, now {numbers['held']} do"
    elif found["placeable"]:
        said = f"it is not its turn in queue {row.queue}"
    else:
        return None
    said = f"{said}; {numbers['ahead']} wait before it" if counted else said
    return Obstacle("queue", said, "the end of one of them")


# ---------------------------------------------------------------- what people ask


async def every(conn: Conn) -> list[Queue]:
    """Those with a row, and those that unfinished sessions are in; the default one always."""
    return await _read(conn, None)


async def get(conn: Conn, name: str) -> Queue:
    """With the first of those that wait. Raises NotFound for one that nobody has used or set."""
    check_name("queue", name)
    found = await _read(conn, name)
    if not found:
        known = [one.name for one in await every(conn)]
        raise NotFound(
            f"there is no queue {name!r}", remedy=did_you_mean(name, known, "`rethaw queue ls` shows those there are")
        )
    first = await rows.many(
        conn,
        f"""SELECT p.session FROM session_specs p JOIN sessions s ON s.id = p.session
            WHERE p.queue = %s AND {_WANTS} ORDER BY {_ORDER} LIMIT %s""",
        (name, _SHOWN),
    )
    return found[0].model_copy(update={"next": tuple(r["session"] for r in first)})


async def _read(conn: Conn, name: str | None) -> list[Queue]:
    found = await rows.many(
        conn,
        f"""WITH used AS (
                SELECT p.queue, count(*) FILTER (WHERE p.slot = 'held') AS running,
                       count(*) FILTER (WHERE {_WANTS}) AS waiting,
                       count(*) FILTER (WHERE p.slot = 'waiting' AND p.not_before > clock_timestamp()) AS delayed
                FROM session_specs p JOIN sessions s ON s.id = p.session
                WHERE p.slot <> 'free' AND p.queue <> '' GROUP BY 1
            ), names AS (SELECT name FROM queues UNION SELECT queue FROM used UNION SELECT %(default)s)
            SELECT n.name AS called, q.*, u.running, u.waiting, u.delayed FROM names n
            LEFT JOIN queues q ON q.name = n.name LEFT JOIN used u ON u.queue = n.name
            WHERE %(name)s::text IS NULL OR n.name = %(name)s ORDER BY n.name""",
        {"name": name, "default": DEFAULT_QUEUE},
    )
    return [
        Queue(
            name=r["called"],
            limit=r["max_sessions"],
            key_limit=r["max_per_key"],
            paused=bool(r["paused"]),
            suspended="free" if r["suspended_count"] is False else "count",
            running=r["running"] or 0,
            waiting=r["waiting"] or 0,
            delayed=r["delayed"] or 0,
        )
        for r in found
    ]


async def change(conn: Conn, name: str, changes: dict[str, Any]) -> Queue:
    """Set some of limit, key_limit, paused, suspended. What runs already goes on, whatever a new limit says."""
    check_name("queue", name)
    for field in ("limit", "key_limit"):
        value = changes.get(field)
        if value is not None and not 1 <= value <= 1_000_000:
            raise InvalidInput(
                f"{field} {value} of queue {name} does not fit", remedy='use 1 or more, "none", or pause the queue'
            )
    columns = {"limit": "max_sessions", "key_limit": "max_per_key", "paused": "paused", "suspended": "suspended_count"}
    values = {columns[k]: v == "count" if k == "suspended" else v for k, v in changes.items()}
    await conn.execute("INSERT INTO queues (name) VALUES (%s) ON CONFLICT DO NOTHING", (name,))
    former = await rows.one(conn, "SELECT * FROM queues WHERE name = %s FOR UPDATE", (name,))
    now = {**(former or {}), **values}
    await conn.execute(
        """UPDATE queues SET max_sessions = %s, max_per_key = %s, paused = %s, suspended_count = %s WHERE name = %s""",
        (now["max_sessions"], now["max_per_key"], now["paused"], now["suspended_count"], name),
    )
    if "suspended" in changes:
        await _count_suspended(conn, name, bool(now["suspended_count"]))
    wakeups.note(wakeups.QUEUE_CHANNEL, wakeups.ANY)
    return (await _read(conn, name))[0]


async def _count_suspended(conn: Conn, name: str, count: bool) -> None:
    slots = ("free", "held") if count else ("held", "free")
    await conn.execute(
        """UPDATE session_specs p SET slot = %s FROM sessions s
           WHERE s.id = p.session AND p.queue = %s AND p.slot = %s AND s.state = 'suspended'
             AND s.reason <> 'node_stopped'""",
        (slots[1], name, slots[0]),
    )


async def remove(conn: Conn, name: str) -> Queue:
    """Its limits go. Raises NotFound, and Conflict while sessions are in it."""
    found = await get(conn, name)
    locked = await rows.one(conn, "SELECT 1 AS ok FROM queues WHERE name = %s FOR UPDATE", (name,))
    if locked is None:
        raise NotFound(f"queue {name!r} has no limits to remove", remedy="`rethaw queue ls` shows those that have")
    used = await rows.one(
        conn, "SELECT count(*) AS n FROM session_specs WHERE queue = %s AND slot <> 'free'", (name,)
    )  # fmt: skip
    if used is not None and used["n"]:
        raise Conflict(
            f"{used['n']} unfinished sessions are in queue {name}",
            remedy=f"end them first, or lift its limits: `rethaw queue set {name} --limit none --key-limit none`",
        )
    await conn.execute("DELETE FROM queues WHERE name = %s", (name,))
    return found


class Queues:
    """What the API asks on people's behalf."""

    def __init__(self, transactions: Transactions) -> None:
        self._run = transactions.run

    async def every(self) -> list[Queue]:
        return await self._run(every)

    async def get(self, name: str) -> Queue:
        return await self._run(lambda conn: get(conn, name))

    async def change(self, name: str, changes: dict[str, Any]) -> Queue:
        return await self._run(lambda conn: change(conn, name, changes))

    async def remove(self, name: str) -> Queue:
        return await self._run(lambda conn: remove(conn, name))
