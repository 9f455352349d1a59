"""What people ask of sessions: start, list, suspend, resume, cancel, crash, snapshot, erase."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from psycopg import sql

from rethaw.control import agents, arguments, leases, meant, placement, queues, recovery, room, rows, specs, wakeups
from rethaw.control.endings import finish
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.log.writer import create_session_in, erase_in
from rethaw.model.egress import rules_of
from rethaw.model.enums import Desired, Durability, EventType, Reason, State
from rethaw.model.errors import AmbiguousId, Conflict, InvalidInput, KeyReused, NotFound
from rethaw.model.types import AgentSpec, BudgetSpec, NewEvent, StartOptions
from rethaw.model.versions import unsigned

_UNPLACED = (State.CREATED, State.QUEUED)
# Its parent never heard of its end and cannot find it any more.
_GONE = """UPDATE children SET state = 'ended', ended_at = clock_timestamp(),
    outcome = '{"state": "cancelled", "reason": "cancelled", "detail": "it was removed"}'
    WHERE child = %s AND state <> 'ended'"""


def canonical(value: Any) -> str:
    """One JSON text for equal values. Raises InvalidInput for what JSON or UTF-8 cannot express."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"args are no JSON: {error}", remedy="use strings, numbers, lists and objects") from error
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


# Seconds. Without its least one, an agent would do nothing but be saved, or be over before it begins.
_LEAST = {
    "idle_suspend_s": 0.0,
    "snapshot_every_s": 1.0,
    "hold_max_s": 0.0,
    "max_duration_s": 0.1,
    "grace_s": 0.0,
    "keep_all_s": 0.0,
    "nap_s": 1.0,
    "keep_bytes": 0,
}


def check_agent(agent: AgentSpec, policy: Policy) -> None:
    """Raises InvalidInput naming the value and the remedy."""
    if not agent.name or len(agent.name) > 200 or "\0" in agent.name:
        raise InvalidInput(f"{agent.name[:80]!r} cannot name an agent", remedy="use 1 to 200 characters")
    if not agent.command and agent.entry is None:
        raise InvalidInput(f"agent {agent.name} has nothing to run", remedy="give a command or an entry")
    if agent.entry is not None and agent.code is None:
        raise InvalidInput(f"agent {agent.name} has entry {agent.entry!r} but no code", remedy="upload its code first")
    if any("\0" in part for part in (*agent.command, *agent.env.keys(), *agent.env.values(), agent.workdir)):
        raise InvalidInput(f"agent {agent.name}: command, env and workdir cannot hold NUL")
    if agent.template == "auto" and agent.entry is None:
        raise InvalidInput(
            f"agent {agent.name} is a command, of which no template can be made by itself",
            remedy="warm it with `rethaw template create`",
        )
    if agent.memory_bytes <= 0 or agent.pids <= 0:
        raise InvalidInput(f"agent {agent.name} has {agent.memory_bytes} bytes of memory and {agent.pids} pids")
    room.check_memory(agent)
    for field, least in _LEAST.items():
        value: float | None = getattr(agent, field)
        if value is not None and not least <= value < float("inf"):
            raise InvalidInput(
                f"{field} = {value!r} does not fit agent {agent.name}", remedy=f"use {least:g} or more seconds"
            )
    if agent.nap_s is not None and agent.idle_suspend_s is None:
        raise InvalidInput(
            f"agent {agent.name} has nap_s = {agent.nap_s:g}, but is never to be suspended for doing nothing",
            remedy="leave out nap, or say with idle_suspend after how long",
        )
    _check_limits(agent)
    arguments.check_record(agent)
    if not agent.workdir.startswith("/"):
        raise InvalidInput(f"workdir {agent.workdir!r} of agent {agent.name} is not absolute", remedy="begin it with /")
    if agent.entry is None and not agent.command[0]:
        raise InvalidInput(f"the command of agent {agent.name} is empty", remedy="name a program")
    for name in (*agent.env, *agent.image.env):
        if not name or "=" in name:
            raise InvalidInput(f"env of agent {agent.name}: {name!r} cannot name a variable", remedy="leave out the =")
    rules_of(agent.allow)
    if agent.durability is Durability.REPLICATED and not policy.object_store:
        raise InvalidInput(
            f'agent {agent.name} asks for durability "replicated", which needs an object store, and none is configured',
            remedy='name a bucket in [snapshots.s3] of the server\'s rethaw.toml, or use "local"',
        )


def _check_limits(agent: AgentSpec) -> None:
    retries = agent.retries
    if retries is not None:
        fits = 0 <= retries.max <= 1000 and 1 <= retries.factor <= 100
        if not fits or not all(0 <= s < 1e9 for s in (retries.delay_s, retries.max_delay_s)):
            raise InvalidInput(
                f"the retries of agent {agent.name} do not fit: {retries.model_dump_json()}",
                remedy="use 0 to 1000 retries, a factor of 1 to 100, and delays of 0 or more seconds",
            )
    if agent.budget is not None:
        check_budget(agent.budget)


def check_budget(budget: BudgetSpec) -> None:
    """Raises InvalidInput naming the value and the remedy."""
    for name, value in budget.model_dump(exclude_none=True).items():
        try:
            amount = float(value)
        except ValueError:
            amount = -1.0
        if not 0 <= amount < 1 << 53:
            raise InvalidInput(f"{name} = {value!r} is not a budget", remedy="use a number, 0 or more")


async def create(
    conn: Conn,
    session: str,
    agent: AgentSpec,
    args: dict[str, Any],
    key: str | None,
    policy: Policy,
    options: StartOptions | None = None,
    queue: str | None = None,
) -> tuple[Row, bool]:
    """The session, and whether it is new. With a known `key`: the existing one, or KeyReused for other arguments.

    `options` are of the start: they are not compared. `queue`: in place of theirs."""
    check_agent(agent, policy)
    options = options or StartOptions()
    queues.check_options(options)
    if key is not None and (not 0 < len(key) <= 500 or "\0" in key):
        raise InvalidInput(f"{key[:80]!r} cannot be a key", remedy="use 1 to 500 characters, no NUL")
    text, wanted = canonical(args), canonical(unsigned(agent).model_dump(mode="json"))
    arguments.check(agent, args)
    if key is not None:
        # Two callers with one key: the second waits here until the first has committed.
        await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (key,))
    former = await rows.select(conn, "WHERE s.id = %s OR (%s::text IS NOT NULL AND s.key = %s)", (session, key, key))
    if former:
        row = former[0]
        same = row.args == text and (
            canonical(unsigned(row.agent).model_dump(mode="json")) == wanted
            or (
                row.attempt > 1 and unsigned((await specs.of_attempt(conn, row.id, 1))[0]) == unsigned(agent)
            )  # upgraded
        )
        if row.key == key and not same:
            raise KeyReused(
                f"key {key!r} belongs to session {row.id}, started with another agent or other arguments",
                remedy="use a new key, or the same agent and arguments",
                session=row.id,
            )
        return row, row.id == session
    await room.check(conn, agent, policy)
    await create_session_in(conn, session)
    await conn.execute(
        "INSERT INTO session_specs (session, agent, args, version) VALUES (%s, %s, %s, %s)",
        (session, specs.text_of(agent), text, await agents.number(conn, agent)),
    )
    await queues.enter(conn, session, options, queue=queue)
    await rows.update(conn, session, attempt=1, key=key, agent_name=agent.name, memory_bytes=agent.memory_bytes)
    born = (
        await rows.append(
            conn,
            session,
            NewEvent(
                type=EventType.SESSION_CREATED, data={"agent": agent.name, "key": key} if key else {"agent": agent.name}
            ),
        )
    )[0]
    await rows.update(conn, session, attempt_line=born.line, attempt_seq=born.seq)
    row = await placement.dispatch(conn, await rows.load(conn, session), policy)
    if row.state == State.CREATED:
        row = await rows.move(conn, row, State.QUEUED, detail=await obstacle(conn, row))
    return row, True


async def obstacle(conn: Conn, row: Row, *, counted: bool = False) -> str:
    """Why a session that wants to run does not: its queue, or no node. `counted`: with what is true for a moment only."""
    found = await queues.obstacle(conn, row, counted=counted)
    return found.text if found is not None else await room.lacking(conn, row)


_LISTS = {"snapshots": "`rethaw snapshot ls SESSION` shows those there are"}


async def resolve(conn: Conn, text: str, *, table: str = "sessions", prefix: str = "s_") -> str:
    """The full id that `text` begins, with or without its prefix. Raises NotFound, AmbiguousId."""
    kind = table.removesuffix("s")
    if text and "\0" not in text:
        body = text.removeprefix(prefix)
        like = prefix + body.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        query = sql.SQL("SELECT id FROM {} WHERE id = %s OR id LIKE %s ORDER BY id LIMIT 5")
        found = [r["id"] for r in await rows.many(conn, query.format(sql.Identifier(table)), (text, like))]
        if text in found:
            return text
        if len(found) == 1:
            return str(found[0])
        if found:
            raise AmbiguousId(
                f"{text!r} fits {', '.join(found)}{' and more' if len(found) == 5 else ''}",
                remedy="write more characters of it",
                matches=found,
            )
    remedy = await meant.ident(conn, table, text, prefix, _LISTS.get(table, "`rethaw ls` shows those there are"))
    raise NotFound(f"there is no {kind} {text[:100]!r}", remedy=remedy)


def _not_over(row: Row, what: str) -> None:
    if row.state.final:
        raise Conflict(
            f"session {row.id} is {row.state.value}: it cannot be {what}", remedy="start a new one", state=row.state
        )


async def suspend(conn: Conn, session: str) -> Row:
    """A person wants it suspended; it stays so until a person resumes it."""
    row = await rows.load(conn, session, lock=True)
    _not_over(row, "suspended")
    if row.state in _UNPLACED:
        raise Conflict(f"session {row.id} is {row.state.value}: there is nothing to suspend yet", state=row.state)
    if row.desired == Desired.CANCELLED:
        raise Conflict(f"session {row.id} is being cancelled")
    first = row.desired != Desired.SUSPENDED
    await rows.update(conn, row.id, desired=Desired.SUSPENDED.value)
    row = await rows.load(conn, row.id)
    if row.state == State.SUSPENDED and row.reason != Reason.REQUESTED:
        return await rows.move(conn, row, State.SUSPENDED, reason=Reason.REQUESTED)
    if row.state in (State.RUNNING, State.WAITING) and (first or not await _pending(conn, row, "suspend")):
        await placement.assign(conn, row, "suspend", reason=Reason.REQUESTED)
    return row


async def resume(conn: Conn, session: str, policy: Policy) -> Row:
    """A person wants it running."""
    row = await rows.load(conn, session, lock=True)
    _not_over(row, "resumed")
    if row.desired == Desired.CANCELLED:
        raise Conflict(f"session {row.id} is being cancelled")
    await rows.update(conn, row.id, desired=Desired.RUNNING.value)
    row = await rows.load(conn, row.id)
    if row.state == State.SUSPENDED:
        return await recovery.resume(conn, row, policy)
    await conn.execute("DELETE FROM assignments WHERE session = %s AND action = 'suspend'", (row.id,))
    return row


async def cancel(conn: Conn, session: str, now: bool, policy: Policy) -> Row:
    """End it: at once, or with the agent's grace period if it has a sandbox. Repeating it is fine."""
    row = await rows.load(conn, session, lock=True)
    if row.state == State.CANCELLED:
        return row
    _not_over(row, "cancelled")
    if now or not row.state.on_node or row.node is None:
        await rows.update(conn, row.id, desired=Desired.CANCELLED.value)
        row = await rows.load(conn, row.id)
        return await finish(conn, row, State.CANCELLED, reason=Reason.CANCELLED)
    if row.desired != Desired.CANCELLED:
        await rows.update(conn, row.id, desired=Desired.CANCELLED.value)
        until = sql.SQL("UPDATE sessions SET cancel_by = now() + make_interval(secs => %s) WHERE id = %s")
        await conn.execute(until, (row.agent.grace_s + policy.cancel_slack_s, row.id))
        row = await rows.load(conn, row.id)
        await placement.assign(conn, row, "cancel", reason=Reason.CANCELLED)
    return row


async def crash(conn: Conn, session: str) -> Row:
    """Kill its sandbox, as a crash would."""
    row = await rows.load(conn, session, lock=True)
    _not_over(row, "crashed")
    if not row.state.on_node or row.node is None:
        raise Conflict(f"session {row.id} is {row.state.value}: it has no sandbox to crash", remedy="resume it first")
    await rows.update(conn, row.id, crash_asked=True)
    await placement.assign(conn, row, "crash", reason=Reason.REQUESTED)
    return await rows.load(conn, row.id)


async def ask_snapshot(conn: Conn, session: str) -> tuple[Row, datetime]:
    """Tell the node to take one. The time is the database's: a snapshot created after it is the answer."""
    row = await rows.load(conn, session, lock=True)
    _not_over(row, "snapshot")
    clock = await rows.one(conn, "SELECT clock_timestamp() AS now")
    if row.state.on_node and row.node is not None:  # one that is only just coming up takes it afterwards
        await placement.assign(conn, row, "snapshot", reason=Reason.REQUESTED)
    elif row.state in _UNPLACED:
        raise Conflict(f"session {row.id} is {row.state.value}: there is nothing to take a snapshot of yet")
    assert clock is not None
    return row, clock["now"]


async def erase(conn: Conn, session: str, force: bool) -> dict[str, Any]:
    """Delete it whole; its snapshots' rows stay until the node has deleted the files. Returns the tombstone."""
    try:
        row = await rows.load(conn, session, lock=True)
    except NotFound:
        return await tombstone(conn, session)  # the reply to the commit was lost
    forks = await rows.many(conn, "SELECT id FROM sessions WHERE forked_from = %s ORDER BY id", (session,))
    if forks:
        names = [r["id"] for r in forks]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise Conflict(
            f"session {row.id} cannot be removed: its forks read its log ({shown})",
            remedy="remove them first: `rethaw rm FORK ...`",
            forks=names,
        )
    if not row.state.final and row.state != State.SUSPENDED:
        if not force:
            raise Conflict(
                f"session {row.id} is {row.state.value}: only an ended or suspended one can be removed",
                remedy="cancel it first, or force it",
                state=row.state,
            )
        row = await finish(conn, row, State.CANCELLED, reason=Reason.CANCELLED)
    await conn.execute(_GONE, (session,))
    await conn.execute("UPDATE snapshots SET erased = true WHERE session = %s", (session,))
    await conn.execute("DELETE FROM assignments WHERE session = %s AND action <> 'kill'", (session,))
    await erase_in(conn, session)
    wakeups.note(wakeups.QUEUE_CHANNEL, wakeups.ANY)  # a suspended one had a slot, maybe
    return await tombstone(conn, session)


async def tombstone(conn: Conn, session: str) -> dict[str, Any]:
    found = await rows.one(conn, "SELECT * FROM erasures WHERE session = %s", (session,))
    if found is None:
        raise rows.unknown(session)
    return found


async def _pending(conn: Conn, row: Row, action: str) -> bool:
    return bool(
        await rows.many(
            conn,
            "SELECT 1 FROM assignments WHERE session = %s AND generation = %s AND action = %s",
            (row.id, row.generation, action),
        )
    )


async def place(conn: Conn, session: str, policy: Policy) -> bool:
    """Try again to give a session that waits for a node to one. False: no node has room for as much memory."""
    row = await rows.load(conn, session, lock=True)
    if row.node is not None or row.state.final:
        return True
    if row.state == State.SUSPENDED:
        if row.desired == Desired.RUNNING and (
            row.reason == Reason.NODE_STOPPED
            or (row.reason == Reason.PROVIDER_HOLD and not await leases.held(conn, row.id))
        ):
            await recovery.resume(conn, row, policy)
    elif row.state in (*_UNPLACED, State.RESUMING, State.RECOVERING):
        row = await placement.dispatch(conn, row, policy)
        if row.node is None:
            queued = await queues.obstacle(conn, row)
            why = queued.text if queued is not None else await room.lacking(conn, row)
            if row.state in _UNPLACED and row.detail != why:
                await rows.update(conn, row.id, detail=why)
            return queued is not None or row.restored is not None
    return True


async def expire(conn: Conn, session: str) -> None:
    """It was to have started by now."""
    row = await queues.overdue(conn, session)
    if row is not None:
        why = await obstacle(conn, row, counted=True)
        await finish(conn, row, State.FAILED, reason=Reason.EXPIRED, detail=f"it could not start within its ttl: {why}")


async def give_up(conn: Conn, session: str) -> None:
    """Its longest duration is over."""
    row = await rows.load(conn, session, lock=True)
    if row.state.final or row.give_up_at is None:
        return
    over = await rows.one(conn, "SELECT clock_timestamp() >= %s AS over", (row.give_up_at,))
    if over is not None and over["over"]:
        limit = f"{row.agent.max_duration_s:g} s"
        await finish(conn, row, State.FAILED, reason=Reason.MAX_DURATION, detail=f"it took longer than {limit}")


async def end_cancel(conn: Conn, session: str) -> None:
    """Its node did not report the end of a cancelled session in time."""
    row = await rows.load(conn, session, lock=True)
    if not row.state.final and row.desired == Desired.CANCELLED:
        await finish(
            conn, row, State.CANCELLED, reason=Reason.CANCELLED, detail="it did not end within its grace period"
        )
