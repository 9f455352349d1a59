"""Templates: a session that is warm and suspended, and the forks of it that starts are. See docs/adr/0019."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from rethaw.control import arguments, forks, inbox, meant, placement, queues, rows, sessions
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import State
from rethaw.model.errors import Conflict, InvalidInput, KeyReused, NotFound
from rethaw.model.ids import new_id
from rethaw.model.types import AgentSpec, StartOptions, Template
from rethaw.model.versions import unsigned

START = "rethaw.start"  # the signal that ctx.ready() waits for; equal to rethaw.guest.protocol.START
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY = "template:"
AUTO = "auto."  # equal to rethaw.guest.protocol.AUTO


def auto_name(agent: AgentSpec) -> str:
    """The name of the template that an agent's sessions start from by themselves: another one for any other agent."""
    text = sessions.canonical(unsigned(agent).model_dump(mode="json"))
    return f"{_auto_prefix(agent)}{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _auto_prefix(agent: AgentSpec) -> str:
    return f"{AUTO}{re.sub('[^A-Za-z0-9._-]', '-', agent.name)[:60]}."


def _template(record: dict[str, Any]) -> Template:
    return Template(**{field: record[field] for field in Template.model_fields})


async def get(conn: Conn, name: str, *, lock: bool = False) -> Template:
    """Raises NotFound."""
    query = "SELECT * FROM templates WHERE name = %s"
    found = await rows.one(conn, query + " FOR SHARE" if lock else query, (name,))
    if found is None:
        remedy = await meant.name(conn, "templates", name, "`rethaw template ls` shows those there are")
        raise NotFound(f"there is no template {name!r}", remedy=remedy)
    return _template(found)


async def every(conn: Conn) -> list[Template]:
    return [_template(r) for r in await rows.many(conn, "SELECT * FROM templates ORDER BY name")]


async def create(
    conn: Conn, name: str, session: str, agent: AgentSpec, args: dict[str, Any], policy: Policy
) -> Template:
    """Begin one, or find the one that has begun. One whose program has ended by now is begun anew.

    Raises Conflict when the name belongs to another agent or other arguments.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:100]!r} cannot be a template's name", remedy="use letters, digits, '.', '_' and '-'"
        )
    env = {**agent.env, "RETHAW_TEMPLATE": name}
    agent = agent.model_copy(update={"env": env, "template": "none"})
    key = _KEY + name
    await conn.execute(
        """UPDATE sessions SET key = NULL WHERE key = %s AND state IN ('completed', 'failed', 'cancelled')""", (key,)
    )
    try:
        row, _ = await sessions.create(conn, session, agent, args, key, policy, queue=queues.UNCOUNTED)
    except KeyReused as error:
        raise Conflict(
            f"template {name} is of another agent or has other arguments", remedy=f"`rethaw template rm {name}` first"
        ) from error
    # How long it may last is for those that are started from it.
    await conn.execute("UPDATE sessions SET give_up_at = NULL WHERE id = %s", (row.id,))
    await conn.execute(
        """INSERT INTO templates (name, session) VALUES (%s, %s)
           ON CONFLICT (name) DO UPDATE SET session = excluded.session, snapshot = NULL, ready_by = NULL
           WHERE templates.session <> excluded.session""",
        (name, row.id),
    )
    return await get(conn, name)


async def start_auto(
    conn: Conn,
    session: str,
    generation: str,
    agent: AgentSpec,
    args: dict[str, Any],
    key: str | None,
    policy: Policy,
    options: StartOptions | None = None,
) -> tuple[Row, bool] | None:
    """A session of `agent` from its own template; None when there is none yet, or the key's session began otherwise."""
    sessions.check_agent(agent, policy)
    arguments.check(agent, args)
    name, payload = auto_name(agent), json.dumps(args).encode()
    if key is not None:
        await _lock_key(conn, key)
        former = await rows.select(conn, "WHERE s.key = %s", (key,))
        if former and await _told(conn, former[0], name) is None:
            return None
    found = await rows.one(conn, "SELECT * FROM templates WHERE name = %s AND snapshot IS NOT NULL FOR SHARE", (name,))
    if found is None:
        return None
    return await _start(conn, _template(found), session, generation, payload, key, policy, options)


async def outdated(conn: Conn, agent: AgentSpec) -> list[str]:
    """Names of templates that were made for former versions of `agent`."""
    found = await rows.many(
        conn,
        "SELECT name FROM templates WHERE starts_with(name, %s) AND name <> %s",
        (_auto_prefix(agent), auto_name(agent)),
    )
    return [r["name"] for r in found if re.fullmatch("[0-9a-f]{16}", r["name"].removeprefix(_auto_prefix(agent)))]


async def ready(conn: Conn, name: str, session: str, snapshot: str, by: str) -> Template:
    """Sessions can be started from it from now on."""
    await conn.execute("UPDATE snapshots SET pinned = true WHERE id = %s", (snapshot,))
    await conn.execute(
        "UPDATE templates SET snapshot = %s, ready_by = %s WHERE name = %s AND session = %s",
        (snapshot, by, name, session),
    )
    return await get(conn, name)


async def start(
    conn: Conn,
    name: str,
    session: str,
    generation: str,
    payload: bytes,
    key: str | None,
    policy: Policy,
    options: StartOptions | None = None,
) -> tuple[Row, bool]:
    """A session forked from it, with `payload` (JSON) as its arguments, and whether it is new. It waits for its turn in
    its queue as any other does, and is given to a node at once where there is room.

    Raises NotFound, Conflict when it is not ready, KeyReused.
    """
    return await _start(
        conn, await get(conn, name, lock=True), session, generation, payload, key, policy, options
    )  # fmt: skip


async def _start(
    conn: Conn,
    found: Template,
    session: str,
    generation: str,
    payload: bytes,
    key: str | None,
    policy: Policy,
    options: StartOptions | None,
) -> tuple[Row, bool]:
    name, options = found.name, options or StartOptions()
    queues.check_options(options)
    if found.snapshot is None:
        raise Conflict(f"template {name} is not ready yet", remedy=f"see `rethaw why {found.session}`")
    if key is not None:
        await _lock_key(conn, key)
    former = await rows.select(conn, "WHERE s.id = %s OR (%s::text IS NOT NULL AND s.key = %s)", (session, key, key))
    if former:
        await _same(conn, former[0], name, payload, key)
        return await _placed(conn, former[0].id, policy), False
    wait = await queues.would_wait(conn, options)
    (row,) = await forks.fork(conn, found.session, found.snapshot, {session: generation}, False, queued=wait)
    await queues.enter(conn, row.id, options)
    if key is not None:
        await rows.update(conn, row.id, key=key)
    if wait and (why := await queues.obstacle(conn, await rows.load(conn, row.id))) is not None:
        await rows.update(conn, row.id, detail=why.text)
    await inbox.signal(conn, row.id, new_id("sig"), START, payload, f"{_KEY}{name}", policy)
    return await _placed(conn, row.id, policy), True


async def _placed(conn: Conn, session: str, policy: Policy) -> Row:
    """The session as it is once it was given to a node, if it can be."""
    row = await rows.load(conn, session, lock=True)
    if row.node is None and row.state in (State.QUEUED, State.RESUMING):
        row = await placement.dispatch(conn, row, policy)
        if row.node is None:  # say why
            await sessions.place(conn, row.id, policy)
            row = await rows.load(conn, row.id)
    return row


async def _lock_key(conn: Conn, key: str) -> None:
    if not 0 < len(key) <= 500 or "\0" in key or key.startswith(_KEY):
        raise InvalidInput(f"{key[:80]!r} cannot be a key", remedy="use 1 to 500 characters, no NUL")
    # Two callers with one key: the second waits here until the first has committed.
    await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (key,))


async def _told(conn: Conn, row: Row, name: str) -> bytes | None:
    """What a session was started with from the template `name`; None when it was not."""
    told = await rows.one(
        conn,
        "SELECT payload FROM signals WHERE session = %s AND idempotency_key = %s",
        (row.id, f"{_KEY}{name}"),
    )
    return None if told is None else bytes(told["payload"])


async def _same(conn: Conn, row: Row, name: str, payload: bytes, key: str | None) -> None:
    if await _told(conn, row, name) != payload:
        raise KeyReused(
            f"key {key!r} belongs to session {row.id}, started otherwise", remedy="use a new key", session=row.id
        )


async def drop(conn: Conn, name: str) -> Template:
    """The name goes; its session stays as long as others were forked from it."""
    found = await get(conn, name)
    await conn.execute("UPDATE snapshots SET pinned = false WHERE id = %s", (found.snapshot,))
    await conn.execute("UPDATE sessions SET key = NULL WHERE id = %s", (found.session,))
    await conn.execute("DELETE FROM templates WHERE name = %s", (name,))
    return found
