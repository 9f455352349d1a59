"""Lines and paths: which events the session's current line sees.

A line sees its parent's events up to `branch_seq`, then its own. The path of a session is its current line, back
through the parents, and through those of the session that it was forked from (0003_forks.sql). What the world outside the guest did (`STAYS`) is on every path: no rollback undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rethaw.db.pool import Connection
from rethaw.model.enums import EventType
from rethaw.model.errors import Conflict, NotFound
from rethaw.model.types import Line

FORMAT = 1  # of a log: what its rows mean. In sessions.log_format; logs of every former one are read (tests/golden)
FOREVER = (1 << 63) - 1  # upto_seq of the current line

# Equal to the SQL function rethaw_stays (0003_forks.sql); a test compares them.
STAYS: frozenset[EventType] = frozenset(
    {
        EventType.SESSION_CREATED,
        EventType.SESSION_STATE,
        EventType.SESSION_CRASHED,
        EventType.SESSION_FORKED,
        EventType.LINE_OPENED,
        EventType.MESSAGE_RECEIVED,
        EventType.MESSAGE_PUBLISHED,
        EventType.SIGNAL_RECEIVED,
        EventType.EXCHANGE_UPSTREAM,
        EventType.EXCHANGE_COMPLETED,
        EventType.EXCHANGE_FAILED,
        EventType.EXCHANGE_HELD,
        EventType.EXCHANGE_REISSUED,
        EventType.EXCHANGE_TORN,
        EventType.EXCHANGE_ORPHANED,
        EventType.SNAPSHOT_CREATED,
        EventType.SNAPSHOT_RESTORED,
        EventType.SNAPSHOT_FAILED,
        EventType.SNAPSHOT_UNUSABLE,
        EventType.DURABILITY_DEGRADED,
        EventType.DURABILITY_RESTORED,
        EventType.CHANNEL_MALFORMED,
    }
)


@dataclass(frozen=True)
class Reach:
    """One line of a path and the last seq of it that is visible."""

    line: int
    upto: int


async def lines_in(conn: Connection, session: str) -> list[Line]:
    """Every line of the session, oldest first."""
    cursor = await conn.execute(
        "SELECT line, parent, branch_seq FROM lines WHERE session = %s ORDER BY line", (session,)
    )
    return [Line(line=row[0], parent=row[1], branch_seq=row[2]) for row in await cursor.fetchall()]


async def path_in(conn: Connection, session: str, line: int | None = None) -> list[Reach]:
    """The path of `line` (default: the session's current one), newest line first. Raises NotFound."""
    cursor = await conn.execute(
        "SELECT p.line, p.upto FROM sessions s, rethaw_path(s.id, coalesce(%s::int, s.line)) p WHERE s.id = %s",
        (line, session),
    )
    path = [Reach(row[0], row[1]) for row in await cursor.fetchall()]
    if not path:
        raise NotFound(f"no session {session}" + ("" if line is None else f" with a line {line}"))
    return path


def visible(path: list[Reach], line: int, seq: int) -> bool:
    """Whether an event of `line` at `seq` is on the path (types in `STAYS` always are)."""
    return any(reach.line == line and seq <= reach.upto for reach in path)


@dataclass(frozen=True)
class Part:
    """A stretch of a session's log and whose rows it is in: seq from `after` + 1 up to `upto`."""

    session: str
    after: int
    upto: int


async def parts_in(conn: Connection, session: str) -> list[Part]:
    """The whole log of `session`, its ancestors' parts first; empty for an unknown session. Never changes. Raises Conflict
    for a log whose format is newer than FORMAT."""
    cursor = await conn.execute(
        "SELECT a.session, least(s.fork_seq, a.upto), a.upto, s.log_format FROM rethaw_ancestry(%s) a"
        " JOIN sessions s ON s.id = a.session ORDER BY a.depth DESC",
        (session,),
    )
    found = await cursor.fetchall()
    for row in found:
        if row[3] > FORMAT:
            raise Conflict(
                f"the log of session {row[0]} has format {row[3]}, this Rethaw reads formats up to {FORMAT}",
                remedy="start the newer Rethaw that wrote it",
            )
    return [Part(row[0], row[1], row[2]) for row in found]
