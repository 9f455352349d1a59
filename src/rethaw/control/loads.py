"""What sessions have done and keep, for many of them at once."""

from __future__ import annotations

from typing import Any

from rethaw.control import rows, spending
from rethaw.control.rows import Conn

_MANY = 4 * spending.FOLD
# Model calls as budgets count them, and from the same sums (`spending`): this is asked every second by whoever looks on.
_LOADS = """
SELECT s.id, s.agent_name AS agent, p.version, s.state, s.reason, s.degraded, s.memory_bytes AS memory_limit_bytes,
       coalesce(e.at, s.updated_at) AS active_at, s.created_at, x.*, n.*
FROM (SELECT * FROM sessions WHERE %(ended)s OR state NOT IN ('completed', 'failed', 'cancelled')
      ORDER BY id DESC LIMIT %(limit)s) s
JOIN session_specs p ON p.session = s.id
LEFT JOIN events e ON e.session = s.id AND e.seq = s.last_seq
LEFT JOIN spent_totals t ON t.session = s.id
CROSS JOIN LATERAL (
    SELECT sum(calls)::bigint AS model_calls, sum(input)::bigint AS input_tokens, sum(output)::bigint AS output_tokens,
           sum(new) AS new
    FROM (
        SELECT 0 AS calls, 0 AS input, 0 AS output, 0 AS new
        UNION ALL
        SELECT r.calls, r.input, r.output, 0 FROM jsonb_to_recordset(t.sums) AS r(calls bigint, input bigint, output bigint)
        UNION ALL
        SELECT CASE WHEN e.state = 'torn' THEN e.epoch - 1 ELSE e.epoch END,
               coalesce((e.usage::json->>'input_tokens')::bigint, 0),
               coalesce((e.usage::json->>'output_tokens')::bigint, 0), y.new
        FROM (
            SELECT id, meta, 1 AS new FROM exchanges
            WHERE session = s.id AND seq > coalesce(t.upto, 0)
              AND attempt = ANY(ARRAY(SELECT generate_series(1, greatest(s.attempt, s.high_attempt))))
            UNION ALL
            SELECT id, meta, 0 FROM exchanges WHERE id = ANY(coalesce(t.pending, '{}'))
        ) y JOIN exchange_state e USING (id)
        WHERE (y.meta::json->>'model_call')::boolean
    ) all_calls) x
CROSS JOIN LATERAL (
    SELECT count(*) AS snapshots, coalesce(sum(k.stored_bytes), 0)::bigint AS stored_bytes
    FROM snapshots k WHERE k.session = s.id AND NOT k.erased) n
ORDER BY s.id DESC"""


async def read(conn: Conn, limit: int, ended: bool) -> tuple[list[dict[str, Any]], dict[str, int], list[str]]:
    """Fields of SessionLoad for the newest `limit` sessions that have not ended (`ended`: those too), how many sessions are in
    each state, and those of which many calls were counted one by one: `spending.add_up` makes the next time cheaper."""
    found = await rows.many(conn, _LOADS, {"limit": limit, "ended": ended})
    states = await rows.many(conn, "SELECT state, count(*) AS n FROM sessions GROUP BY state")
    many = [one["id"] for one in found if one.pop("new") >= _MANY]
    return found, {one["state"]: int(one["n"]) for one in states}, many
