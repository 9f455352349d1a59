"""Sessions that policy suspended for a time (reason `nap`): what their programs wait for cannot be seen, if it is anything."""

from __future__ import annotations

from rethaw.control import recovery, rows, wakeups
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Reason, State


async def begin(conn: Conn, row: Row) -> Row:
    """The locked row has just been suspended."""
    if row.reason != Reason.NAP or row.agent.nap_s is None:
        return row
    await conn.execute(
        "UPDATE sessions SET nap_until = clock_timestamp() + make_interval(secs => %s) WHERE id = %s",
        (row.agent.nap_s, row.id),
    )
    wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    return await rows.load(conn, row.id)


async def over(conn: Conn, session: str, policy: Policy) -> None:
    """Its time has come."""
    row = await rows.load(conn, session, lock=True)
    if row.reason == Reason.NAP and row.policy_suspended:
        await recovery.resume(conn, row, policy)
    else:
        await rows.update(conn, row.id, nap_until=None)


async def rouse(conn: Conn, row: Row, policy: Policy) -> None:
    """A message has come for the locked row, which its program may want to look for."""
    if row.reason != Reason.NAP:
        return
    if row.policy_suspended:
        await recovery.resume(conn, row, policy)
    elif row.state == State.SUSPENDING:
        await rows.update(conn, row.id, wake=True)
