"""Choosing a node and telling it what to do. A revision is drawn under the node's row lock, so a node that asks for
"everything after N" misses nothing."""

from __future__ import annotations

import json
from typing import Any

from psycopg.rows import dict_row

from rethaw.control import lineage, queues, rows, wakeups
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Reason, State
from rethaw.model.ids import new_generation
from rethaw.model.types import Assignment, Boot, SnapshotInfo

_ON_NODE = [state.value for state in State if state.on_node]


async def snapshot_row(conn: Conn, snapshot: str) -> dict[str, Any] | None:
    return await rows.one(conn, "SELECT * FROM snapshots WHERE id = %s", (snapshot,))


def snapshot_info(found: dict[str, Any]) -> SnapshotInfo:
    info = SnapshotInfo.model_validate_json(found["info"])
    stored = {name: found[name] for name in ("unusable", "pinned", "created_at")}
    uploaded = found["uploaded_ms"]
    return info.model_copy(update=stored if uploaded is None else {**stored, "uploaded_ms": uploaded})


def given_up_key(snapshot: str) -> str:
    """Key of the event that says that a fork could not be restored from this snapshot of an ancestor."""
    return f"snapshot.unusable:{snapshot}"


async def usable(conn: Conn, row: Row, *, limit: int = 16) -> list[SnapshotInfo]:
    """The newest usable snapshots of the current attempt on the path, newest first.

    At most `limit`: recovery steps back one at a time, and a session of a thousand turns has a thousand of them.
    """
    found = await rows.many(
        conn,
        """SELECT s.* FROM snapshots s
           JOIN rethaw_path(%s, %s) p ON s.session = p.session AND s.line = p.line AND s.seq <= p.upto
           WHERE s.session = ANY(%s) AND s.attempt = %s AND s.unusable IS NULL AND NOT s.erased
             AND (s.session = %s OR NOT EXISTS (
                 SELECT 1 FROM events e WHERE e.session = %s AND e.key = %s || s.id))
           ORDER BY s.seq DESC, s.created_at DESC LIMIT %s""",
        (row.id, row.line, await lineage.sessions(conn, row), row.attempt, row.id, row.id, given_up_key(""), limit),
    )
    return [snapshot_info(r) for r in found]


async def assign(conn: Conn, row: Row, action: str, *, reason: Reason = Reason.NONE, **more: Any) -> None:
    """Tell the session's node to do `action` about its current life. The row is locked and has a node."""
    assert row.node is not None and row.generation is not None
    bumped = await rows.one(
        conn, "UPDATE nodes SET revision = revision + 1 WHERE id = %s RETURNING revision", (row.node,)
    )
    if bumped is None:
        return
    assignment = Assignment(
        session=row.id,
        action=action,  # type: ignore[arg-type] - checked by the model
        generation=row.generation,
        line=row.line,
        attempt=row.attempt,
        agent=row.agent if row.budget is None else row.agent.model_copy(update={"budget": row.limits}),
        branch=row.branch_after,
        reason=reason,
        revision=bumped["revision"],
        **more,
    )
    await conn.execute(
        """INSERT INTO assignments (node, revision, session, generation, action, body)
           VALUES (%s, %s, %s, %s, %s, %s)""",
        (row.node, bumped["revision"], row.id, row.generation, action, assignment.model_dump_json()),
    )
    wakeups.note(wakeups.NODE_CHANNEL, row.node)


async def clear(conn: Conn, session: str, *, keep: tuple[str, ...] = ("kill",)) -> None:
    """The session's state moved on: what was assigned is no longer to be done, but for the actions in `keep`."""
    await conn.execute("DELETE FROM assignments WHERE session = %s AND action <> ALL(%s)", (session, list(keep)))


async def choose(conn: Conn, memory_bytes: int, policy: Policy, only: str | None = None) -> dict[str, Any] | None:
    """A node with a valid lease and room (row locked), `only` that one if given."""
    live = await rows.many(
        conn,
        """SELECT * FROM nodes WHERE lease_until > now() AND (%s::text IS NULL OR id = %s)
           ORDER BY registered_at FOR UPDATE""",
        (only, only),
    )
    for node in live:
        used = await rows.one(
            conn,
            "SELECT coalesce(sum(memory_bytes), 0) AS n FROM sessions WHERE node = %s AND state = ANY(%s)",
            (node["id"], _ON_NODE),
        )
        limit = int(node["memory_bytes"] * policy.overcommit)
        if memory_bytes <= node["memory_bytes"] and int(used["n"] if used else 0) + memory_bytes <= limit:
            return node
    return None


_TURN = """WITH p AS MATERIALIZED (SELECT * FROM rethaw_path(%(session)s, %(line)s)),
e AS (
    SELECT e.seq, e.type, e.data FROM events e
    JOIN p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
    WHERE e.session = ANY(%(sessions)s)
      AND e.type IN ('wait.opened', 'wait.completed', 'session.result', 'attempt.exited')
), m AS (
    SELECT m.number, m.seq FROM inbox_moves m
    JOIN p ON m.session = p.session AND m.line = p.line AND m.seq <= p.upto
    WHERE m.session = ANY(%(sessions)s) ORDER BY m.number DESC, m.seq DESC LIMIT 1
)
SELECT m.number, EXISTS (
    SELECT 1 FROM e WHERE e.seq > coalesce((
        SELECT max(c.seq) FROM e c WHERE c.type = 'wait.completed' AND c.data->>'number' = m.number::text), m.seq)
    AND (e.type = 'session.result'
         OR e.type = 'wait.opened' AND (e.data->>'kind' = 'inbox' OR e.data->'parts' @> '[{"kind": "inbox"}]')
         OR e.type = 'attempt.exited' AND e.data->>'exit_code' = '0')
) AS finished FROM m"""


async def cursor(conn: Conn, row: Row) -> int:
    """Up to which number the path has consumed the inbox and is done with it. A message's turn is over once the agent asks
    for the next one, or ends in order; one whose turn was cut off is delivered again."""
    values = {"session": row.id, "line": row.line, "sessions": await lineage.sessions(conn, row)}
    async with conn.cursor(row_factory=dict_row) as reader:
        await reader.execute(_TURN, values)
        found = await reader.fetchone()
    if found is None:
        return 0
    return int(found["number"]) if found["finished"] else int(found["number"]) - 1


async def dispatch(conn: Conn, row: Row, policy: Policy) -> Row:
    """Give a session that needs a node (queued, or resuming or recovering without one) to a node, if its queue has a slot
    for it and a node has room.

    What the new life starts from is `row.restored`: a snapshot, restored where its files are, or nothing: a boot.
    A session whose next attempt has a time waits for that."""
    if row.retry_at is not None:
        due = await rows.one(conn, "SELECT clock_timestamp() >= %s AS due", (row.retry_at,))
        if due is None or not due["due"]:
            return row
    if not await queues.admits(conn, row):
        return row
    info: SnapshotInfo | None = None
    only: str | None = None
    if row.restored is not None:
        found = await snapshot_row(conn, row.restored)
        assert found is not None, f"snapshot {row.restored} of session {row.id} has no row"
        info, only = snapshot_info(found), found["node"]
    elif row.files_from is not None and (found := await snapshot_row(conn, row.files_from)) is not None:
        only = found["node"]
    node = await choose(conn, row.memory_bytes, policy, only)
    if node is None:
        return row
    await queues.take(conn, row)
    place = {"node": node["id"], "incarnation": node["incarnation"]}
    if row.state in (State.CREATED, State.QUEUED):
        if row.attempt == 1:
            await _count_from_now(conn, row)
        place["retry_at"] = None
        if info is not None:  # from a template
            row = await rows.move(conn, row, State.RESUMING, reason=row.reason, **place)
        else:
            row = await rows.move(conn, row, State.STARTING, generation=new_generation(), **place)
    else:
        await rows.update(conn, row.id, **place)
        row = await rows.load(conn, row.id)
    await clear(conn, row.id)
    files = await _files(conn, row, node["id"])
    if info is not None:
        await assign(conn, row, "restore", reason=row.reason, snapshot=info, files=files)
    else:
        fresh = row.attempt > 1 or row.crashes > 0 or row.branch_after is not None
        boot = Boot(args=json.loads(row.args), cursor=await cursor(conn, row), fresh=fresh)
        await assign(conn, row, "start", reason=row.reason, boot=boot, files=files)
    return row


async def _count_from_now(conn: Conn, row: Row) -> None:
    """What it waited for its turn is no part of its longest duration."""
    if row.agent.max_duration_s is not None and not (row.key or "").startswith("template:"):
        await conn.execute(
            "UPDATE sessions SET give_up_at = now() + make_interval(secs => %s) WHERE id = %s",
            (row.agent.max_duration_s, row.id),
        )


async def _files(conn: Conn, row: Row, node: str) -> SnapshotInfo | None:
    """The snapshot whose files the attempt begins with. None when that is not here (any more): then they are fresh."""
    found = await snapshot_row(conn, row.files_from) if row.files_from is not None else None
    if found is None or found["erased"] or found["unusable"] is not None or found["node"] != node:
        return None
    return snapshot_info(found)
