"""What sessions have done and keep, for many of them at once."""

from __future__ import annotations

from typing import Any

from rethaw.control import rows
from rethaw.control.rows import Conn

# Model calls as budgets count them, see `budgets`.
_LOADS = """
SELECT s.id, s.agent_name AS agent, p.version, s.state, s.reason, s.degraded, s.memory_bytes AS memory_limit_bytes,
       coalesce(e.at, s.updated_at) AS active_at, s.created_at, x.*, n.*
FROM (SELECT * FROM sessions WHERE %(ended)s OR state NOT IN ('completed', 'failed', 'cancelled')
      ORDER BY id DESC LIMIT %(limit)s) s
JOIN session_specs p ON p.session = s.id
LEFT JOIN events e ON e.session = s.id AND e.seq = s.last_seq
CROSS JOIN LATERAL (
    SELECT coalesce(sum(CASE WHEN t.state = 'torn' THEN t.epoch - 1 ELSE t.epoch END), 0)::bigint AS model_calls,
           coalesce(sum((t.usage::json->>'input_tokens')::bigint), 0)::bigint AS input_tokens,
           coalesce(sum((t.usage::json->>'output_tokens')::bigint), 0)::bigint AS output_tokens
    FROM exchanges y JOIN exchange_state t USING (id)
    WHERE y.session = s.id AND (y.meta::json->>'model_call')::boolean) x
CROSS JOIN LATERAL (
    SELECT count(*) AS snapshots, coalesce(sum(k.stored_bytes), 0)::bigint AS stored_bytes
    FROM snapshots k WHERE k.session = s.id AND NOT k.erased) n
ORDER BY s.id DESC"""


async def read(conn: Conn, limit: int, ended: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Fields of SessionLoad for the newest `limit` sessions that have not ended (`ended`: those too), and how many sessions
    are in each state."""
    found = await rows.many(conn, _LOADS, {"limit": limit, "ended": ended})
    states = await rows.many(conn, "SELECT state, count(*) AS n FROM sessions GROUP BY state")
    return found, {one["state"]: int(one["n"]) for one in states}
