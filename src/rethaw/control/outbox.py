"""The outbox: what an agent sent becomes visible once nothing can roll it back."""

from __future__ import annotations

from rethaw.control import rows
from rethaw.control.rows import Conn, Row
from rethaw.log.writer import event_of
from rethaw.model.enums import EventType
from rethaw.model.errors import RethawError
from rethaw.model.ids import new_id
from rethaw.model.types import Event, Message, NewEvent

_SENT = """SELECT e.seq, e.line, e.attempt, e.at, e.type, e.key, e.data, e.size, e.codec, e.body
    FROM events e JOIN rethaw_path(%s, %s) p ON e.line = p.line AND e.seq <= p.upto
    WHERE e.session = %s AND e.type = 'message.sent' AND e.seq > %s AND e.seq <= %s ORDER BY e.seq"""


async def publish(conn: Conn, row: Row, upto: int | None) -> None:
    """Publish what the path of the locked row sent up to the position `upto` (None: all of it).

    A message that the agent sent again, by the same call with the same payload, after its line had been left is the
    one that is published already."""
    limit = row.last_seq if upto is None else upto
    if limit <= row.published_seq:
        return
    cursor = await conn.execute(_SENT, (row.id, row.line, row.id, row.published_seq, limit))
    for record in await cursor.fetchall():
        await _publish_one(conn, row, event_of(row.id, record))
    await rows.update(conn, row.id, published_seq=limit)


async def _publish_one(conn: Conn, row: Row, sent: Event) -> None:
    payload = sent.body if sent.body is not None else b"null"
    message = str(sent.data.get("message") or new_id("m"))
    again = await rows.one(
        conn,
        "SELECT id FROM outbox WHERE session = %s AND (id = %s OR (source = %s AND payload = %s)) LIMIT 1",
        (row.id, message, sent.key, payload),
    )
    if again is not None:
        await conn.execute("UPDATE outbox SET line = %s, seq = %s WHERE id = %s", (sent.line, sent.seq, again["id"]))
        return
    taken = await rows.one(
        conn,
        """INSERT INTO outbox (session, number, id, payload, line, seq, source)
           SELECT %s, coalesce(max(number), 0) + 1, %s, %s, %s, %s, %s FROM outbox WHERE session = %s
           RETURNING number""",
        (row.id, message, payload, sent.line, sent.seq, sent.key, row.id),
    )
    if taken is None:
        raise RethawError(f"message {message} of session {row.id} got no number")
    data = {"message": message, "number": taken["number"]}
    await rows.append(conn, row.id, NewEvent(type=EventType.MESSAGE_PUBLISHED, data=data, key=f"published:{message}"))


async def read(conn: Conn, session: str, after: int, limit: int) -> list[Message]:
    """Published messages with a number > `after`, in order."""
    found = await rows.many(
        conn,
        "SELECT id, number, payload, at FROM outbox WHERE session = %s AND number > %s ORDER BY number LIMIT %s",
        (session, after, limit),
    )
    return [Message(id=r["id"], number=r["number"], payload=bytes(r["payload"]), at=r["at"]) for r in found]
