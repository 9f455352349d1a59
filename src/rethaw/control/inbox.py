"""What comes from outside: messages, signals, callbacks. Each may complete a wait, and that may wake the session."""

from __future__ import annotations

from rethaw.control import rows, waits
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.control.waits import Addresses
from rethaw.model.enums import EventType
from rethaw.model.errors import Conflict, InvalidInput, KeyReused, NotFound, TooLarge
from rethaw.model.types import MESSAGE_LIMIT, Message, NewEvent


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
    former = await rows.one(
        conn,
        "SELECT * FROM inbox WHERE session = %s AND (id = %s OR idempotency_key = %s)",
        (session, message, key),
    )
    if former is not None:
        if bytes(former["payload"]) != payload:
            raise KeyReused(f"key {key!r} was used for another message of session {session}", remedy="use a new key")
        return Message(id=former["id"], number=former["number"], payload=payload, at=former["at"])
    check_open(row)
    sent = await put(conn, row, message, payload, key)
    await waits.settle(conn, row, policy)
    return sent


async def put(
    conn: Conn, row: Row, message: str, payload: bytes, key: str | None, *, repeats: str | None = None
) -> Message:
    """The next message of the locked row. `repeats`: one that it delivers again."""
    session = row.id
    taken = await rows.one(
        conn,
        """INSERT INTO inbox (session, number, id, payload, idempotency_key)
           SELECT %s, coalesce(max(number), %s) + 1, %s, %s, %s FROM inbox WHERE session = %s RETURNING number, at""",
        (session, row.inbox_base, message, payload, key, session),
    )
    assert taken is not None
    data = {"message": message, "number": taken["number"], **({"repeats": repeats} if repeats else {})}
    event = NewEvent(type=EventType.MESSAGE_RECEIVED, data=data, body=payload)
    (received,) = await rows.append(conn, session, event)
    await conn.execute("UPDATE inbox SET seq = %s WHERE id = %s", (received.seq, message))
    return Message(id=message, number=taken["number"], payload=payload, at=taken["at"])


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


async def consume(conn: Conn, row: Row, attempt: int, number: int) -> None:
    """The guest's cursor moved to `number`."""
    data = {"number": number}
    event = NewEvent(type=EventType.MESSAGE_CONSUMED, data=data, key=f"consumed:{attempt}:{number}")
    done = (await rows.append(conn, row.id, event))[0]
    await conn.execute(
        "INSERT INTO inbox_moves (session, line, seq, number) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (row.id, done.line, done.seq, number),
    )


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
    await conn.execute(
        """INSERT INTO signals (session, id, name, payload, idempotency_key, for_attempt, for_wait)
           VALUES (%s, %s, %s, %s, %s, %s, %s)""",
        (row.id, signal_id, name, payload, key, *(only or (None, None))),
    )
    data = {"name": name, "signal": signal_id, **({"repeats": repeats} if repeats else {})}
    event = NewEvent(type=EventType.SIGNAL_RECEIVED, data=data, body=payload)
    (received,) = await rows.append(conn, row.id, event)
    await conn.execute("UPDATE signals SET seq = %s WHERE id = %s", (received.seq, signal_id))
