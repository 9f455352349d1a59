"""How long the agent of a session with a budget has run: the time that a wall budget counts.

It is kept as the time before the present state plus that of the state, so nothing has to be written while it runs. Time
in which its node was gone does not count: nothing of it ran then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rethaw.db.pool import Connection
from rethaw.model.enums import State
from rethaw.model.types import NodeInfo

if TYPE_CHECKING:
    from rethaw.control.rows import Row

AWAKE = (State.RUNNING, State.WAITING, State.SUSPENDING)
WARN_AT = 0.8  # of a budget
_STATES = [state.value for state in AWAKE]
_NOW = """
SELECT s.awake_s + CASE WHEN s.state = ANY(%s) THEN greatest(0, extract(epoch FROM least(
           clock_timestamp(), s.awake_until, (SELECT n.lease_until FROM nodes n WHERE n.id = s.node)) - s.state_since))
       ELSE 0 END::float8 AS used
FROM sessions s WHERE s.id = %s"""


async def used_s(conn: Connection, session: str) -> float:
    """Seconds that it has run by now."""
    cursor = await conn.execute(_NOW, (_STATES, session))
    found = await cursor.fetchone()
    return float(found[0]) if found is not None else 0.0


async def counted(conn: Connection, row: Row, state: State) -> dict[str, Any]:
    """Columns of a move to `state`: what the present one adds, and when the wall budget is to be looked at."""
    if row.limits is None:
        return {}
    limit = row.limits.wall_s
    used = await used_s(conn, row.id)
    at = await look_at(conn, used, limit) if state in AWAKE and limit is not None else None
    return {"awake_s": used, "awake_until": None, "wall_at": at}


async def look_at(conn: Connection, used: float, limit: float) -> Any:
    """The time of the next look for one that runs and has run for `used` of `limit` seconds."""
    left = (limit if used >= WARN_AT * limit else WARN_AT * limit) - used
    cursor = await conn.execute("SELECT clock_timestamp() + make_interval(secs => %s)", (max(left, 0.05),))
    found = await cursor.fetchone()
    return found[0] if found is not None else None


async def told_by_log(conn: Connection, session: str) -> float:
    """Seconds that it ran before its present state, of one that had no budget so far."""
    cursor = await conn.execute(
        """SELECT coalesce(sum(extract(epoch FROM until - at)), 0)::float8 FROM (
               SELECT data->>'state' AS state, at, lead(at) OVER (ORDER BY seq) AS until
               FROM events WHERE session = %s AND type = 'session.state') states
           WHERE state = ANY(%s) AND until IS NOT NULL""",
        (session, _STATES),
    )
    found = await cursor.fetchone()
    return float(found[0]) if found is not None else 0.0


async def seen_last(conn: Connection, info: NodeInfo) -> None:
    """A node comes back as another incarnation: what it ran, ran no longer than its former lease."""
    await conn.execute(
        """UPDATE sessions s SET awake_until = n.lease_until FROM nodes n
           WHERE n.id = %s AND n.incarnation <> %s AND s.node = n.id AND s.state = ANY(%s) AND s.awake_until IS NULL""",
        (info.id, info.incarnation, _STATES),
    )
