"""The outbox: what an agent sent becomes visible once nothing can roll it back."""

from __future__ import annotations

from rethaw.control import lineage, rows, spawned, wakeups
from rethaw.control.rows import Conn, Row
from rethaw.log.writer import event_of
from rethaw.model.enums import EventType, State
from rethaw.model.errors import RethawError
from rethaw.model.ids import new_id
from rethaw.model.types import Event, Message, NewEvent

_SENT = """SELECT e.seq, e.line, e.attempt, e.at, e.type, e.key, e.data, e.size, e.codec, e.body
    FROM events e JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
    WHERE e.session = ANY(%s) AND e.type = ANY(%s) AND e.seq > %s AND e.seq <= %s ORDER BY e.seq"""


# A message that is published already is placed on the new line; any other gets the next number.
_PUBLISH = """
WITH again AS (
    SELECT id FROM outbox
    WHERE session = %(session)s AND (id = %(message)s OR (source = %(source)s AND payload = %(payload)s)) LIMIT 1
), moved AS (
    UPDATE outbox SET line = %(line)s, seq = %(seq)s WHERE id = (SELECT id FROM again) RETURNING id, number, false AS new
), made AS (
    INSERT INTO outbox (session, number, id, payload, line, seq, source)
    SELECT %(session)s, coalesce(max(number), %(base)s) + 1, %(message)s, %(payload)s, %(line)s, %(seq)s, %(source)s
    FROM outbox WHERE session = %(session)s HAVING NOT EXISTS (SELECT 1 FROM again)
    RETURNING id, number, true AS new
), it AS (SELECT * FROM moved UNION ALL SELECT * FROM made), placed AS (
    INSERT INTO outbox_places (session, message, number, line, seq)
    SELECT %(session)s, id, number, %(line)s, %(seq)s FROM it ON CONFLICT DO NOTHING
)
SELECT number, new FROM it"""
_TYPES = [EventType.MESSAGE_SENT.value, *(kind.value for kind in spawned.TYPES)]


async def publish(conn: Conn, row: Row, upto: int | None) -> None:
    """Publish what the path of the locked row sent up to the position `upto` (None: all of it); what it did to children is
    due from then on (control/spawned.py).

    A message that the agent sent again, by the same call with the same payload, after its line had been left is the
    one that is published already."""
    limit = row.last_seq if upto is None else upto
    if limit <= row.published_seq:
        return
    wakeups.note(wakeups.OUTBOX_CHANNEL, row.id)
    sessions = await lineage.sessions(conn, row)
    cursor = await conn.execute(_SENT, (row.id, row.line, sessions, _TYPES, row.published_seq, limit))
    for event in [event_of(row.id, record) for record in await cursor.fetchall()]:
        if event.type == EventType.MESSAGE_SENT:
            await _publish_one(conn, row, event)
        else:
            await spawned.publish(conn, row, event)
    await rows.update(conn, row.id, published_seq=limit)


async def _publish_one(conn: Conn, row: Row, sent: Event) -> None:
    payload = sent.body if sent.body is not None else b"null"
    message = str(sent.data.get("message") or new_id("m"))
    values = {
        "session": row.id,
        "message": message,
        "base": row.outbox_base,
        "payload": payload,
        "line": sent.line,
        "seq": sent.seq,
        "source": sent.key,
    }
    taken = await rows.one(conn, _PUBLISH, values)
    if taken is None:
        raise RethawError(f"message {message} of session {row.id} got no number")
    if taken["new"]:
        data = {"message": message, "number": taken["number"]}
        event = NewEvent(type=EventType.MESSAGE_PUBLISHED, data=data, key=f"published:{message}")
        await rows.append(conn, row.id, event)


# What an ancestor had published of the line that the fork left it on: that line's snapshot, restored or not, has it.
_SHARED_BY = """FROM sessions f, rethaw_path(f.id, f.first_line) p
    JOIN outbox_places q ON q.session = p.session AND q.line = p.line AND q.seq <= p.upto
    JOIN outbox o ON o.id = q.message WHERE p.session <> f.id AND"""
_SHARED = f"{_SHARED_BY} f.id = %s"
# The highest number that the outbox of the fork `s` (a row of sessions) has from its ancestors.
SHARED_UNTIL = f"SELECT coalesce(max(o.number), 0) {_SHARED_BY} f.id = s.id"


_OWN = """SELECT s.state, s.outbox_base, o.* FROM sessions s
    LEFT JOIN LATERAL (SELECT id, number, payload, at FROM outbox WHERE session = s.id AND number > %s
                       ORDER BY number LIMIT %s) o ON true
    WHERE s.id = %s ORDER BY o.number"""


async def look(conn: Conn, session: str, after: int, limit: int) -> tuple[bool, list[Message]]:
    """Whether the session has ended, and its published messages with a number > `after`, in order; of a fork with those
    that its ancestors had published. Raises NotFound."""
    own = await rows.many(conn, _OWN, (after, limit, session))
    if not own:
        raise rows.unknown(session)
    base, over = own[0]["outbox_base"], State(own[0]["state"]).final
    found = [one for one in own if one["id"] is not None]
    if base > after:
        shared = await rows.many(
            conn,
            f"SELECT DISTINCT o.id, o.number, o.payload, o.at {_SHARED} AND o.number > %s ORDER BY o.number LIMIT %s",
            (session, after, limit),
        )
        found = [*shared, *found][:limit]
    return over, [Message(id=r["id"], number=r["number"], payload=bytes(r["payload"]), at=r["at"]) for r in found]
