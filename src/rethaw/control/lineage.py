"""What the current path of a session shows, and opening a new line when a life is abandoned."""

from __future__ import annotations

from typing import Any, LiteralString

from rethaw.control import rows, spawned
from rethaw.control.rows import Conn, Row
from rethaw.log.lineage import Reach, path_in, visible
from rethaw.log.writer import open_line_in
from rethaw.model.enums import EventType

# What an agent does by its own will; output is not among them, it repeats itself after each restore.
AGENT_EVENTS = [
    EventType.EXCHANGE_REQUESTED.value,
    EventType.EXCHANGE_ADOPTED.value,
    EventType.MESSAGE_SENT.value,
    EventType.MESSAGE_CONSUMED.value,
    EventType.CHILD_SPAWNED.value,
    EventType.CHILD_TOLD.value,
    EventType.WAIT_OPENED.value,
    EventType.EMITTED.value,
    EventType.SESSION_RESULT.value,
]


class Path:
    """The lines whose events a reader sees, each up to a position."""

    def __init__(self, reaches: list[Reach]) -> None:
        self._reaches = reaches

    def shows(self, line: int | None, seq: int | None) -> bool:
        return line is not None and seq is not None and visible(self._reaches, line, seq)


async def path(conn: Conn, row: Row) -> Path:
    """The path of the session's current line."""
    return Path(await path_in(conn, row.id, row.line))


async def sessions(conn: Conn, row: Row) -> list[str]:
    """Whose rows the session's log is in: its own, and of a fork its ancestors'."""
    if row.forked_from is None:
        return [row.id]
    return [r["session"] for r in await rows.many(conn, "SELECT session FROM rethaw_ancestry(%s)", (row.id,))]


def _progress(session: LiteralString, line: LiteralString, attempt: LiteralString) -> LiteralString:
    return f"""SELECT count(*) AS n FROM events e
        JOIN rethaw_path({session}, {line}) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
        WHERE e.session = ANY(ARRAY(SELECT session FROM rethaw_ancestry({session})))
          AND e.attempt = {attempt} AND e.type = ANY(%(agent_events)s)"""


# `progress` of `s`, a row of sessions; takes `agent_events`.
PROGRESS = _progress("s.id", "s.line", "s.attempt")
_PROGRESS = _progress("%(session)s", "%(line)s", "%(attempt)s")


async def progress(conn: Conn, row: Row) -> int:
    """How many things the agent did on the path in its current attempt (input of the crash-loop rule)."""
    values = {"session": row.id, "line": row.line, "attempt": row.attempt, "agent_events": AGENT_EVENTS}
    return int((await rows.one_named(conn, _PROGRESS, values))["n"])


async def open_line(
    conn: Conn,
    row: Row,
    parent: int,
    branch_seq: int,
    *,
    why: str,
    snapshot: str | None,
    new_attempt: bool = False,
    attempt: int | None = None,
    back_to: tuple[int, int] | None = None,
) -> Row:
    """Leave the current line at `branch_seq` of `parent`; waits are as they were there. `back_to`: of a rewind, the line
    and seq that it goes back to; `attempt` the one of that time."""
    columns: dict[str, Any] = {"published_seq": min(row.published_seq, branch_seq)}
    high = max(row.attempt, row.high_attempt)
    if new_attempt:
        attempt = high + 1
        columns |= {"attempt_line": parent, "attempt_seq": branch_seq, "files_from": None}
    elif attempt is not None and attempt != row.attempt:
        columns |= {"attempt_line": parent, "attempt_seq": branch_seq, "high_attempt": high, "files_from": None}
    await rows.update(conn, row.id, **columns)
    await open_line_in(conn, row.id, branch_seq, why, snapshot, parent=parent, attempt=attempt, back_to=back_to)
    row = await rows.load(conn, row.id)
    await _set_back_waits(conn, row, await path(conn, row))
    return row


async def _set_back_waits(conn: Conn, row: Row, shown: Path) -> None:
    """Waits are as they were at the branch: completed later is open again, opened later is stale until repeated."""
    for found in await rows.many(conn, "SELECT * FROM waits WHERE session = %s AND state <> 'stale'", (row.id,)):
        state = found["state"]
        if state in ("done", "cancelled") and shown.shows(found["done_line"], found["done_seq"]):
            continue
        opened = shown.shows(found["opened_line"], found["opened_seq"])
        wanted = "open" if opened and found["attempt"] == row.attempt else "stale"
        if wanted != state:
            await conn.execute(
                """UPDATE waits SET state = %s, done_line = NULL, done_seq = NULL, given_at = NULL, timed_out = false
                   WHERE session = %s AND attempt = %s AND id = %s""",
                (wanted, row.id, found["attempt"], found["id"]),
            )


async def boot_anew(conn: Conn, row: Row, why: str) -> Row:
    """A new attempt whose context is the log up to the newest durable position: what came after it was not visible
    outside yet, and the new attempt may do it again."""
    await spawned.abandon(conn, row)
    line, seq = row.loop_line, row.loop_seq
    if line is None or seq is None:
        newest = await rows.one(
            conn,
            """SELECT s.line, s.seq FROM snapshots s
               JOIN rethaw_path(%s, %s) p ON s.session = p.session AND s.line = p.line AND s.seq <= p.upto
               WHERE s.session = ANY(%s) AND s.attempt = %s ORDER BY s.seq DESC LIMIT 1""",
            (row.id, row.line, await sessions(conn, row), row.attempt),
        )
        if newest is not None:
            line, seq = newest["line"], newest["seq"]
        else:
            line, seq = row.attempt_line, row.attempt_seq
    return await open_line(conn, row, line, seq, why=why, snapshot=None, new_attempt=True)
