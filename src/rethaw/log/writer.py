"""Appending events inside somebody's transaction. One SQL function, one round trip (0001_log.sql: rethaw_append)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, LiteralString

import psycopg
from psycopg.rows import tuple_row

from rethaw.db.pool import Connection, translated
from rethaw.log import encoding
from rethaw.log.lineage import FORMAT
from rethaw.model.enums import EventType
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import Event, Fence, NewEvent

CHANNEL = "rethaw_log"  # NOTIFY channel; the payload is the session's id

_APPEND_ONE = "SELECT * FROM rethaw_append_one(%s, %s, %s, %s, %s, %s::int, %s::smallint, %b, %s)"
_APPEND = (
    "SELECT * FROM rethaw_append(%s, %s, %s::text[], %s::text[], %s::text[], %s::int[], %s::smallint[],"
    " %b::bytea[], %s)"
)


async def create_session_in(conn: Connection, session: str) -> None:
    """The session's row and its first line. Raises Conflict when the id is or was in use."""
    cursor = await conn.execute(
        "WITH s AS (INSERT INTO sessions (id, log_format) SELECT %s, %s::smallint WHERE NOT EXISTS (SELECT 1 FROM erasures WHERE session = %s)"
        " ON CONFLICT DO NOTHING RETURNING id)"
        " INSERT INTO lines (session, line, branch_seq, why) SELECT id, 1, 0, 'start' FROM s",
        (session, FORMAT, session),
    )
    if cursor.rowcount != 1:
        raise Conflict(f"session {session} exists, or was erased", remedy="use a new id")


async def append_in(
    conn: Connection, session: str, events: Sequence[NewEvent], *, generation: str | None, notify: bool = True
) -> list[Event]:
    """Append `events` in order at the session's current line and attempt; one result for each, in order.

    Locks the session's row until the transaction ends. An event whose key is visible on the current path already is
    not written again: the first one is returned. Raises Fenced when `generation` is given and not current, NotFound,
    InvalidInput. Events without a key are written each time: give keys where the transaction may be repeated.
    """
    if not events:
        return []
    rows = await encoding.rows(events)
    return await append_rows(conn, session, events, rows, generation=generation, notify=notify)


async def append_rows(
    conn: Connection,
    session: str,
    events: Sequence[NewEvent],
    rows: encoding.Rows,
    *,
    generation: str | None,
    notify: bool,
) -> list[Event]:
    """`append_in` with the events encoded already (a repeat need not compress them again)."""
    columns = (rows.types, rows.datas, rows.keys, rows.sizes, rows.codecs, rows.bodies)
    one = len(events) == 1
    params = (session, generation, *((column[0] for column in columns) if one else columns), notify)
    try:
        # The cursor is made by hand: the connection may have a row factory of its owner's.
        async with conn.cursor(row_factory=tuple_row, binary=True) as cursor:
            await cursor.execute(_APPEND_ONE if one else _APPEND, params)
            answer = await cursor.fetchall()
    except psycopg.Error as e:
        own = translated(e)
        if own is None:
            raise
        raise own from e
    out: list[Event] = []
    for event, row in zip(events, answer, strict=True):
        if not row[4]:
            out.append(
                Event(
                    session=session, seq=row[0], line=row[1], attempt=row[2], at=row[3],
                    type=event.type, data=event.data, body=event.body, key=shown_key(event.key),
                )
            )  # fmt: skip
        else:
            out.append(event_of(session, (*row[:4], *row[5:])))
    return out


async def append_for(
    conn: Connection, fence: Fence, event: NewEvent, use: LiteralString, params: Sequence[Any]
) -> None:
    """Append `event`, under its fence, within one statement: `use`, which selects o_seq and o_line from {appended}, with
    `params` for what stands before that. What is refused is psycopg's error, which the pool translates."""
    rows = await encoding.rows([event])
    columns = (rows.types, rows.datas, rows.keys, rows.sizes, rows.codecs, rows.bodies)
    query = use.replace("{appended}", _APPEND_ONE.removeprefix("SELECT * FROM "))
    async with conn.cursor(binary=True) as cursor:
        given = (*params, fence.session, fence.generation, *(column[0] for column in columns), False)
        await cursor.execute(query, given)


def event_of(session: str, row: Sequence[Any], *, superseded: bool = False) -> Event:
    """An event from columns seq, line, attempt, at, type, key, data, size, codec, body."""
    seq, line, attempt, at, kind, key, data, size, codec, body = row
    return Event(
        session=session, seq=seq, line=line, attempt=attempt, at=at, type=EventType(kind), key=shown_key(key),
        data=encoding.load_data(data), body=None if body is None else encoding.unpack(body, codec, size),
        superseded=superseded,
    )  # fmt: skip


def shown_key(key: str | None) -> str | None:
    return None if key is None or key.startswith(encoding.OWN_KEY) else key


async def open_line_in(
    conn: Connection,
    session: str,
    branch_seq: int,
    why: str,
    snapshot: str | None,
    *,
    parent: int | None = None,
    attempt: int | None = None,
    key: str | None = None,
    back_to: tuple[int, int] | None = None,
) -> int:
    """A new line that sees `parent` (default: the session's current line) up to `branch_seq`; the session moves to it,
    and to `attempt` when given. `back_to`: line and seq of a rewind; what came after that is of no concern to the new
    line, recorded answers, messages and signals included.

    Appends line.opened {line, parent, branch_seq, snapshot?, why, seq?} itself and returns the line's number. Raises
    NotFound, and InvalidInput when `branch_seq` lies beyond the log.
    """
    cursor = await conn.execute("SELECT line, last_seq FROM sessions WHERE id = %s FOR UPDATE", (session,))
    row = await cursor.fetchone()
    if row is None:
        raise NotFound(f"no session {session}", remedy="check the id")
    old, last_seq = int(row[0]), int(row[1])
    if not 0 <= branch_seq <= last_seq:
        raise InvalidInput(f"session {session} ends at {last_seq}, a line cannot branch off at {branch_seq}")
    parent = old if parent is None else parent
    cursor = await conn.execute(
        "WITH l AS (INSERT INTO lines (session, line, parent, parent_session, branch_seq, why, snapshot,"
        " from_session, from_line, from_seq, opened_after)"
        " SELECT session, max(line) + 1, %(parent)s, nullif(rethaw_owner(session, %(parent)s), session), %(branch)s,"
        " %(why)s, %(snapshot)s, rethaw_owner(session, %(line)s::int), %(line)s::int, %(seq)s::bigint,"
        " CASE WHEN %(line)s::int IS NOT NULL THEN %(last)s::bigint END"
        " FROM lines WHERE session = %(session)s GROUP BY session"
        " RETURNING session, line, opened_after) UPDATE sessions s SET line = l.line,"
        " attempt = coalesce(%(attempt)s::int, s.attempt), branch_after = coalesce(l.opened_after, s.branch_after)"
        " FROM l WHERE s.id = l.session RETURNING l.line",
        {"parent": parent, "branch": branch_seq, "why": why, "snapshot": snapshot, "session": session,
         "attempt": attempt, "last": last_seq, "line": back_to and back_to[0], "seq": back_to and back_to[1]},
    )  # fmt: skip
    (line,) = await cursor.fetchone() or (0,)
    data: dict[str, Any] = {"line": line, "parent": parent, "branch_seq": branch_seq, "why": why}
    if snapshot is not None:
        data["snapshot"] = snapshot
    if back_to is not None:
        data["seq"] = back_to[1]
    await append_in(
        conn, session, [NewEvent(type=EventType.LINE_OPENED, data=data, key=key)], generation=None
    )  # fmt: skip
    return int(line)


async def erase_in(conn: Connection, session: str) -> None:
    """Erase the session whole, rows of other rooms that reference it included; a tombstone stays. Raises NotFound."""
    try:
        await conn.execute("SELECT rethaw_erase(%s)", (session,))
    except psycopg.Error as e:
        own = translated(e)
        if own is None:
            raise
        raise own from e
