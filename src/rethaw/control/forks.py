"""Time walked back: where a session can be taken back to, new sessions from there (forks), the same one there (rewind).

A fork copies neither log nor pages: its log is its parent's up to a position (0003_forks.sql), and it is restored from
its parent's snapshot until it has one of its own. What of its past was still open (waits, calls) is its own from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from psycopg.types.json import Jsonb

from rethaw.control import inbox, lineage, outbox, placement, rows, sessions, specs, waits, wakeups
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound, SnapshotUnusable
from rethaw.model.ids import is_whole, new_id
from rethaw.model.types import NewEvent, SnapshotInfo

MOST = 1000  # forks at once
_SEQ = re.compile(r"[+-]?\d+")
_USABLE = "s.unusable IS NULL AND NOT s.erased"


@dataclass(frozen=True)
class Target:
    """A position of a session's log: `seq` as line `line` has it, and the snapshot that is restored to get there."""

    seq: int
    line: int
    last_line: int  # newest that had been opened by `seq`
    snapshot: SnapshotInfo


def parse(at: int | str | None) -> int | str | None:
    """A SEQ is a number, also as text; everything else names a snapshot."""
    if isinstance(at, str) and _SEQ.fullmatch(at.strip()):
        return int(at)
    return at


async def locate(conn: Conn, row: Row, at: int | str | None) -> Target:
    """What `at` (a SEQ, a snapshot's id or a beginning of it, None for the newest) means in the log of `row`. Its snapshot
    stays at least until the transaction ends.

    Raises InvalidInput, NotFound, AmbiguousId, Conflict, SnapshotUnusable."""
    at = parse(at)
    if isinstance(at, str):
        return await _by_snapshot(conn, row, at)
    target = await _locate(conn, row, at)
    kept = await rows.one(
        conn, "SELECT 1 AS ok FROM snapshots WHERE id = %s AND NOT erased FOR SHARE", (target.snapshot.id,)
    )
    if kept is None:
        raise Conflict(f"snapshot {target.snapshot.id} was given up a moment ago", remedy="name a newer one")
    return target


async def _locate(conn: Conn, row: Row, at: int | None) -> Target:
    if at is not None:
        return await _by_seq(conn, row, at)
    usable = await placement.usable(conn, row, limit=1)
    if not usable:
        raise _none_yet(row)
    # A suspended one as it is now: what came in since it went to sleep is still before it.
    seq = row.last_seq if row.state == State.SUSPENDED else usable[0].seq
    line = row.line if row.state == State.SUSPENDED else usable[0].line
    return Target(seq, line, (await line_at(conn, row, seq))["line"], usable[0])


async def _by_seq(conn: Conn, row: Row, seq: int) -> Target:
    if not 1 <= seq <= row.last_seq:
        raise InvalidInput(
            f"there is no event {seq} in session {row.id}", remedy=f"its log goes from 1 to {row.last_seq}", seq=seq
        )
    there = await line_at(conn, row, seq)
    found = await rows.one(
        conn,
        f"""SELECT s.* FROM rethaw_path(%s, %s) p
            JOIN snapshots s ON s.session = p.session AND s.line = p.line AND s.seq <= p.upto
            WHERE s.seq <= %s AND s.attempt = %s AND {_USABLE} ORDER BY s.seq DESC, s.created_at DESC LIMIT 1""",
        (row.id, there["line"], seq, there["attempt"]),
    )
    if found is None:
        first = await rows.one(
            conn,
            f"""SELECT min(s.seq) AS seq FROM rethaw_ancestry(%s) a
                JOIN snapshots s ON s.session = a.session AND s.seq <= a.upto WHERE {_USABLE}""",
            (row.id,),
        )
        if first is None or first["seq"] is None:
            raise _none_yet(row)
        raise InvalidInput(
            f"session {row.id} has no snapshot to go back to event {seq} from",
            remedy=f"its first one is of event {first['seq']}: use that or a later one",
            seq=seq,
            earliest=first["seq"],
        )
    return Target(seq, there["line"], there["line"], placement.snapshot_info(found))


async def _by_snapshot(conn: Conn, row: Row, text: str) -> Target:
    ident = text
    if not is_whole(text, "snap"):
        ident = await sessions.resolve(conn, text, table="snapshots", prefix="snap_")
    found = await rows.one(conn, "SELECT * FROM snapshots WHERE id = %s FOR SHARE", (ident,))
    if found is None:
        await sessions.resolve(conn, text, table="snapshots", prefix="snap_")  # says what may have been meant
    if found is None or found["erased"]:
        raise NotFound(f"there is no snapshot {ident}", remedy="`rethaw snapshot ls` shows those there are")
    info = placement.snapshot_info(found)
    if info.session != row.id and not await rows.one(
        conn, "SELECT 1 AS ok FROM rethaw_ancestry(%s) a WHERE a.session = %s AND %s <= a.upto",
        (row.id, info.session, info.seq),
    ):  # fmt: skip
        raise InvalidInput(
            f"snapshot {ident} belongs to session {info.session}, not to {row.id}",
            remedy=f"`rethaw snapshot ls {row.id}` shows those of this one",
        )
    if info.unusable:
        raise SnapshotUnusable(f"snapshot {ident} cannot be used: {info.unusable}", remedy="choose another one")
    return Target(info.seq, info.line, (await line_at(conn, row, info.seq))["line"], info)


async def line_at(conn: Conn, row: Row, seq: int) -> dict[str, Any]:
    """line and attempt of the session's log at `seq`."""
    found = await rows.one(
        conn,
        """SELECT e.* FROM rethaw_ancestry(%s) a, LATERAL (
               SELECT e.seq, e.line, e.attempt FROM events e WHERE e.session = a.session AND e.seq <= least(a.upto, %s)
               ORDER BY e.seq DESC LIMIT 1) e ORDER BY e.seq DESC LIMIT 1""",
        (row.id, seq),
    )
    assert found is not None, f"session {row.id} has no event at or before {seq}"
    return found


def _none_yet(row: Row) -> Conflict:
    return Conflict(
        f"session {row.id} has no snapshot that can be used",
        remedy="let it run until its first model call, or ask its agent for ctx.snapshot()",
        state=row.state.value,
    )


# ---------------------------------------------------------------- fork


async def fork(
    conn: Conn, session: str, at: int | str | None, forks: dict[str, str], redeliver: bool, *, queued: bool = False
) -> list[Row]:
    """New sessions (`forks`: id -> generation) that begin where `session` was at `at`. One transaction, a fixed number
    of statements. They are `resuming` without a node, or suspended as their parent is; or `queued`. They are in its queue,
    with its priority and tags, but for those of a schedule."""
    parent = await rows.load(conn, session, lock=True)
    ids = list(forks)
    if made := await rows.select(conn, "WHERE s.id = ANY(%s) ORDER BY s.id", (ids,)):
        return made  # the reply to the commit was lost
    if parent.state in (State.CREATED, State.QUEUED) and parent.attempt == 1:
        raise Conflict(f"session {parent.id} is {parent.state.value}: there is nothing to fork yet")
    target = await locate(conn, parent, at)
    asleep = (
        parent.policy_suspended
        and parent.reason == Reason.IDLE
        and target.snapshot.id == parent.snapshot
        and not redeliver
    )
    awake = State.QUEUED if queued else State.RESUMING
    await _insert(conn, parent, target, forks, State.SUSPENDED if asleep else awake)
    await specs.inherit(conn, parent, ids)
    await waits.inherit(conn, ids, target.snapshot.attempt)
    await conn.execute(
        f"""UPDATE sessions u SET outbox_base = n.outbox, life_progress = n.progress
            FROM (SELECT ({outbox.SHARED_UNTIL}) AS outbox, ({lineage.PROGRESS}) AS progress
                  FROM sessions s WHERE s.id = %(first)s) n
            WHERE u.id = ANY(%(ids)s)""",
        {"agent_events": lineage.AGENT_EVENTS, "first": ids[0], "ids": ids},
    )
    data = {"seq": target.seq, "snapshot": target.snapshot.id}
    told = [NewEvent(type=EventType.SESSION_FORKED, data={"fork": fork, **data}) for fork in ids]
    if redeliver:
        later = await _later(conn, parent, target.seq)
        for fork in ids:
            await _give_again(conn, fork, later)
    await rows.append(conn, parent.id, *told)
    wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    return await rows.select(conn, "WHERE s.id = ANY(%s) ORDER BY s.id", (ids,))


async def _insert(conn: Conn, parent: Row, target: Target, forks: dict[str, str], state: State) -> None:
    info, line = target.snapshot, target.last_line + 1
    place: dict[str, Any] = {"snapshot": info.id, "seq": target.seq}
    agent, version = await specs.of_attempt(conn, parent.id, info.attempt)
    born = {"agent": agent.name, "forked_from": parent.id, **place}
    opened = {"line": line, "parent": info.line, "branch_seq": info.seq, "why": "fork", **place}
    same_attempt = info.attempt == parent.attempt
    values: dict[str, Any] = {
        "ids": list(forks),
        "generations": list(forks.values()),
        "parent": parent.id,
        "seq": target.seq,
        "line": line,
        "attempt": info.attempt,
        "state": state.value,
        "desired": Desired.RUNNING.value,
        "reason": (Reason.IDLE if state == State.SUSPENDED else Reason.FORKED).value,
        "snapshot": info.id,
        "restored": None if state == State.SUSPENDED else info.id,
        "shared": info.seq,
        "attempt_line": parent.attempt_line if same_attempt else info.line,
        "attempt_seq": parent.attempt_seq if same_attempt else info.seq,
        "high_attempt": max(parent.attempt, parent.high_attempt),
        "snapshot_session": info.session,
        "snapshot_line": info.line,
        "at_line": target.line,
        "files_from": parent.files_from if same_attempt else None,
        "max_duration": agent.max_duration_s,
        "memory": agent.memory_bytes,
        "agent": agent.model_dump_json(),
        "version": version,
        "types": [EventType.SESSION_CREATED.value, EventType.LINE_OPENED.value, EventType.SESSION_STATE.value],
        "datas": [Jsonb(born), Jsonb(opened), Jsonb({"state": state.value, "reason": Reason.FORKED.value})],
    }
    for statement in (
        """INSERT INTO sessions (id, last_seq, generation, line, attempt, agent_name, memory_bytes, state, desired, reason,
               snapshot, restored, published_seq, attempt_line, attempt_seq, forked_from, fork_seq, first_line,
               branch_after, high_attempt, budget, files_from, give_up_at, inbox_base)
           SELECT u.id, %(seq)s + 3, u.generation, %(line)s, %(attempt)s, p.agent_name, %(memory)s, %(state)s,
               %(desired)s, %(reason)s, %(snapshot)s, %(restored)s, %(shared)s, %(attempt_line)s, %(attempt_seq)s, p.id,
               %(seq)s, %(line)s, %(seq)s, %(high_attempt)s, p.budget, %(files_from)s,
               now() + make_interval(secs => %(max_duration)s::float8),
               (SELECT coalesce(max(i.number), 0) FROM rethaw_spans(p.id, %(at_line)s) w
                JOIN inbox i ON i.session = w.session AND i.seq > w.after AND i.seq <= least(w.upto, %(seq)s))
           FROM sessions p, unnest(%(ids)s::text[], %(generations)s::text[]) u (id, generation)
           WHERE p.id = %(parent)s""",
        """INSERT INTO session_specs (session, agent, args, version, queue, priority, concurrency_key, tags, slot)
           SELECT u, %(agent)s, p.args, %(version)s, CASE p.queue WHEN '' THEN 'default' ELSE p.queue END, p.priority,
               p.concurrency_key, ARRAY(SELECT t FROM unnest(p.tags) t WHERE NOT starts_with(t, 'schedule:')),
               CASE %(state)s WHEN 'suspended' THEN 'free' ELSE 'waiting' END
           FROM session_specs p, unnest(%(ids)s::text[]) u WHERE p.session = %(parent)s""",
        """INSERT INTO lines (session, line, parent, parent_session, branch_seq, why, snapshot, from_session, from_line,
               from_seq, opened_after)
           SELECT u, %(line)s, %(snapshot_line)s, %(snapshot_session)s, %(shared)s, 'fork', %(snapshot)s,
               rethaw_owner(%(parent)s, %(at_line)s), %(at_line)s, %(seq)s, %(seq)s FROM unnest(%(ids)s::text[]) u""",
        """INSERT INTO events (session, seq, line, attempt, type, data)
           SELECT u, %(seq)s + e.n, %(line)s, %(attempt)s, e.type, e.data
           FROM unnest(%(ids)s::text[]) u,
                unnest(%(types)s::text[], %(datas)s::jsonb[]) WITH ORDINALITY e (type, data, n)""",
    ):
        await conn.execute(statement, values)


# ---------------------------------------------------------------- rewind


async def rewind(conn: Conn, session: str, to: int | str, generation: str, redeliver: bool, policy: Policy) -> Row:
    """The session goes on from `to`, whatever it does now or whether it has ended; its sandbox, if any, is replaced.
    `generation`: of the new life."""
    row = await rows.load(conn, session, lock=True)
    if row.generation == generation:
        return row  # the reply to the commit was lost
    if row.state in (State.CREATED, State.QUEUED) and row.attempt == 1:
        raise Conflict(f"session {row.id} is {row.state.value}: there is nothing to rewind yet")
    if row.desired == Desired.CANCELLED and not row.state.final:
        raise Conflict(f"session {row.id} is being cancelled", remedy="rewind it once it has ended")
    target = await locate(conn, row, to)
    later = await _later(conn, row, target.seq) if redeliver else _Later([], [])
    info = target.snapshot
    row = await specs.go_back(conn, row, info.attempt)
    row = await lineage.open_line(
        conn, row, info.line, info.seq, why="rewind", snapshot=info.id, attempt=info.attempt,
        back_to=(target.line, target.seq),
    )  # fmt: skip
    row = await rows.move(
        conn,
        row,
        State.RESUMING,
        reason=Reason.REWOUND,
        desired=Desired.RUNNING.value,
        generation=generation,
        restored=info.id,
        snapshot=info.id,
        life_progress=await lineage.progress(conn, row),
        node=None,
        incarnation=None,
        wake=False,
        exit_code=None,
        cancel_by=None,
        crash_asked=False,
        loop_level=0,
        loop_deaths=0,
        loop_total=0,
        loop_high=0,
        loop_line=None,
        loop_seq=None,
        failures=0,
        retry_at=None,
    )
    if row.agent.max_duration_s is not None:
        await conn.execute(
            "UPDATE sessions SET give_up_at = now() + make_interval(secs => %s) WHERE id = %s",
            (row.agent.max_duration_s, row.id),
        )
    await placement.clear(conn, row.id)
    await _give_again(conn, row.id, later)
    return await placement.dispatch(conn, await rows.load(conn, row.id), policy)


# ---------------------------------------------------------------- what came later


@dataclass(frozen=True)
class _Later:
    """Messages and signals that came after the position that is gone back to."""

    messages: list[dict[str, Any]]
    signals: list[dict[str, Any]]


async def _later(conn: Conn, row: Row, seq: int) -> _Later:
    after = (row.id, row.line, seq)
    return _Later(
        await rows.many(
            conn,
            """SELECT i.* FROM rethaw_spans(%s, %s) w
               JOIN inbox i ON i.session = w.session AND i.seq > w.after AND i.seq <= w.upto
               WHERE i.seq > %s ORDER BY i.seq""",
            after,
        ),
        await rows.many(
            conn,
            """SELECT g.* FROM rethaw_spans(%s, %s) w
               JOIN signals g ON g.session = w.session AND g.seq > w.after AND g.seq <= w.upto
               WHERE g.seq > %s ORDER BY g.seq""",
            after,
        ),
    )


async def _give_again(conn: Conn, session: str, later: _Later) -> None:
    """Deliver them once more: as new ones, that say which they repeat. The session is about to be restored, so that no
    wait has to be completed here."""
    if not later.messages and not later.signals:
        return
    row = await rows.load(conn, session)
    for found in later.messages:
        await inbox.put(conn, row, new_id("m"), bytes(found["payload"]), None, repeats=found["id"])
    for found in later.signals:
        only = (found["for_attempt"], found["for_wait"]) if found["for_wait"] is not None else None
        await inbox.keep_signal(
            conn, row, new_id("sig"), found["name"], bytes(found["payload"]), None, only, repeats=found["id"]
        )
