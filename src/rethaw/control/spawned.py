"""What an agent does to other sessions (spawn, send to a child, cancel it) counts once nothing can roll it back: the same
rule as for the outbox. Here it is written down as due; control/children.py does it."""

from __future__ import annotations

import json

from rethaw.control import rows, wakeups
from rethaw.control.rows import Conn, Row
from rethaw.log.writer import event_of
from rethaw.model.enums import EventType
from rethaw.model.types import Event

_DONE = """SELECT e.seq, e.line, e.attempt, e.at, e.type, e.key, e.data, e.size, e.codec, e.body
    FROM events e JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
    WHERE e.session = ANY(%s) AND e.type IN ('child.spawned', 'child.told') AND e.seq > %s AND e.seq <= %s
    ORDER BY e.seq"""


async def publish(conn: Conn, row: Row, sessions: list[str], limit: int) -> None:
    """What the path of the locked row holds of it up to the position `limit` is due. Repeats find it there already."""
    cursor = await conn.execute(_DONE, (row.id, row.line, sessions, row.published_seq, limit))
    done = [event_of(row.id, record) for record in await cursor.fetchall()]
    for event in done:
        if event.type == EventType.CHILD_SPAWNED:
            await _spawn(conn, row, event)
        else:
            await _act(conn, row, event)
    if done:
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
