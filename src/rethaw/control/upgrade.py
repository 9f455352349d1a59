"""Another version of its agent for a session: a rewind to the end of its log, but for a fresh boot of other code.

The new attempt has the log up to `at` as its context, the inbox from the message whose turn did not finish on, signals that
nobody has used, and, if wanted, the files of the last snapshot. Old callback addresses go on working: what comes through
one is a signal that a wait of that name of the new attempt may take (control/waits.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rethaw.control import agents, arguments, forks, lineage, outbox, placement, room, rows, sessions, specs
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput
from rethaw.model.types import AgentSpec, NewEvent, SnapshotInfo
from rethaw.model.versions import TEMPLATE

_UNPLACED = (State.CREATED, State.QUEUED)
LIVE = (State.RUNNING, State.WAITING, State.SUSPENDING)
# Of an end in the middle of a crash: what the agent did last was not visible outside yet (control/recovery.py).
_CRASHED = (Reason.CRASH_LOOP, Reason.OUT_OF_MEMORY, Reason.BOOT_FAILED)


@dataclass(frozen=True)
class Wanted:
    """`at`: the seq to go on from, None for the end. `keep`: the files. `ended`: whether it had ended when it was asked
    for. `generation`: of the new life."""

    agent: AgentSpec
    at: int | None
    keep: bool
    ended: bool
    generation: str


@dataclass(frozen=True)
class Done:
    row: Row
    before: int
    after: int
    changed: bool
    at: int


async def ask(conn: Conn, session: str, agent: AgentSpec, at: int | None, policy: Policy) -> Row:
    """Raises what would be raised by `upgrade` later, before anything is done for it."""
    row = await rows.load(conn, session, lock=True)
    await _check(conn, row, agent, at, policy)
    return row


async def upgrade(conn: Conn, session: str, wanted: Wanted, policy: Policy) -> Done:
    """The session goes on with `wanted.agent`, whatever it does now or whether it has ended; its sandbox, if any, is replaced.

    Raises InvalidInput, Conflict."""
    row = await rows.load(conn, session, lock=True)
    if row.generation == wanted.generation:  # the reply to the commit was lost
        return await _done_before(conn, row)
    before, after = await _check(conn, row, wanted.agent, wanted.at, policy)
    if row.state.final and not wanted.ended:
        raise Conflict(
            f"session {row.id} has ended meanwhile ({row.state.value})", remedy="ask again to let it go on all the same"
        )
    if before == after and wanted.at is None:
        return Done(row, before, after, False, row.last_seq)
    agent = _with_template(row.agent, wanted.agent)
    event: dict[str, Any] = {"from_version": before, "to_version": after}
    if row.state in _UNPLACED and row.restored is None:  # nothing of its attempt has run
        row = await specs.switch(conn, row, agent, after, begun=False)
        if row.attempt > 1:  # a retry that waits for its time: that was for the old version
            await rows.update(conn, row.id, retry_at=None)
        event["at"] = row.last_seq
        await rows.append(conn, row.id, NewEvent(type=EventType.SESSION_UPGRADED, data=event))
        row = await placement.dispatch(conn, await rows.load(conn, row.id), policy)
        return Done(row, before, after, True, event["at"])
    line, seq, back_to = await _position(conn, row, wanted)
    files = await _files(conn, row, line, seq) if wanted.keep else None
    was = row
    row = await specs.switch(conn, row, agent, after)
    row = await lineage.open_line(
        conn, row, line, seq, why="upgrade", snapshot=None, new_attempt=True, back_to=back_to
    )  # fmt: skip
    event["at"] = back_to[1] if wanted.at is not None else seq
    if files is not None:
        event["files"] = files.id
    (told,) = await rows.append(conn, row.id, NewEvent(type=EventType.SESSION_UPGRADED, data=event))
    # The attempt begins here, not before what was just said: no crash takes that back.
    await rows.update(
        conn, row.id, attempt_line=told.line, attempt_seq=told.seq, published_seq=min(was.published_seq, seq)
    )
    row = await rows.load(conn, row.id)
    await outbox.publish(conn, row, None)  # of a line that is never gone back to
    asleep = was.desired == Desired.SUSPENDED and not was.state.final  # until the person who wanted that resumes it
    row = await rows.move(
        conn,
        row,
        State.RESUMING,
        reason=Reason.UPGRADED,
        desired=(Desired.SUSPENDED if asleep else Desired.RUNNING).value,
        generation=wanted.generation,
        restored=None,
        snapshot=None,
        files_from=files.id if files is not None else None,
        failures=0,
        retry_at=None,
        life_progress=await lineage.progress(conn, row),
        node=None,
        incarnation=None,
        wake=False,
        exit_code=None,
        give_up_at=None,
        cancel_by=None,
        crash_asked=False,
        loop_level=0,
        loop_deaths=0,
        loop_total=0,
        loop_high=0,
        loop_line=None,
        loop_seq=None,
    )
    if agent.max_duration_s is not None:
        await conn.execute(
            "UPDATE sessions SET give_up_at = now() + make_interval(secs => %s) WHERE id = %s",
            (agent.max_duration_s, row.id),
        )
    await placement.clear(conn, row.id)
    row = await placement.dispatch(conn, await rows.load(conn, row.id), policy)
    return Done(row, before, after, True, event["at"])


async def _check(conn: Conn, row: Row, agent: AgentSpec, at: int | None, policy: Policy) -> tuple[int, int]:
    """The versions that it runs and is to run. Raises InvalidInput, Conflict."""
    sessions.check_agent(agent, policy)
    await room.check(conn, agent, policy)
    if agent.name != row.agent.name:
        raise InvalidInput(
            f"session {row.id} is of agent {row.agent.name}, not of {agent.name}",
            remedy=f'name the function so: @rethaw.agent(name="{row.agent.name}")',
        )
    if (row.key or "").startswith("template:"):
        raise Conflict(
            f"session {row.id} is what a template starts from: it cannot be upgraded",
            remedy="`rethaw template rm` it and create it from the new file",
        )
    if row.desired == Desired.CANCELLED and not row.state.final:
        raise Conflict(f"session {row.id} is being cancelled", remedy="upgrade it once it has ended")
    if at is not None and not 1 <= at <= row.last_seq:
        raise InvalidInput(
            f"there is no event {at} in session {row.id}", remedy=f"its log goes from 1 to {row.last_seq}", seq=at
        )
    if at is not None and row.state in _UNPLACED:
        raise Conflict(
            f"session {row.id} is {row.state.value}: there is nothing to go back to", remedy="leave out --from"
        )
    before = row.version if row.version is not None else await agents.number(conn, row.agent)
    after = await agents.number(conn, agent)
    if before != after:  # it is started with the arguments that it was begun with
        arguments.check(_with_template(row.agent, agent), json.loads(row.args))
    if before == after and at is None and row.state.final:
        raise Conflict(
            f"session {row.id} is {row.state.value} and runs version {after} already",
            remedy="name another version, or an event to go on from (--from SEQ)",
            state=row.state.value,
        )
    return before, after


async def _done_before(conn: Conn, row: Row) -> Done:
    found = await rows.one(
        conn,
        "SELECT data FROM events WHERE session = %s AND type = %s ORDER BY seq DESC LIMIT 1",
        (row.id, EventType.SESSION_UPGRADED.value),
    )
    data: dict[str, Any] = found["data"] if found is not None else {}
    return Done(row, int(data["from_version"]), int(data["to_version"]), True, int(data["at"]))


def _with_template(old: AgentSpec, new: AgentSpec) -> AgentSpec:
    """One that was begun from a template finds its arguments by what the template's environment says."""
    template = old.env.get(TEMPLATE)
    if template is None:
        return new
    return new.model_copy(update={"env": {**new.env, TEMPLATE: template}, "template": "none"})


async def _position(conn: Conn, row: Row, wanted: Wanted) -> tuple[int, int, tuple[int, int]]:
    """Line and seq up to which the log is the context of the new attempt, and where its past ends: what came in later
    (with --from) is of no concern to it."""
    if wanted.at is not None:
        there = await forks.line_at(conn, row, wanted.at)
        return there["line"], wanted.at, (there["line"], wanted.at)
    end = (row.line, row.last_seq)
    crashed = row.state == State.FAILED and row.reason in _CRASHED
    # A snapshot was taken for the files, a moment ago: they and the log are of one moment. After a crash that was the last
    # one, what came after the newest snapshot was never seen outside.
    if crashed or (wanted.keep and row.state in LIVE):
        newest = await placement.usable(conn, row, limit=1)
        if newest:
            return newest[0].line, newest[0].seq, end
        if crashed:
            return row.attempt_line, row.attempt_seq, end
    return *end, end


async def _files(conn: Conn, row: Row, line: int, seq: int) -> SnapshotInfo | None:
    """The newest usable snapshot at or before the position, of the attempt that ran there; if that had none yet, the
    one whose files it began with."""
    there = await forks.line_at(conn, row, seq)
    found = await rows.one(
        conn,
        """SELECT s.* FROM rethaw_path(%s, %s) p
           JOIN snapshots s ON s.session = p.session AND s.line = p.line AND s.seq <= p.upto
           WHERE s.seq <= %s AND s.attempt = %s AND s.unusable IS NULL AND NOT s.erased
           ORDER BY s.seq DESC, s.created_at DESC LIMIT 1 FOR SHARE OF s""",
        (row.id, line, seq, there["attempt"]),
    )
    if found is None and row.files_from is not None and there["attempt"] == row.attempt:
        found = await rows.one(
            conn,
            "SELECT * FROM snapshots WHERE id = %s AND unusable IS NULL AND NOT erased FOR SHARE",
            (row.files_from,),
        )
    return None if found is None else placement.snapshot_info(found)
