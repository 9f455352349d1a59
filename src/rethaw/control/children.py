"""Sessions that agents spawn. A child is an ordinary session that knows its parent.

    ctx.spawn -> child.spawned (event) -> snapshot durable: due -> session created: running -> session over: ended -> told

Each arrow behind `due` is a transaction of its own, and each step is found again by looking at the database, so a death
in between loses nothing. Locks are taken in the order parent, its row in `children`, nodes."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any, Literal

from rethaw.control import agents, arguments, arrivals, inbox, lineage, queues, rows, sessions, spawned, specs, waits
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.control.wakeups import Transactions
from rethaw.log.writer import event_of
from rethaw.model import faults
from rethaw.model.enums import EventType, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound, RethawError
from rethaw.model.ids import new_id
from rethaw.model.types import AgentSpec, NewEvent

log = logging.getLogger("rethaw.control")
MOST = 1000  # children of one session that have not ended
_BATCH = 200
Act = Literal["message", "cancel"]


# ---------------------------------------------------------------- what the guest asks


async def spawn(conn: Conn, row: Row, attempt: int, call: str, agent: str, args: dict[str, Any], policy: Policy) -> str:
    """A child of the locked row, provisional. The same call with the same agent and arguments is the same child."""
    _current(row, attempt)
    spec = await _agent(conn, row, agent)
    sessions.check_agent(spec, policy)
    arguments.check(spec, args)
    text = spawned.spec_text(specs.text_of(spec), sessions.canonical(args))
    key = f"spawn:{call}"
    child = await spawned.former_child(conn, row.id, key, text)
    if child is None:
        alive = await rows.one(
            conn, "SELECT count(*) AS n FROM children WHERE parent = %s AND state <> 'ended'", (row.id,)
        )
        if alive is not None and alive["n"] >= MOST:
            raise Conflict(f"session {row.id} has {MOST} children that have not ended", remedy="wait for some of them")
        child = new_id("s")
    event = NewEvent(
        type=EventType.CHILD_SPAWNED, data={"child": child, "agent": spec.name}, body=text.encode(), key=key
    )
    return str((await rows.append(conn, row.id, event))[0].data["child"])


async def tell(conn: Conn, row: Row, attempt: int, call: str, child: str, act: Act, payload: bytes | None) -> None:
    """Send to a child, or cancel it; provisional."""
    _current(row, attempt)
    if payload is not None:
        inbox.check_size(payload)
    await arrivals.own_child(conn, row, child)
    key = f"child:{call}"
    ident = await spawned.former_act(conn, row.id, key, child, act, payload) or new_id("m")
    data = {"child": child, "act": act, "id": ident}
    await rows.append(conn, row.id, NewEvent(type=EventType.CHILD_TOLD, data=data, body=payload, key=key))


def _current(row: Row, attempt: int) -> None:
    if attempt != row.attempt:
        raise Conflict(f"attempt {attempt} of session {row.id} is over", remedy=f"its current one is {row.attempt}")


async def _agent(conn: Conn, row: Row, name: str) -> AgentSpec:
    """By the names that the parent's own file knows, else a deployed one. It may spawn what its parent may."""
    known = {**row.agent.agents, row.agent.name: row.agent.model_copy(update={"agents": {}})}
    spec = known.pop(name, None)
    if spec is None:
        return await agents.find(conn, name)
    if name == row.agent.name:
        spec = spec.model_copy(update={"signature": await agents.signature(conn, name, row.version)})
    return spec.model_copy(update={"agents": known})


# ---------------------------------------------------------------- what is due


async def work(transactions: Transactions, policy: Policy) -> None:
    """Everything that is due, in order: creating, ends and their consequences, messages."""
    for (child,) in await transactions.db.fetch(f"SELECT child FROM children WHERE state = 'due' LIMIT {_BATCH}"):
        await _create(transactions, child, policy)
    for (session,) in await transactions.db.fetch(f"SELECT id FROM sessions WHERE untold LIMIT {_BATCH}"):
        await _ended(transactions, session, policy)
    for (child,) in await transactions.db.fetch(
        f"SELECT child FROM children WHERE state = 'ended' AND NOT told LIMIT {_BATCH}"
    ):
        await _tell_end(transactions, child, policy)
    for ident, child, act, payload in await transactions.db.fetch(
        f"""SELECT a.id, a.child, a.act, a.payload FROM child_acts a LEFT JOIN children c ON c.child = a.child
            WHERE a.done_at IS NULL AND (c.child IS NULL OR c.state <> 'due') ORDER BY a.position LIMIT {_BATCH}"""
    ):
        await _act(transactions, ident, child, act, None if payload is None else bytes(payload), policy)


async def _create(transactions: Transactions, child: str, policy: Policy) -> None:
    """Create the session of a child that is due, unless its parent has failed meanwhile."""

    async def create(conn: Conn) -> None:
        found = await _due(conn, child)
        if found is None:
            return
        parent = await rows.load(conn, found["parent"])
        if parent.state in (State.FAILED, State.CANCELLED):
            await _end(conn, child, "cancelled", "cancelled", f"its parent {parent.id} is {parent.state.value}", None)
            return
        agent, args = spawned.parts_of(found["spec"])
        # In no queue: a parent that waits for its child with the only slot in its hand would wait for ever.
        spec = AgentSpec.model_validate_json(agent)
        await sessions.create(conn, child, spec, json.loads(args), None, policy, queue=queues.UNCOUNTED)
        await rows.update(conn, child, parent=parent.id)
        await conn.execute("UPDATE children SET state = 'running' WHERE child = %s", (child,))

    async def refuse(conn: Conn, why: str) -> None:
        if await _due(conn, child) is not None:
            await _end(conn, child, "failed", "none", why, None)

    try:
        await transactions.run(create)
    except NotFound:
        pass  # the parent was erased, and this with it
    except (InvalidInput, Conflict) as error:
        said = str(error)
        await transactions.run(lambda conn: refuse(conn, said))


async def _due(conn: Conn, child: str) -> dict[str, Any] | None:
    """The row of a child that is still due, locked after its parent."""
    found = await rows.one(conn, "SELECT parent FROM children WHERE child = %s", (child,))
    if found is None:
        return None
    await rows.load(conn, found["parent"], lock=True)
    return await rows.one(conn, "SELECT * FROM children WHERE child = %s AND state = 'due' FOR UPDATE", (child,))


async def _ended(transactions: Transactions, session: str, policy: Policy) -> None:
    """A session is over: keep its outcome for its parent; if it failed, end its children."""

    async def fn(conn: Conn) -> list[str]:
        row = await rows.load(conn, session, lock=True)
        await conn.execute("UPDATE sessions SET untold = false WHERE id = %s", (session,))
        if not row.state.final:  # rewound meanwhile
            return []
        if row.parent is not None:
            await _end(conn, session, row.state.value, row.reason.value, row.detail, await _result(conn, row))
        if row.state == State.COMPLETED:
            return []
        alive = await rows.many(
            conn, "SELECT child FROM children WHERE parent = %s AND state = 'running' ORDER BY child", (session,)
        )
        for child in alive:
            await spawned.cancel(conn, session, child["child"])
        return [child["child"] for child in alive]

    with contextlib.suppress(NotFound):  # erased meanwhile
        await transactions.run(fn)


async def _end(conn: Conn, child: str, state: str, reason: str, detail: str | None, result: bytes | None) -> None:
    outcome = {"state": state, "reason": reason, "detail": detail}
    await conn.execute(
        """UPDATE children SET state = 'ended', outcome = %s, result = %s, ended_at = clock_timestamp()
           WHERE child = %s AND state <> 'ended'""",
        (json.dumps(outcome), result, child),
    )


async def _result(conn: Conn, row: Row) -> bytes | None:
    """JSON text of what its agent returned."""
    if row.state != State.COMPLETED:
        return None
    cursor = await conn.execute(
        """SELECT e.seq, e.line, e.attempt, e.at, e.type, e.key, e.data, e.size, e.codec, e.body
           FROM events e JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
           WHERE e.session = ANY(%s) AND e.type = 'session.result' ORDER BY e.seq DESC LIMIT 1""",
        (row.id, row.line, await lineage.sessions(conn, row)),
    )
    found = await cursor.fetchone()
    return None if found is None else event_of(row.id, found).body


async def _tell_end(transactions: Transactions, child: str, policy: Policy) -> None:
    """Wake whoever waits for the child's end: its parent, or forks of that."""

    async def settle(conn: Conn, session: str) -> None:
        await waits.settle(conn, await rows.load(conn, session, lock=True), policy)

    faults.point("control.child.ended")
    waiting = await transactions.db.fetch(
        "SELECT DISTINCT session FROM waits WHERE state = 'open' AND children @> ARRAY[%s]::text[]", (child,)
    )
    for (session,) in waiting:
        try:
            await transactions.run(lambda conn, s=session: settle(conn, s))
        except NotFound:
            continue  # erased meanwhile
    await transactions.db.fetch("UPDATE children SET told = true WHERE child = %s RETURNING child", (child,))


async def _act(
    transactions: Transactions, ident: str, child: str, act: str, payload: bytes | None, policy: Policy
) -> None:
    """Do it once. Nothing reaches a child that has ended."""

    async def fn(conn: Conn) -> None:
        if act == "cancel":
            await sessions.cancel(conn, child, False, policy)
        else:
            await inbox.send(conn, child, ident, payload or b"null", None, policy)
        await done(conn)

    async def done(conn: Conn) -> None:
        await conn.execute("UPDATE child_acts SET done_at = now() WHERE id = %s", (ident,))

    try:
        await transactions.run(fn)
    except RethawError as error:
        if error.code in ("unavailable", "storage_full"):
            raise
        log.info("child %s: %s not done: %s", child, act, error)
        await transactions.run(done)
