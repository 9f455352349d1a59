"""Somebody connects to a session: one that policy suspended goes on, as for a message."""

from __future__ import annotations

from rethaw.control import reports, rows
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Desired, State
from rethaw.model.errors import Conflict, SessionEnded

RUNS = (State.RUNNING, State.WAITING)


async def rouse(conn: Conn, session: str, policy: Policy) -> Row:
    """The row afterwards. Raises SessionEnded, and Conflict for one that a person suspended."""
    row = await rows.load(conn, session)
    if row.state in RUNS:
        return row
    row = await rows.load(conn, session, lock=True)
    if row.state.final or row.desired == Desired.CANCELLED:
        said = row.state.value if row.state.final else "being cancelled"
        raise SessionEnded(f"session {row.id} is {said}: nothing in it answers any more", state=row.state.value)
    if row.state in (State.SUSPENDED, State.SUSPENDING) and row.desired == Desired.SUSPENDED:
        raise Conflict(
            f"session {row.id} was suspended by somebody and stays so until somebody resumes it",
            remedy=f"rethaw resume {row.id}",
            state=row.state.value,
        )
    return await reports.wake(conn, row, policy)
