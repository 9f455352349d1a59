"""The session row: reading it under lock, checking the fence, moving it with its event, showing it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, LiteralString

from psycopg import sql
from psycopg.rows import dict_row

from rethaw.control import awake, transitions, wakeups
from rethaw.control.crashloop import Level, Loop
from rethaw.db.pool import Connection
from rethaw.log.writer import append_in
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Fenced, NotFound
from rethaw.model.types import AgentSpec, BudgetSpec, Event, Fence, NewEvent, SessionView
from rethaw.model.versions import digest

Conn = Connection
# suspended by policy: whatever it waits for resumes it
POLICY_REASONS = (Reason.IDLE, Reason.NAP, Reason.PROVIDER_HOLD, Reason.NODE_STOPPED)


async def many(
    conn: Conn, query: LiteralString | bytes | sql.Composed, params: Sequence[Any] | dict[str, Any] = ()
) -> list[dict[str, Any]]:
    """All rows of `query`."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, params)
        return await cursor.fetchall() if cursor.description else []


async def one(
    conn: Conn, query: LiteralString | sql.Composed, params: Sequence[Any] | dict[str, Any] = ()
) -> dict[str, Any] | None:
    """The first row of `query`."""
    found = await many(conn, query, params)
    return found[0] if found else None


async def one_named(conn: Conn, query: LiteralString, params: dict[str, Any]) -> dict[str, Any]:
    """The one row that `query`, with named parameters, always has."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, params)
        found = await cursor.fetchone()
    assert found is not None
    return found


@dataclass(frozen=True)
class Row:
    """A session as stored (columns described in the migration)."""

    id: str
    generation: str | None
    line: int
    attempt: int
    last_seq: int
    created_at: datetime
    agent: AgentSpec
    key: str | None
    args: str
    memory_bytes: int
    state: State
    desired: Desired
    reason: Reason
    detail: str | None
    node: str | None
    incarnation: str | None
    snapshot: str | None
    exit_code: int | None
    degraded: bool
    updated_at: datetime
    state_since: datetime
    give_up_at: datetime | None
    wake: bool
    crashes: int
    published_seq: int
    attempt_line: int
    attempt_seq: int
    restored: str | None
    life_progress: int
    loop_level: int
    loop_deaths: int
    loop_total: int
    loop_high: int
    loop_line: int | None
    loop_seq: int | None
    crash_asked: bool
    forked_from: str | None
    fork_seq: int
    branch_after: int | None
    inbox_base: int
    outbox_base: int
    high_attempt: int
    parent: str | None
    queue: str
    priority: int
    concurrency_key: str | None
    not_before: datetime | None
    expires_at: datetime | None
    tags: list[str]
    failures: int
    retry_at: datetime | None
    budget: str | None
    awake_s: float
    awake_until: datetime | None
    wall_at: datetime | None
    files_from: str | None
    nap_until: datetime | None
    version: int | None

    @property
    def limits(self) -> BudgetSpec | None:
        """What the session may spend: what a person gave it, else its agent's budget."""
        return self.agent.budget if self.budget is None else BudgetSpec.model_validate_json(self.budget)

    @property
    def loop(self) -> Loop:
        return Loop(Level(self.loop_level), self.loop_deaths, self.loop_total, self.loop_high)

    @property
    def policy_suspended(self) -> bool:
        return self.state == State.SUSPENDED and self.reason in POLICY_REASONS and self.desired == Desired.RUNNING


_DETAIL_LIMIT = 4000  # characters
_SPECS = {
    "agent", "args", "queue", "priority", "concurrency_key", "not_before", "expires_at", "tags",
    "version",
}  # fmt: skip
_COLUMNS = sql.SQL(", ").join(sql.Identifier("p" if field.name in _SPECS else "s", field.name) for field in fields(Row))
_SELECT = sql.SQL("SELECT {} FROM sessions s JOIN session_specs p ON p.session = s.id ").format(_COLUMNS).as_bytes(None)


def _row(values: dict[str, Any]) -> Row:
    values["agent"] = AgentSpec.model_validate_json(values["agent"])
    values["state"] = State(values["state"])
    values["desired"] = Desired(values["desired"])
    values["reason"] = Reason(values["reason"])
    return Row(**values)


async def select(conn: Conn, where: LiteralString, params: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
    """Rows of `sessions` (as `s`, its spec as `p`) that `where`, the rest of the statement, finds."""
    return [_row(values) for values in await many(conn, _SELECT + where.encode(), params)]


def clean(text: str) -> str:
    """`text` as PostgreSQL can hold it."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def unknown(session: str) -> NotFound:
    return NotFound(f"there is no session {session}", remedy="`rethaw ls` shows those there are", session=session)


async def load(conn: Conn, session: str, *, lock: bool = False) -> Row:
    """The row of `session`, locked until the transaction ends if `lock`. Raises NotFound."""
    found = await select(conn, "WHERE s.id = %s FOR UPDATE OF s" if lock else "WHERE s.id = %s", (session,))
    if not found:
        raise unknown(session)
    return found[0]


async def fenced(conn: Conn, fence: Fence, *, lock: bool = True) -> Row:
    """The row of the fence's session, locked. Raises Fenced when another life owns it by now."""
    row = await load(conn, fence.session, lock=lock)
    if row.generation != fence.generation:
        raise outlived(fence)
    return row


def outlived(fence: Fence) -> Fenced:
    return Fenced(
        f"generation {fence.generation} of session {fence.session} is over",
        remedy="another life owns the session: stop this one",
        session=fence.session,
        generation=fence.generation,
    )


async def update(conn: Conn, session: str, **columns: Any) -> None:
    """Set columns of the row, which the caller has locked."""
    await conn.execute(_update(tuple(columns)), [*columns.values(), session])


@functools.cache
def _update(columns: tuple[str, ...], more: LiteralString = "") -> bytes:
    sets = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in columns)
    query = sql.SQL("UPDATE sessions SET {}, updated_at = now() {} WHERE id = %s").format(sets, sql.SQL(more))
    return query.as_bytes(None)


async def append(conn: Conn, session: str, *events: NewEvent) -> list[Event]:
    """Append on the session's current line. Control decides under the row's lock, so it needs no generation."""
    wakeups.note(wakeups.SESSION_CHANNEL, session)
    return await append_in(conn, session, events, generation=None, notify=False)


def state_event(state: State, reason: Reason, detail: str | None, **more: Any) -> NewEvent:
    data: dict[str, Any] = {"state": state.value, "reason": reason.value}
    if detail:
        data["detail"] = detail
    return NewEvent(type=EventType.SESSION_STATE, data={**data, **{k: v for k, v in more.items() if v is not None}})


async def move(
    conn: Conn,
    row: Row,
    state: State,
    *,
    reason: Reason = Reason.NONE,
    detail: str | None = None,
    events: Sequence[NewEvent] = (),
    reported: bool = False,
    **columns: Any,
) -> Row:
    """Move the locked row, with `events` and then its session.state event. Raises Conflict naming both states."""
    transitions.check(row.id, row.state, state, reported=reported)
    detail = None if detail is None else clean(detail)[:_DETAIL_LIMIT]
    more = {"node": columns.get("node"), "exit_code": columns.get("exit_code")}
    await append(conn, row.id, *events, state_event(state, reason, detail, **more))
    if state.final:
        wakeups.note(wakeups.OUTBOX_CHANNEL, row.id)
    columns |= {"state": state.value, "reason": reason.value, "detail": detail, "nap_until": None}
    columns |= await awake.counted(conn, row, state)
    await conn.execute(_update(tuple(columns), ", state_since = now()"), [*columns.values(), row.id])
    await _slot(conn, row, state, reason)
    return await load(conn, row.id)


async def _slot(conn: Conn, row: Row, state: State, reason: Reason) -> None:
    """What a move means for the row's slot in its queue. A server that stops takes none away."""
    if state.final or (state == State.SUSPENDED and reason != Reason.NODE_STOPPED):
        if not state.final:
            queue = await one(conn, "SELECT suspended_count FROM queues WHERE name = %s FOR UPDATE", (row.queue,))
            if queue is None or queue["suspended_count"]:
                return
        freed = "UPDATE session_specs SET slot = 'free', expires_at = NULL WHERE session = %s AND slot <> 'free'"
        await conn.execute(freed, (row.id,))
        wakeups.note(wakeups.QUEUE_CHANNEL, wakeups.ANY)
    elif state in (State.RESUMING, State.QUEUED):
        await conn.execute("UPDATE session_specs SET slot = 'waiting' WHERE session = %s AND slot = 'free'", (row.id,))


def view(row: Row) -> SessionView:
    return SessionView(
        id=row.id,
        agent=row.agent,
        key=row.key,
        state=row.state,
        desired=row.desired,
        reason=row.reason,
        detail=row.detail,
        generation=row.generation,
        line=row.line,
        attempt=row.attempt,
        last_seq=row.last_seq,
        node=row.node,
        snapshot=row.snapshot,
        exit_code=row.exit_code,
        degraded=row.degraded,
        created_at=row.created_at,
        updated_at=row.updated_at,
        crashes=row.crashes,
        forked_from=row.forked_from,
        forked_seq=row.fork_seq if row.forked_from is not None else None,
        parent=row.parent,
        deadline=row.give_up_at,
        queue=row.queue,
        priority=row.priority,
        concurrency_key=row.concurrency_key,
        tags=tuple(row.tags),
        not_before=row.not_before,
        expires_at=row.expires_at,
        retry_at=row.retry_at,
        version=row.version,
        version_digest=digest(row.agent),
    )
