"""How a session ends, whoever says so."""

from __future__ import annotations

from collections.abc import Sequence

from rethaw.control import placement, rows, wakeups
from rethaw.control.outbox import publish
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Reason, State
from rethaw.model.ids import new_generation
from rethaw.model.types import NewEvent


async def finish(
    conn: Conn,
    row: Row,
    state: State,
    *,
    reason: Reason,
    detail: str | None = None,
    exit_code: int | None = None,
    events: Sequence[NewEvent] = (),
    reported: bool = False,
    publish_rest: bool = True,
) -> Row:
    """Move the locked row to a final state. Nothing can be rolled back any more, so what its path still holds back is
    published, unless `publish_rest` says that the path ends in the middle of a crash. A sandbox that may still be there
    is fenced and killed, unless its node itself `reported` the end."""
    await rows.append(conn, row.id, *events)
    if publish_rest:
        await publish(conn, await rows.load(conn, row.id), None)
    await conn.execute("UPDATE waits SET state = 'stale' WHERE session = %s AND state = 'open'", (row.id,))
    await placement.clear(conn, row.id)
    untold = row.parent is not None or state in (State.FAILED, State.CANCELLED)  # see control/children.py
    generation = row.generation
    if row.state.on_node and not reported and row.node is not None:
        await placement.assign(conn, row, "kill", reason=reason)
        generation = new_generation()
    row = await rows.move(
        conn,
        row,
        state,
        reason=reason,
        detail=detail,
        reported=reported,
        exit_code=exit_code,
        generation=generation,
        give_up_at=None,
        cancel_by=None,
        untold=untold,
        retry_at=None,
    )
    if untold:
        wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    return row
