"""What comes from outside: messages, signals, callbacks. Each may complete a wait, and that may wake the session."""

from __future__ import annotations

from rethaw.control import naps, rows, waits
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.control.waits import Addresses
from rethaw.log.writer import append_for
from rethaw.model.enums import EventType, Reason
from rethaw.model.errors import Conflict, InvalidInput, KeyReused, NotFound, TooLarge
from rethaw.model.types import MESSAGE_LIMIT, Fence, Message, NewEvent


def check_size(payload: bytes) -> None:
    """Raises TooLarge naming both sizes."""
    if len(payload) > MESSAGE_LIMIT:
        raise TooLarge(
            f"the payload has {len(payload)} bytes, at most {MESSAGE_LIMIT} are allowed",
            remedy="send a reference to it, or put it into a file",
            size=len(payload),
            limit=MESSAGE_LIMIT,
        )


def check_open(row: Row) -> None:
    """Raises Conflict for a session that has ended."""
    if row.state.final:
        raise Conflict(f"session {row.id} is {row.state.value}: nothing reaches it any more", state=row.state.value)


def check_name(name: str) -> None:
    if not 0 < len(name) <= 200 or "\0" in name:
        raise InvalidInput(f"{name[:80]!r} cannot name a signal", remedy="use 1 to 200 characters, no NUL")


async def send(conn: Conn, session: str, message: str, payload: bytes, key: str | None, policy: Policy) -> Message:
    """Put a message into the inbox under the next number. `key` makes it idempotent."""
    check_size(payload)
    row = await rows.load(conn, session, lock=True)
    sent, new = await _take(conn, row, message, payload, key)
    if not new:
        if sent.payload != payload:
            raise KeyReused(f"key {key!r} was used for another message of session {session}", remedy="use a new key")
        return sent
    check_open(row)  # else it was not taken: the transaction ends here
    await _received(conn, row, sent)
    await waits.settle(conn, row, policy)
    if row.reason == Reason.NAP:
        await naps.rouse(conn, await rows.load(conn, row.id), policy)
    return sent


async def put(
    conn: Conn, row: Row, message: str, payload: bytes, key: str | None, *, repeats: str | None = None
) -> Message:
    """The next message of the locked row. `repeats`: one that it delivers again."""
    sent, _ = await _take(conn, row, message, payload, key)
    await _received(conn, row, sent, repeats)
    return sent


_TAKE = """
WITH former AS (
    SELECT number, id, payload, at FROM inbox
    WHERE session = %(session)s AND (id = %(message)s OR idempotency_key = %(key)s) LIMIT 1
), made AS (
    INSERT INTO inbox (session, number, id, payload, idempotency_key, seq)
    SELECT %(session)s, coalesce(max(number), %(base)s) + 1, %(message)s, %(payload)s, %(key)s, %(seq)s
    FROM inbox WHERE session = %(session)s HAVING NOT EXISTS (SELECT 1 FROM former)
    RETURNING number, id, payload, at
)
SELECT *, false AS new FROM former UNION ALL SELECT *, true FROM made"""


async def _take(conn: Conn, row: Row, message: str, payload: bytes, key: str | None) -> tuple[Message, bool]:
    """The message of this id or key, and whether it is new: then it has the next number, and its event is to be next."""
    values = {
        "session": row.id,
        "message": message,
        "base": row.inbox_base,
        "payload": payload,
        "key": key,
        "seq": row.last_seq + 1,
    }
    taken = await rows.one(conn, _TAKE, values)
    assert taken is not None
    found = Message(id=taken["id"], number=taken["number"], payload=bytes(taken["payload"]), at=taken["at"])
    return found, bool(taken["new"])


async def _received(conn: Conn, row: Row, sent: Message, repeats: str | None = None) -> None:
    data = {"message": sent.id, "number": sent.number, **({"repeats": repeats} if repeats else {})}
    event = NewEvent(type=EventType.MESSAGE_RECEIVED, data=data, body=sent.payload)
    (received,) = await rows.append(conn, row.id, event)
    if received.seq != row.last_seq + 1:  # not in a transaction of its own: other events came before
        await conn.execute("UPDATE inbox SET seq = %s WHERE id = %s", (received.seq, sent.id))


async def read(conn: Conn, session: str, after: int, limit: int) -> list[Message]:
    """The inbox, consumed or not, in order; without what came after a position that was forked from or rewound to."""
    found = await rows.many(
        conn,
        """SELECT i.id, i.number, i.payload, i.at FROM sessions s, rethaw_spans(s.id, s.line) w
           JOIN inbox i ON i.session = w.session AND i.seq > w.after AND i.seq <= w.upto
           WHERE s.id = %s AND i.number > %s ORDER BY i.number LIMIT %s""",
        (session, after, limit),
    )
    return [Message(id=r["id"], number=r["number"], payload=bytes(r["payload"]), at=r["at"]) for r in found]


_MOVE = """INSERT INTO inbox_moves (session, line, seq, number) SELECT %s, o_line, o_seq, %s
    FROM {appended} ON CONFLICT DO NOTHING"""


async def consume(conn: Conn, fence: Fence, attempt: int, number: int) -> None:
    """The guest's cursor moved to `number`. One statement: what the agent says next waits for the row's lock. Raises Fenced,
    NotFound."""
    data = {"number": number}
    event = NewEvent(type=EventType.MESSAGE_CONSUMED, data=data, key=f"consumed:{attempt}:{number}")
    await append_for(conn, fence, event, _MOVE, (fence.session, number))


async def signal(
    conn: Conn, session: str, signal_id: str, name: str, payload: bytes, key: str | None, policy: Policy
) -> str:
    """Keep a signal for the oldest wait of that name, now or later. Returns its id."""
    check_size(payload)
    check_name(name)
    row = await rows.load(conn, session, lock=True)
    former = await rows.one(
        conn,
        "SELECT * FROM signals WHERE session = %s AND (id = %s OR idempotency_key = %s)",
        (session, signal_id, key),
    )
    if former is not None:
        if bytes(former["payload"]) != payload or former["name"] != name:
            raise KeyReused(f"key {key!r} was used for another signal of session {session}", remedy="use a new key")
        return str(former["id"])
    check_open(row)
    await keep_signal(conn, row, signal_id, name, payload, key, None)
    await waits.settle(conn, row, policy)
    return signal_id


async def callback(conn: Conn, token: str, signal_id: str, payload: bytes, policy: Policy) -> str:
    """Complete the one wait that the address was made for. Raises NotFound, and Conflict the second time."""
    check_size(payload)
    digest = Addresses.hash(token)
    known = await rows.one(conn, "SELECT session FROM callbacks WHERE hash = %s", (digest,))
    if known is None:
        raise NotFound("there is no such callback address", remedy="check that it was copied whole")
    row = await rows.load(conn, known["session"], lock=True)
    found = await rows.one(conn, "SELECT * FROM callbacks WHERE hash = %s", (digest,))
    assert found is not None
    mine = await rows.one(conn, "SELECT id FROM signals WHERE id = %s", (signal_id,))
    if mine is not None:
        return signal_id  # this very call, repeated after the reply to its commit was lost
    if found["used_at"] is not None:
        raise Conflict("this callback address was used already", remedy="each works once")
    check_open(row)
    wait = await waits.find(conn, row.id, found["attempt"], found["wait"])
    if wait is None or wait["name"] is None:
        raise NotFound("nothing waits at this callback address any more")
    if wait["state"] == "cancelled" or wait["state"] == "done":
        raise Conflict(f"nothing waits at this callback address any more: its wait is {wait['state']}")
    await conn.execute("UPDATE callbacks SET used_at = now() WHERE hash = %s", (digest,))
    await keep_signal(conn, row, signal_id, wait["name"], payload, None, (found["attempt"], found["wait"]))
    await waits.settle(conn, row, policy)
    return signal_id


async def keep_signal(
    conn: Conn,
    row: Row,
    signal_id: str,
    name: str,
    payload: bytes,
    key: str | None,
    only: tuple[int, str] | None,
    *,
    repeats: str | None = None,
) -> None:
    """A signal of the locked row. `only`: the wait (attempt, id) that it is for; `repeats`: one that it delivers again."""
    data = {"name": name, "signal": signal_id, **({"repeats": repeats} if repeats else {})}
    event = NewEvent(type=EventType.SIGNAL_RECEIVED, data=data, body=payload)
    (received,) = await rows.append(conn, row.id, event)
    await conn.execute(
        """INSERT INTO signals (session, id, name, payload, idempotency_key, seq, for_attempt, for_wait)
           VALUES (%s, %s, %s, %s, %s, %s, %s, %s)""",
        (row.id, signal_id, name, payload, key, received.seq, *(only or (None, None))),
    )
