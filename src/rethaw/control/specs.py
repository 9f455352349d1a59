"""Which version of its agent each attempt of a session runs.

`session_specs` has what the current attempt runs; `attempt_specs` what former ones ran, from the first change on. A snapshot
belongs to the version whose memory it holds, so whoever goes back to one takes the spec of its attempt."""

from __future__ import annotations

import json

from rethaw.control import rows
from rethaw.control.rows import Conn, Row
from rethaw.model.types import AgentSpec

_SETTLE = """INSERT INTO attempt_specs (session, attempt, agent, version)
    SELECT p.session, n, p.agent, p.version
    FROM session_specs p JOIN sessions s ON s.id = p.session,
         generate_series(1, greatest(s.attempt, s.high_attempt)) n
    WHERE p.session = %s AND (%s OR EXISTS (SELECT 1 FROM attempt_specs t WHERE t.session = p.session))
    ON CONFLICT DO NOTHING"""


def text_of(agent: AgentSpec) -> str:
    """As a session has it: without its signature, which is asked for at a start alone (the version's row has it)."""
    wire = agent.model_dump(mode="json", exclude={"signature"})
    return json.dumps(wire, sort_keys=True, allow_nan=False, separators=(",", ":"))


async def of_attempt(conn: Conn, session: str, attempt: int) -> tuple[AgentSpec, int | None]:
    """What that attempt ran, and the number of that version. Raises NotFound."""
    found = await rows.one(
        conn,
        """SELECT coalesce(t.agent, p.agent) AS agent, CASE WHEN t.session IS NULL THEN p.version ELSE t.version END AS version
           FROM session_specs p LEFT JOIN attempt_specs t ON t.session = p.session AND t.attempt = %s
           WHERE p.session = %s""",
        (attempt, session),
    )
    if found is None:
        raise rows.unknown(session)
    return AgentSpec.model_validate_json(found["agent"]), found["version"]


async def inherit(conn: Conn, parent: Row, forks: list[str]) -> None:
    """Forks of the locked `parent` know what its attempts ran."""
    await conn.execute(
        f"""WITH settled AS ({_SETTLE} RETURNING attempt, agent, version)
            INSERT INTO attempt_specs (session, attempt, agent, version)
            SELECT u, t.attempt, t.agent, t.version FROM unnest(%s::text[]) u, (
                SELECT attempt, agent, version FROM attempt_specs WHERE session = %s
                UNION ALL SELECT * FROM settled) t""",
        (parent.id, False, forks, parent.id),
    )


async def switch(conn: Conn, row: Row, agent: AgentSpec, version: int | None, *, begun: bool = True) -> Row:
    """From its next attempt on the locked session runs `agent`; from its current one on that has not `begun` yet."""
    await conn.execute(_SETTLE, (row.id, True))
    if not begun:
        await conn.execute("DELETE FROM attempt_specs WHERE session = %s AND attempt = %s", (row.id, row.attempt))
    await conn.execute(
        "UPDATE session_specs SET agent = %s, version = %s WHERE session = %s",
        (text_of(agent), version, row.id),
    )
    await rows.update(conn, row.id, agent_name=agent.name, memory_bytes=agent.memory_bytes)
    return await rows.load(conn, row.id)


async def go_back(conn: Conn, row: Row, attempt: int) -> Row:
    """The locked session goes back to `attempt`: what that ran is what it runs again."""
    if attempt == row.attempt:
        return row
    await rows.update(conn, row.id, files_from=None)  # those were of another attempt
    agent, version = await of_attempt(conn, row.id, attempt)
    return row if agent == row.agent and version == row.version else await switch(conn, row, agent, version)
