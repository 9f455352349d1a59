"""The rows of snapshots: commit under the fence, choose, retire. Files are the node's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rethaw.control import placement, recovery, rows
from rethaw.control.outbox import publish
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn
from rethaw.control.wakeups import Transactions
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.model import faults
from rethaw.model.enums import EventType
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import AgentSpec, Fence, NewEvent, SnapshotInfo


class Catalog:
    """`model.ports.SnapshotCatalog` over PostgreSQL."""

    def __init__(self, db: Database, hub: NotifyHub | None = None, policy: Policy | None = None) -> None:
        self._db = Transactions(db, hub)
        self._policy = policy or Policy()

    async def commit(self, fence: Fence, info: SnapshotInfo) -> SnapshotInfo:
        """Insert the row, append snapshot.created, publish what the snapshot contains. Idempotent by its id."""
        faults.point("catalog.commit.before")
        result = await self._db.run(lambda conn: _commit(conn, fence, info))
        faults.point("catalog.commit.after")
        return result

    async def get(self, snapshot: str) -> SnapshotInfo:
        """Raises NotFound."""

        async def fn(conn: Conn) -> SnapshotInfo:
            found = await placement.snapshot_row(conn, snapshot)
            if found is None:
                raise NotFound(f"there is no snapshot {snapshot}", remedy="`rethaw snapshot ls` shows those there are")
            return placement.snapshot_info(found)

        return await self._db.run(fn)

    async def list(self, session: str) -> list[SnapshotInfo]:
        """All of the session, oldest first, abandoned and unusable ones included; of a fork with those of its ancestors
        that it can be taken back to."""

        async def fn(conn: Conn) -> list[SnapshotInfo]:
            found = await rows.many(
                conn,
                """SELECT n.* FROM rethaw_ancestry(%s) a JOIN snapshots n ON n.session = a.session AND n.seq <= a.upto
                   WHERE NOT n.erased ORDER BY n.seq, n.created_at""",
                (session,),
            )
            return [placement.snapshot_info(r) for r in found]

        return await self._db.run(fn)

    async def mark_unusable(self, fence: Fence, snapshot: str, why: str) -> None:
        """Never chosen again; logged once."""

        async def fn(conn: Conn) -> None:
            row = await rows.fenced(conn, fence)
            await recovery.mark_unusable(conn, row, snapshot, why)

        await self._db.run(fn)

    async def pin(self, snapshot: str, pinned: bool) -> SnapshotInfo:
        """Keep it whatever retention says, or no longer. Raises NotFound."""

        async def fn(conn: Conn) -> None:
            query = "UPDATE snapshots SET pinned = %s WHERE id = %s AND NOT erased"
            if (await conn.execute(query, (pinned, snapshot))).rowcount == 0:
                raise NotFound(f"there is no snapshot {snapshot}", remedy="`rethaw snapshot ls` shows those there are")

        await self._db.run(fn)
        return await self.get(snapshot)

    async def uploaded(self, snapshot: str, after_ms: float) -> None:
        """The object store has it, `after_ms` after it was durable here. Nothing for one that is gone."""

        async def fn(conn: Conn) -> None:
            await conn.execute(
                """UPDATE snapshots SET uploaded_ms = (info::json ->> 'durable_ms')::float8 + %s
                   WHERE id = %s AND uploaded_ms IS NULL""",
                (after_ms, snapshot),
            )

        await self._db.run(fn)

    async def superfluous(self, node: str) -> list[SnapshotInfo]:
        """What retention lets go: everything of erased sessions, and of the others what is neither needed for recovery
        nor pinned nor, by the agent's policy, young and within its budget (DESIGN §7; older than that, one an hour)."""
        return await self._db.run(lambda conn: _superfluous(conn, node, self._policy))

    async def forget(self, snapshot: str) -> None:
        """The files are gone, the row goes. Raises Conflict for one that its session would be restored from."""

        async def fn(conn: Conn) -> None:
            using = await rows.one(
                conn,
                """SELECT id FROM sessions WHERE (snapshot = %s OR restored = %s OR files_from = %s)
                   AND state NOT IN ('completed', 'failed', 'cancelled')""",
                (snapshot, snapshot, snapshot),
            )
            found = await placement.snapshot_row(conn, snapshot)
            if using is not None and found is not None and found["unusable"] is None:
                raise Conflict(f"session {using['id']} still needs snapshot {snapshot}", remedy="keep its files")
            await conn.execute("DELETE FROM snapshots WHERE id = %s", (snapshot,))

        await self._db.run(fn)

    async def not_uploaded(self, node: str) -> list[SnapshotInfo]:
        """Snapshots of `node` that the object store may not have, oldest first."""

        async def fn(conn: Conn) -> list[SnapshotInfo]:
            found = await rows.many(
                conn,
                """SELECT * FROM snapshots WHERE node = %s AND uploaded_ms IS NULL AND unusable IS NULL AND NOT erased
                   AND (info::json ->> 'uploaded_ms') IS NULL ORDER BY created_at""",
                (node,),
            )
            return [placement.snapshot_info(r) for r in found]

        return await self._db.run(fn)

    async def ids(self, node: str) -> set[str]:
        """Every snapshot of `node` that has a row."""

        async def fn(conn: Conn) -> list[dict[str, Any]]:
            return await rows.many(conn, "SELECT id FROM snapshots WHERE node = %s", (node,))

        return {str(r["id"]) for r in await self._db.run(fn)}

    async def made_on(self, images: Sequence[str]) -> list[tuple[str, str]]:
        """(id, session) of snapshots that were made on one of the composed `images`, the newest first."""

        async def fn(conn: Conn) -> list[dict[str, Any]]:
            return await rows.many(
                conn,
                """SELECT id, session FROM snapshots WHERE NOT erased AND info::json ->> 'image' = ANY(%s)
                   ORDER BY created_at DESC""",
                (list(images),),
            )

        return [(str(r["id"]), str(r["session"])) for r in await self._db.run(fn)]

    async def needed(self, node: str) -> tuple[set[str], set[str]]:
        """Engine builds and image digests that some snapshot of `node` was made with."""

        async def fn(conn: Conn) -> list[dict[str, Any]]:
            return await rows.many(
                conn,
                """SELECT DISTINCT info::json ->> 'engine_build' AS build, info::json ->> 'image' AS image
                   FROM snapshots WHERE node = %s""",
                (node,),
            )

        found = await self._db.run(fn)
        return {str(r["build"]) for r in found}, {str(r["image"]) for r in found}


async def _commit(conn: Conn, fence: Fence, info: SnapshotInfo) -> SnapshotInfo:
    row = await rows.fenced(conn, fence)
    former = await placement.snapshot_row(conn, info.id)
    if former is not None:
        return placement.snapshot_info(former)
    if row.state.final:
        raise Conflict(f"session {row.id} is {row.state.value}: it takes no snapshot", remedy="discard the files")
    if not 0 < info.seq <= row.last_seq:
        raise InvalidInput(f"snapshot {info.id} is of seq {info.seq}, the log of {row.id} ends at {row.last_seq}")
    if info.session != row.id or info.line != row.line or info.attempt != row.attempt or row.node is None:
        raise InvalidInput(
            f"snapshot {info.id} is of line {info.line}, attempt {info.attempt} of {info.session}, its fence of line "
            f"{row.line}, attempt {row.attempt} of {row.id}"
        )
    await conn.execute(
        """INSERT INTO snapshots (id, session, node, parent, line, attempt, seq, info, why, stored_bytes)
           VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)""",
        (
            info.id,
            row.id,
            row.node,
            info.parent,
            info.line,
            info.attempt,
            info.seq,
            info.model_dump_json(),
            info.why,
            info.stored_bytes,
        ),
    )
    data = {
        "snapshot": info.id,
        "parent": info.parent,
        "seq": info.seq,
        "paused_ms": info.paused_ms,
        "durable_ms": info.durable_ms,
        "stored_bytes": info.stored_bytes,
        "why": info.why,
    }
    await rows.append(conn, row.id, NewEvent(type=EventType.SNAPSHOT_CREATED, data=data))
    await publish(conn, row, info.seq)
    newest = (await placement.usable(conn, row, limit=1))[0]
    await rows.update(conn, row.id, snapshot=newest.id)
    faults.point("catalog.commit.inside")
    done = await placement.snapshot_row(conn, info.id)
    assert done is not None
    return placement.snapshot_info(done)


async def _superfluous(conn: Conn, node: str, policy: Policy) -> list[SnapshotInfo]:
    found = await rows.many(
        conn,
        """SELECT *, extract(epoch FROM clock_timestamp() - created_at) AS age,
                  date_trunc('hour', created_at) AS hour
           FROM snapshots WHERE node = %s ORDER BY session, seq DESC, created_at DESC""",
        (node,),
    )
    out: list[SnapshotInfo] = []
    sessions = {r["session"] for r in found if not r["erased"]}
    needed: set[str] = set()
    agents: dict[str, AgentSpec] = {}
    # A fork may have none of its own yet.
    live = await rows.many(
        conn,
        """SELECT id FROM sessions
           WHERE forked_from IS NOT NULL AND state NOT IN ('completed', 'failed', 'cancelled')""",
    )
    sessions |= {r["id"] for r in live}
    for session in sessions:
        for row in await rows.select(conn, "WHERE s.id = %s", (session,)):
            agents[session] = row.agent
            if not row.state.final:
                usable = await placement.usable(conn, row)
                kept = usable[: policy.keep_newest]
                needed |= {s.id for s in kept} | {s.parent for s in kept[:1] if s.parent}
                needed |= {s for s in (row.snapshot, row.restored, row.files_from) if s}
    spent: dict[str, int] = {}
    hours: set[tuple[str, object]] = set()
    for record in found:
        session = record["session"]
        keep = record["id"] in needed or (record["pinned"] and not record["erased"])
        if not keep and not record["erased"] and record["unusable"] is None:
            agent = agents[session]
            young = float(record["age"]) <= agent.keep_all_s
            first_of_hour = (session, record["hour"]) not in hours
            within = spent.get(session, 0) + record["stored_bytes"] <= agent.keep_bytes
            keep = within and (young or first_of_hour)
        if keep:
            spent[session] = spent.get(session, 0) + record["stored_bytes"]
            hours.add((session, record["hour"]))
        else:
            out.append(placement.snapshot_info(record))
    return await _given_up(conn, out)


async def _given_up(conn: Conn, found: list[SnapshotInfo]) -> list[SnapshotInfo]:
    """Those of `found` that nobody has begun to go back to meanwhile (control/forks.py); from now on nobody will."""
    locked = await rows.many(
        conn, "SELECT id FROM snapshots WHERE id = ANY(%s) FOR UPDATE SKIP LOCKED", ([s.id for s in found],)
    )
    gone = await rows.many(
        conn,
        """UPDATE snapshots n SET erased = true
           WHERE n.id = ANY(%s) AND (n.erased OR NOT n.pinned AND (n.unusable IS NOT NULL OR NOT EXISTS (
               SELECT 1 FROM sessions s WHERE n.id IN (s.snapshot, s.restored, s.files_from)
               AND s.state NOT IN ('completed', 'failed', 'cancelled')))) RETURNING n.id""",
        ([r["id"] for r in locked],),
    )
    ids = {r["id"] for r in gone}
    return [s for s in found if s.id in ids]
