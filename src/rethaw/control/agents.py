"""The registry: versions of agents by name, which of them a start by name takes.

A version is the digest of image, code and spec. It is registered when it is deployed, or when a session of it starts; only
the former moves what a start by name takes."""

from __future__ import annotations

from typing import Any

from rethaw.control import meant, rows
from rethaw.control.rows import Conn
from rethaw.model.errors import Conflict, NotFound
from rethaw.model.types import AgentSpec, Signature, StartOptions
from rethaw.model.versions import AgentDetail, AgentVersion, Running, digest, plain

_ENDED = "state NOT IN ('completed', 'failed', 'cancelled')"
_SHOWN = 200  # sessions of an agent
_PLAIN = StartOptions()


_FIND = """SELECT v.*, a.pinned,
       v.number = coalesce(a.pinned, (SELECT n.number FROM agent_versions n WHERE n.agent = v.agent
           AND n.deployed_at IS NOT NULL ORDER BY n.deployed_at DESC, n.number DESC LIMIT 1)) AS current
    FROM agent_versions v JOIN agents a ON a.name = v.agent """


def _version(found: dict[str, Any], sessions: int = 0) -> AgentVersion:
    return AgentVersion(
        agent=found["agent"],
        version=found["number"],
        digest=found["digest"],
        spec=AgentSpec.model_validate_json(found["spec"]),
        starting=StartOptions.model_validate_json(found["starting"]),
        created_at=found["created_at"],
        deployed_at=found["deployed_at"],
        current=bool(found["current"]),
        pinned=found["pinned"] == found["number"],
        sessions=sessions,
    )


async def number(conn: Conn, agent: AgentSpec) -> int:
    """The number of `agent` among the versions of its name, registered if it is new."""
    mark = digest(agent)
    query = "SELECT number, spec::jsonb ? 'signature' AS signed FROM agent_versions WHERE agent = %s AND digest = %s"
    found = await rows.one(conn, query, (agent.name, mark))
    if found is None:
        # One at a time from here on, so that numbers have no gap.
        await conn.execute("INSERT INTO agents (name) VALUES (%s) ON CONFLICT DO NOTHING", (agent.name,))
        await conn.execute("SELECT 1 FROM agents WHERE name = %s FOR UPDATE", (agent.name,))
        found = await rows.one(conn, query, (agent.name, mark))
    if found is None:
        found = await rows.one(
            conn,
            """INSERT INTO agent_versions (agent, number, digest, spec)
               SELECT %s, coalesce(max(number), 0) + 1, %s, %s FROM agent_versions WHERE agent = %s RETURNING number""",
            (agent.name, mark, plain(agent).model_dump_json(), agent.name),
        )
    elif not found["signed"] and agent.signature is not None:  # registered by an SDK that wrote none
        await conn.execute(
            "UPDATE agent_versions SET spec = %s WHERE agent = %s AND number = %s",
            (plain(agent).model_dump_json(), agent.name, found["number"]),
        )
    assert found is not None
    return int(found["number"])


async def deploy(conn: Conn, agent: AgentSpec, starting: StartOptions = _PLAIN) -> tuple[AgentVersion, bool]:
    """Register `agent` and let a start by name take it (unless another version is pinned). Whether it is new."""
    known = await rows.one(
        conn,
        "SELECT 1 AS ok FROM agent_versions WHERE agent = %s AND digest = %s AND deployed_at IS NOT NULL",
        (agent.name, digest(agent)),
    )
    count = await number(conn, agent)
    await conn.execute(
        "UPDATE agent_versions SET deployed_at = clock_timestamp(), starting = %s WHERE agent = %s AND number = %s",
        (starting.model_dump_json(exclude_defaults=True), agent.name, count),
    )
    return await pick(conn, agent.name, count), known is None


async def signature(conn: Conn, name: str, version: int | None) -> Signature | None:
    """What is written down of the arguments of a version."""
    found = await rows.one(conn, "SELECT spec FROM agent_versions WHERE agent = %s AND number = %s", (name, version))
    return None if found is None else AgentSpec.model_validate_json(found["spec"]).signature


async def find(conn: Conn, name: str, version: int | None = None) -> AgentSpec:
    """What a start of agent `name` takes: `version`, else the pinned one, else what was deployed last. Raises NotFound."""
    return (await pick(conn, name, version)).spec


async def pick(conn: Conn, name: str, version: int | None = None) -> AgentVersion:
    """`find`, with all that is known of it."""
    found = await rows.many(conn, _FIND + "WHERE v.agent = %s ORDER BY v.number", (name,))
    if not found:
        remedy = await meant.name(conn, "agents", name, "`rethaw agent ls` shows those there are")
        raise NotFound(f"there is no agent {name[:80]!r}", remedy=remedy, agent=name)
    for one in found:
        if one["number"] == version or (version is None and one["current"]):
            return _version(one)
    if version is None:
        raise NotFound(
            f"agent {name} was never deployed: it was only run from a file",
            remedy=f"`rethaw deploy` it, or name a version (1 to {found[-1]['number']})",
            agent=name,
        )
    raise NotFound(
        f"agent {name} has no version {version}, only 1 to {found[-1]['number']}",
        remedy=f"see `rethaw agent show {name}`",
        agent=name,
        version=version,
    )


async def pin(conn: Conn, name: str, version: int | None) -> AgentVersion:
    """Let a start by name take `version`, or (None) what was deployed last again. Raises NotFound, and Conflict when
    nothing was deployed that could be."""
    chosen = await pick(conn, name, version) if version is not None else None
    await conn.execute("UPDATE agents SET pinned = %s WHERE name = %s", (version, name))
    if chosen is not None:
        return await pick(conn, name, version)
    try:
        return await pick(conn, name)
    except NotFound as error:
        if not await rows.one(conn, "SELECT 1 AS ok FROM agents WHERE name = %s", (name,)):
            raise
        raise Conflict(
            f"agent {name} was never deployed: without a pin nothing would start by its name",
            remedy="`rethaw deploy` it first",
        ) from error


async def every(conn: Conn) -> list[AgentVersion]:
    """The current version of each agent, by name; of one that was never deployed the newest."""
    found = await rows.many(
        conn,
        f"""SELECT DISTINCT ON (t.agent) t.*, (SELECT count(*) FROM sessions s
                WHERE s.agent_name = t.agent AND s.{_ENDED}) AS sessions
            FROM ({_FIND}) t ORDER BY t.agent, t.current DESC NULLS LAST, t.number DESC""",
    )
    return [_version(one, one["sessions"]) for one in found]


async def show(conn: Conn, name: str) -> AgentDetail:
    """Raises NotFound."""
    found = await rows.many(
        conn,
        f"""SELECT t.*, (SELECT count(*) FROM sessions s JOIN session_specs p ON p.session = s.id
                WHERE s.agent_name = t.agent AND p.version = t.number AND s.{_ENDED}) AS sessions
            FROM ({_FIND}) t WHERE t.agent = %s ORDER BY t.number DESC""",
        (name,),
    )
    if not found:
        await pick(conn, name)
    running = await rows.many(
        conn,
        """SELECT s.id, p.version, s.state FROM sessions s JOIN session_specs p ON p.session = s.id
           WHERE s.agent_name = %s ORDER BY s.id DESC LIMIT %s""",
        (name, _SHOWN),
    )
    return AgentDetail(
        name=name,
        pinned=found[0]["pinned"],
        versions=tuple(_version(one, one["sessions"]) for one in found),
        sessions=tuple(Running(session=r["id"], version=r["version"], state=r["state"]) for r in running),
    )
