"""The ways back: planned resume, and a new line after a crash. Both end in `placement.dispatch`."""

from __future__ import annotations

from typing import Any

from rethaw.control import crashloop, lineage, placement, retries, rows
from rethaw.control.crashloop import Death, Level, Step
from rethaw.control.endings import finish
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.ids import new_generation
from rethaw.model.types import MIB, NewEvent, SnapshotInfo

# Doing the same again cannot end otherwise.
_FINAL_REASONS = (Reason.COMMAND_NOT_FOUND, Reason.IMAGE_FAILED)


async def resume(conn: Conn, row: Row, policy: Policy) -> Row:
    """A suspended session goes on: same line, new generation, from its newest usable snapshot."""
    snapshots = await placement.usable(conn, row)
    if not snapshots:
        row = await lineage.boot_anew(conn, row, "no snapshot is usable")
    restored = snapshots[0].id if snapshots else None
    row = await rows.move(
        conn,
        row,
        State.RESUMING,
        reason=row.reason,
        generation=new_generation(),
        restored=restored,
        snapshot=restored,
        life_progress=await lineage.progress(conn, row),
        node=None,
        incarnation=None,
        wake=False,
    )
    row = await placement.dispatch(conn, row, policy)
    return row


async def crashed(conn: Conn, row: Row, reason: Reason, detail: str, policy: Policy, *, counted: bool = True) -> Row:
    """The life of the locked row is over. `counted`: whether it may have been the agent's fault."""
    if row.state.final or row.state == State.SUSPENDED:
        return row  # nothing of it was running any more
    if row.desired == Desired.CANCELLED:
        return await finish(conn, row, State.CANCELLED, reason=Reason.CANCELLED, detail=detail, reported=True)
    if reason in _FINAL_REASONS:
        return await finish(conn, row, State.FAILED, reason=reason, detail=detail, reported=True)
    snapshots = await placement.usable(conn, row)
    newest = snapshots[0] if snapshots else None
    parent = _parent(snapshots)
    death = Death(
        counted=counted and reason is not Reason.NODE_LOST and not row.crash_asked,
        progress=await lineage.progress(conn, row),
        at_start=row.life_progress,
        snapshot=newest is not None,
        parent=parent is not None,
    )
    loop, step = crashloop.next_step(row.loop, death, policy)
    crash = NewEvent(
        type=EventType.SESSION_CRASHED,
        data={"reason": reason.value, "detail": detail, "generation": row.generation, "next": step.value},
    )
    if step == Step.FAIL:
        await rows.update(conn, row.id, crashes=row.crashes + 1)
        end, why = _give_up(row, reason, detail, newest)
        return await retries.gave_up(conn, row, end, why, [crash])
    back_to = (row.loop_line, row.loop_seq)
    if loop.level == Level.NEWEST:
        back_to = (None, None)
    elif back_to[0] is None and newest is not None:
        back_to = (newest.line, newest.seq)
    columns = {
        "loop_level": int(loop.level),
        "loop_deaths": loop.deaths,
        "loop_total": loop.total,
        "loop_high": loop.high,
        "loop_line": back_to[0],
        "loop_seq": back_to[1],
        "crashes": row.crashes + 1,
        "crash_asked": False,
    }
    await rows.update(conn, row.id, **columns)
    row = await rows.load(conn, row.id)
    target = {Step.SAME: newest, Step.PARENT: parent, Step.FRESH: None}[step]
    if target is not None:
        why = "crash" if step == Step.SAME else "crash_loop"
        row = await lineage.open_line(conn, row, target.line, target.seq, why=why, snapshot=target.id)
    elif step == Step.FRESH:
        row = await lineage.boot_anew(conn, row, "crash_loop")
    else:  # this attempt has no snapshot yet: from its start
        row = await lineage.open_line(conn, row, row.attempt_line, row.attempt_seq, why="crash", snapshot=None)
    return await _recover(conn, row, target, reason, detail, policy, crash)


async def unusable(conn: Conn, row: Row, snapshot: str, detail: str, policy: Policy) -> Row:
    """A restore could not use `snapshot`: on with the next older one, or a boot from the log. Nothing died here."""
    found = await placement.snapshot_row(conn, snapshot)
    await mark_unusable(conn, row, snapshot, detail)
    if row.files_from == snapshot and row.attempt != (found or {}).get("attempt"):
        return await _files_of_older(conn, row, found, detail, policy)
    if row.state not in (State.RESUMING, State.RECOVERING) or row.restored != snapshot:
        return row
    if row.loop_line is None and found is not None:
        await rows.update(conn, row.id, loop_line=found["line"], loop_seq=found["seq"])
        row = await rows.load(conn, row.id)
    older = await placement.usable(conn, row)
    target = older[0] if older else None
    if target is not None:
        row = await lineage.open_line(
            conn, row, target.line, target.seq, why=Reason.SNAPSHOT_UNUSABLE.value, snapshot=target.id
        )
    else:
        row = await lineage.boot_anew(conn, row, Reason.SNAPSHOT_UNUSABLE.value)
    # The mark was made on the line that is left now; the reader of the new one wants to know as well.
    event = NewEvent(type=EventType.SNAPSHOT_UNUSABLE, data={"snapshot": snapshot, "detail": detail})
    return await _recover(
        conn, row, target, Reason.SNAPSHOT_UNUSABLE, f"snapshot {snapshot} is not usable: {detail}", policy, event
    )


async def _files_of_older(conn: Conn, row: Row, found: dict[str, Any] | None, detail: str, policy: Policy) -> Row:
    """The attempt began without the files that it was to have: it begins again with those of the snapshot's parent, or with
    none. It has done nothing yet."""
    parent = await placement.snapshot_row(conn, found["parent"]) if found is not None and found["parent"] else None
    whole = parent is not None and parent["unusable"] is None and not parent["erased"]
    await rows.update(conn, row.id, files_from=parent["id"] if parent is not None and whole else None)
    if row.state.final or row.state == State.SUSPENDED or row.restored is not None:
        return await rows.load(conn, row.id)
    row = await lineage.open_line(
        conn, row, row.attempt_line, row.attempt_seq, why=Reason.SNAPSHOT_UNUSABLE.value, snapshot=None
    )
    lost = found["id"] if found is not None else ""
    event = NewEvent(type=EventType.SNAPSHOT_UNUSABLE, data={"snapshot": lost, "detail": detail})
    said = f"the files of snapshot {lost} cannot be read: {detail}"
    return await _recover(conn, row, None, Reason.SNAPSHOT_UNUSABLE, said, policy, event)


async def mark_unusable(conn: Conn, row: Row, snapshot: str, why: str) -> None:
    """Never choose `snapshot` again. Logged once. An ancestor's is given up by this session alone: what failed here may
    have been the moment, and the ancestor and its other forks would lose work."""
    why = rows.clean(why)
    found = await placement.snapshot_row(conn, snapshot)
    if found is not None and found["session"] != row.id and found["session"] in await lineage.sessions(conn, row):
        event = NewEvent(
            type=EventType.SNAPSHOT_UNUSABLE,
            data={"snapshot": snapshot, "detail": why},
            key=placement.given_up_key(snapshot),
        )
        await rows.append(conn, row.id, event)
        return await _newest_again(conn, row, snapshot)
    marked = await rows.one(
        conn,
        "UPDATE snapshots SET unusable = %s WHERE id = %s AND session = %s AND unusable IS NULL RETURNING id",
        (why, snapshot, row.id),
    )
    if marked is None:
        return
    event = NewEvent(type=EventType.SNAPSHOT_UNUSABLE, data={"snapshot": snapshot, "detail": why})
    await rows.append(conn, row.id, event)
    await _newest_again(conn, row, snapshot)


async def _newest_again(conn: Conn, row: Row, lost: str) -> None:
    if row.snapshot == lost:
        left = await placement.usable(conn, row)
        await rows.update(conn, row.id, snapshot=left[0].id if left else None)


async def _recover(
    conn: Conn, row: Row, target: SnapshotInfo | None, reason: Reason, detail: str, policy: Policy, event: NewEvent
) -> Row:
    restored = target.id if target is not None else None
    row = await rows.move(
        conn,
        row,
        State.RECOVERING,
        reason=reason,
        detail=detail,
        events=[event],
        generation=new_generation(),
        restored=restored,
        snapshot=restored,
        life_progress=await lineage.progress(conn, row),
        node=None,
        incarnation=None,
        wake=False,
    )
    await placement.clear(conn, row.id)
    row = await placement.dispatch(conn, row, policy)
    return row


def _parent(snapshots: list[SnapshotInfo]) -> SnapshotInfo | None:
    """The newest one's parent; the next older one when that is gone."""
    if len(snapshots) < 2:
        return None
    return next((s for s in snapshots[1:] if s.id == snapshots[0].parent), snapshots[1])


def _give_up(row: Row, reason: Reason, detail: str, newest: SnapshotInfo | None) -> tuple[Reason, str]:
    since = f"after restoring {newest.id}" if newest is not None else "at its start"
    if reason == Reason.OUT_OF_MEMORY:
        limit = f"{row.memory_bytes / MIB:g} MiB"
        return reason, f"it runs out of memory again and again ({since}); its limit is {limit}: give it more memory"
    if reason == Reason.BOOT_FAILED:
        return reason, detail
    return Reason.CRASH_LOOP, f"it died again and again {since}, last of {reason.value}: {detail}"
