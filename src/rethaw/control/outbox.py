"""The outbox: what an agent sent becomes visible once nothing can roll it back."""

from __future__ import annotations

from rethaw.control import lineage, rows, spawned
from rethaw.control.rows import Conn, Row
from rethaw.log.writer import event_of
from rethaw.model.enums import EventType
from rethaw.model.errors import RethawError
from rethaw.model.ids import new_id
from rethaw.model.types import Event, Message, NewEvent

_SENT = """SELECT e.seq, e.line, e.attempt, e.at, e.type, e.key, e.data, e.size, e.codec, e.body
    FROM events e JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
    WHERE e.session = ANY(%s) AND e.type = 'message.sent' AND e.seq > %s AND e.seq <= %s ORDER BY e.seq"""


async def publish(conn: Conn, row: Row, upto: int | None) -> None:
    """Publish what the path of the locked row sent up to the position `upto` (None: all of it).

    A message that the agent sent again, by the same call with the same payload, after its line had been left is the
    one that is published already."""
    limit = row.last_seq if upto is None else upto
    if limit <= row.published_seq:
        return
    sessions = await lineage.sessions(conn, row)
    cursor = await conn.execute(_SENT, (row.id, row.line, sessions, row.published_seq, limit))
    for record in await cursor.fetchall():
        await _publish_one(conn, row, event_of(row.id, record))
    await spawned.publish(conn, row, sessions, limit)
    await rows.update(conn, row.id, published_seq=limit)


async def _publish_one(conn: Conn, row: Row, sent: Event) -> None:
    payload = sent.body if sent.body is not None else b"null"
    message = str(sent.data.get("message") or new_id("m"))
    again = await rows.one(
        conn,
        "SELECT id, number FROM outbox WHERE session = %s AND (id = %s OR (source = %s AND payload = %s)) LIMIT 1",
        (row.id, message, sent.key, payload),
    )
    if again is not None:
        await conn.execute("UPDATE outbox SET line = %s, seq = %s WHERE id = %s", (sent.line, sent.seq, again["id"]))
        await _place(conn, row, sent, again["id"], again["number"])
        return
    taken = await rows.one(
        conn,
        """INSERT INTO outbox (session, number, id, payload, line, seq, source)
           SELECT %s, coalesce(max(number), %s) + 1, %s, %s, %s, %s, %s FROM outbox WHERE session = %s
           RETURNING number""",
        (row.id, row.outbox_base, message, payload, sent.line, sent.seq, sent.key, row.id),
    )
    if taken is None:
        raise RethawError(f"message {message} of session {row.id} got no number")
    await _place(conn, row, sent, message, taken["number"])
    data = {"message": message, "number": taken["number"]}
    await rows.append(conn, row.id, NewEvent(type=EventType.MESSAGE_PUBLISHED, data=data, key=f"published:{message}"))


async def _place(conn: Conn, row: Row, sent: Event, message: str, number: int) -> None:
    await conn.execute(
        """INSERT INTO outbox_places (session, message, number, line, seq) VALUES (%s, %s, %s, %s, %s)
           ON CONFLICT DO NOTHING""",
        (row.id, message, number, sent.line, sent.seq),
    )


# What an ancestor had published of the line that the fork left it on: that line's snapshot, restored or not, has it.
_SHARED = """FROM sessions f, rethaw_path(f.id, f.first_line) p
    JOIN outbox_places q ON q.session = p.session AND q.line = p.line AND q.seq <= p.upto
    JOIN outbox o ON o.id = q.message WHERE f.id = %s AND p.session <> f.id"""


async def shared_until(conn: Conn, fork: str) -> int:
    """The highest number that a fork's outbox has from its ancestors."""
    found = await rows.one(conn, f"SELECT coalesce(max(o.number), 0) AS n {_SHARED}", (fork,))
    return int(found["n"]) if found else 0


async def read(conn: Conn, session: str, after: int, limit: int) -> list[Message]:
    """Published messages with a number > `after`, in order; of a fork with those that its ancestors had published."""
    own = "SELECT id, number, payload, at FROM outbox WHERE session = %s AND number > %s ORDER BY number LIMIT %s"
    found = await rows.many(conn, own, (session, after, limit))
    base = await rows.one(conn, "SELECT outbox_base AS n FROM sessions WHERE id = %s", (session,))
    if base is not None and base["n"] > after:
        shared = await rows.many(
            conn,
            f"SELECT DISTINCT o.id, o.number, o.payload, o.at {_SHARED} AND o.number > %s ORDER BY o.number LIMIT %s",
            (session, after, limit),
        )
        found = [*shared, *found][:limit]
    return [Message(id=r["id"], number=r["number"], payload=bytes(r["payload"]), at=r["at"]) for r in found]
