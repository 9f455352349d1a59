"""What an agent does to other sessions (spawn, send to a child, cancel it) counts once nothing can roll it back: the same
rule as for the outbox. Here it is written down as due; control/children.py does it."""

from __future__ import annotations

import json

from rethaw.control import rows, wakeups
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import EventType
from rethaw.model.ids import new_id
from rethaw.model.types import Event

TYPES = (EventType.CHILD_SPAWNED, EventType.CHILD_TOLD)


async def publish(conn: Conn, row: Row, event: Event) -> None:
    """What `event` of the locked row's path says is due. Repeats find it there already."""
    if event.type == EventType.CHILD_SPAWNED:
        await _spawn(conn, row, event)
    else:
        await _act(conn, row, event)
    wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)


async def _spawn(conn: Conn, row: Row, event: Event) -> None:
    await conn.execute(
        "INSERT INTO children (child, parent, source, spec) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (event.data["child"], row.id, event.key, (event.body or b"").decode()),
    )


async def _act(conn: Conn, row: Row, event: Event) -> None:
    await conn.execute(
        """INSERT INTO child_acts (id, parent, child, act, source, payload) VALUES (%s, %s, %s, %s, %s, %s)
           ON CONFLICT DO NOTHING""",
        (event.data["id"], row.id, event.data["child"], event.data["act"], event.key, event.body),
    )


async def abandon(conn: Conn, row: Row) -> None:
    """The current attempt of the locked row has failed, and its code runs again from its start: children that have not ended
    are nobody's, and would be made a second time. They are cancelled, unless its retries say that they are kept."""
    if row.agent.retries is not None and row.agent.retries.children == "keep":
        return
    why = f"attempt {row.attempt} of its parent {row.id} failed"
    await conn.execute(
        """UPDATE children SET state = 'ended', ended_at = clock_timestamp(), outcome = %s
           WHERE parent = %s AND state = 'due'""",
        (json.dumps({"state": "cancelled", "reason": "cancelled", "detail": why}), row.id),
    )
    alive = await rows.many(conn, "SELECT child FROM children WHERE parent = %s AND state = 'running'", (row.id,))
    for found in alive:
        await cancel(conn, row.id, found["child"])
    if alive:
        wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)


async def cancel(conn: Conn, parent: str, child: str) -> None:
    """As an act of its own, done in a transaction of its own."""
    await conn.execute(
        "INSERT INTO child_acts (id, parent, child, act, source) VALUES (%s, %s, %s, 'cancel', 'end')",
        (new_id("m"), parent, child),
    )


async def former_child(conn: Conn, session: str, source: str, spec: str) -> str | None:
    """The child that the same call made with the same agent and arguments, before its line was left."""
    found = await rows.one(
        conn, "SELECT child FROM children WHERE parent = %s AND source = %s AND spec = %s", (session, source, spec)
    )
    return None if found is None else str(found["child"])


async def former_act(conn: Conn, session: str, source: str, child: str, act: str, payload: bytes | None) -> str | None:
    """As `former_child`, of a message or a cancelling."""
    found = await rows.one(
        conn,
        """SELECT id FROM child_acts WHERE parent = %s AND source = %s AND child = %s AND act = %s
           AND payload IS NOT DISTINCT FROM %s""",
        (session, source, child, act, payload),
    )
    return None if found is None else str(found["id"])


def spec_text(spec: str, args: str) -> str:
    """Agent and arguments of a child, each JSON text, as its event and its row have them."""
    return f'{{"agent":{spec},"args":{args}}}'


def parts_of(text: str) -> tuple[str, str]:
    """Back again."""
    found = json.loads(text)
    return json.dumps(found["agent"]), json.dumps(found["args"])
