"""What nodes report of the lives they run."""

from __future__ import annotations

from rethaw.control import lineage, naps, placement, recovery, retries, rows, transitions, waits
from rethaw.control.endings import finish
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Desired, Durability, EventType, Reason, State
from rethaw.model.errors import Conflict
from rethaw.model.types import NewEvent, StateChange

_ALIVE = (State.RUNNING, State.WAITING)
_COMING = (State.STARTING, State.RESUMING, State.RECOVERING)


async def report(conn: Conn, row: Row, change: StateChange, policy: Policy) -> Row:
    """Move the locked row to what its node observed. Repeating a report is harmless (give its events keys)."""
    if row.state == change.state and (row.state.final or row.state in (*_ALIVE, State.SUSPENDING, State.SUSPENDED)):
        if not row.state.final:
            await rows.append(conn, row.id, *change.events)
        return await rows.load(conn, row.id)
    transitions.check(row.id, row.state, change.state, reported=True)
    if change.state.final:
        return await _ended(conn, row, change)
    if change.state == State.SUSPENDED:
        return await _suspended(conn, row, change, policy)
    events = change.events
    if row.state in _COMING:
        started = any(e.type == EventType.ATTEMPT_STARTED for e in events)
        if row.restored is None and not started:
            data = {
                "attempt": row.attempt,
                "fresh": row.attempt > 1 or row.crashes > 0,
                "command": list(row.agent.command) or row.agent.entry,
            }
            key = f"attempt.started:{row.generation}"
            events = (*events, NewEvent(type=EventType.ATTEMPT_STARTED, data=data, key=key))
        await placement.clear(
            conn, row.id, keep=("kill", "snapshot", "limits")
        )  # one asked for meanwhile is still wanted
    if change.state == State.SUSPENDING:
        await conn.execute("DELETE FROM assignments WHERE session = %s AND action = 'suspend'", (row.id,))
    # A failed suspension that a person asked for is theirs to repeat; of another one the person's wish is still open.
    failed = row.state == State.SUSPENDING and row.reason == Reason.REQUESTED
    if failed and change.state in _ALIVE and row.desired == Desired.SUSPENDED:
        # Or the next crash, whenever it comes, would put to sleep what nobody thinks of any more.
        await rows.update(conn, row.id, desired=Desired.RUNNING.value)
        row = await rows.load(conn, row.id)
    coming = row.state in _COMING or (row.state == State.SUSPENDING and not failed)
    row = await rows.move(
        conn,
        row,
        change.state,
        reason=change.reason,
        detail=change.detail,
        events=events,
        reported=True,
        wake=False,
    )
    if coming and row.desired == Desired.SUSPENDED:
        await placement.assign(conn, row, "suspend", reason=Reason.REQUESTED)
    elif coming and row.desired == Desired.CANCELLED:
        await placement.assign(conn, row, "cancel", reason=Reason.CANCELLED)
    return row


async def wake(conn: Conn, row: Row, policy: Policy) -> Row:
    """Something that the node watches for the session has come."""
    if row.policy_suspended:
        return await recovery.resume(conn, row, policy)
    if row.state == State.SUSPENDING:
        await rows.update(conn, row.id, wake=True)
    return await rows.load(conn, row.id)


async def set_degraded(conn: Conn, row: Row, degraded: bool, detail: str, durability: Durability) -> None:
    """The row's flag, and an event when it changes."""
    if row.degraded == degraded:
        return
    kind = EventType.DURABILITY_DEGRADED if degraded else EventType.DURABILITY_RESTORED
    await rows.append(conn, row.id, NewEvent(type=kind, data={"detail": detail, "durability": durability.value}))
    await rows.update(conn, row.id, degraded=degraded)


async def _ended(conn: Conn, row: Row, change: StateChange) -> Row:
    state, reason = change.state, change.reason
    if row.desired == Desired.CANCELLED and state != State.CANCELLED and not await _has_result(conn, row, change):
        state, reason = State.CANCELLED, Reason.CANCELLED
    events = change.events
    if change.exit_code is not None and not any(e.type == EventType.ATTEMPT_EXITED for e in events):
        data = {"attempt": row.attempt, "exit_code": change.exit_code}
        events = (*events, NewEvent(type=EventType.ATTEMPT_EXITED, data=data))
    if state == State.FAILED and reason == Reason.EXITED:
        return await retries.failed(conn, row, change.exit_code, change.detail, events)
    return await finish(
        conn,
        row,
        state,
        reason=reason,
        detail=change.detail,
        exit_code=change.exit_code,
        events=events,
        reported=True,
    )


async def _has_result(conn: Conn, row: Row, change: StateChange) -> bool:
    """A cancelled agent that finished its work all the same is shown as what it is."""
    if change.state != State.COMPLETED:
        return False
    if any(e.type == EventType.SESSION_RESULT for e in change.events):
        return True
    return bool(
        await rows.many(
            conn,
            """SELECT 1 FROM events e
               JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
               WHERE e.session = ANY(%s) AND e.type = 'session.result' AND e.attempt = %s LIMIT 1""",
            (row.id, row.line, await lineage.sessions(conn, row), row.attempt),
        )
    )


async def _suspended(conn: Conn, row: Row, change: StateChange, policy: Policy) -> Row:
    """Refused unless what was captured may sleep: it is durable, nobody wants it running, and it has heard of
    everything that came."""

    def refuse(why: str) -> Conflict:
        return Conflict(f"session {row.id} is not to be suspended: {why}", remedy="let the guest go on", session=row.id)

    if row.desired == Desired.CANCELLED:
        raise refuse("it is being cancelled")
    if row.desired == Desired.RUNNING and change.reason == Reason.REQUESTED:
        raise refuse("somebody wants it running")
    found = await placement.snapshot_row(conn, row.snapshot) if row.snapshot else None
    if found is None or placement.snapshot_info(found).generation != row.generation:
        raise refuse("no snapshot of this life is durable")
    if row.desired == Desired.RUNNING and change.reason != Reason.NODE_STOPPED:
        if row.wake:
            raise refuse("what it waits for has come")
        wait = await waits.unheard(conn, row, found["seq"], change.waits)
        if wait is not None:
            raise refuse(f"wait {wait} was completed meanwhile")
    reason = Reason.REQUESTED if row.desired == Desired.SUSPENDED else change.reason
    row = await rows.move(
        conn,
        row,
        State.SUSPENDED,
        reason=reason,
        detail=change.detail,
        events=change.events,
        reported=True,
        node=None,
        incarnation=None,
        wake=False,
    )
    await placement.clear(conn, row.id)
    return await naps.begin(conn, row)
