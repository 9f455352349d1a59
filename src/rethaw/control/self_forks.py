"""`ctx.fork()`: an agent forks itself from a snapshot in which that very call is open, and both sides are answered."""

from __future__ import annotations

from rethaw.control import forks, lineage, rows
from rethaw.control.rows import Conn, Row
from rethaw.model.errors import Conflict
from rethaw.model.types import AgentFork


async def known(conn: Conn, row: Row, attempt: int, call: str) -> AgentFork | None:
    """What became of the call in this session: it made a fork that the path knows of, or it made this session (or one that
    this session was forked from)."""
    born = await rows.one(
        conn,
        """SELECT k.session, k.fork FROM agent_forks k JOIN rethaw_ancestry(%s) a ON a.session = k.fork
           WHERE k.attempt = %s AND k.call = %s""",
        (row.id, attempt, call),
    )
    if born is not None:
        return AgentFork(session=row.id, parent=born["session"], forked=True)
    shown = await lineage.path(conn, row)
    for made in await rows.many(
        conn,
        "SELECT * FROM agent_forks WHERE session = %s AND attempt = %s AND call = %s ORDER BY seq DESC",
        (row.id, attempt, call),
    ):
        if shown.shows(made["line"], made["seq"]):
            return AgentFork(session=made["fork"], parent=row.id, forked=False)
    return None


async def fork(conn: Conn, row: Row, attempt: int, call: str, snapshot: str, ident: str, generation: str) -> AgentFork:
    """A new session `ident` from `snapshot`, unless the call has made one already."""
    if attempt != row.attempt:
        raise Conflict(f"attempt {attempt} of session {row.id} is over", remedy=f"its current one is {row.attempt}")
    before = await known(conn, row, attempt, call)
    if before is not None:
        return before
    await forks.fork(conn, row.id, snapshot, {ident: generation}, False)
    await conn.execute(
        """INSERT INTO agent_forks (session, attempt, call, fork, line, seq)
           SELECT %s, %s, %s, %s, n.line, n.seq FROM snapshots n WHERE n.id = %s""",
        (row.id, attempt, call, ident, snapshot),
    )
    return AgentFork(session=ident, parent=row.id, forked=False)
