"""What the log has between two snapshots: how far they share a path, and what each side has beyond it."""

from __future__ import annotations

from typing import Any

from rethaw.db.pool import Database
from rethaw.log.lineage import Reach, path_in
from rethaw.model.types import SnapshotInfo

# `r`: the path, one row a line with the last seq of it that is visible. What the world did is on every path.
_COUNT = """
WITH r AS (SELECT * FROM unnest(%s::int[], %s::bigint[]) AS r(line, upto))
SELECT e.type, count(*),
       coalesce(sum(CASE WHEN e.type = 'exchange.completed' THEN (s.usage::jsonb->>'input_tokens')::bigint END), 0)::bigint,
       coalesce(sum(CASE WHEN e.type = 'exchange.completed' THEN (s.usage::jsonb->>'output_tokens')::bigint END), 0)::bigint,
       count(*) FILTER (WHERE e.type = 'exchange.completed' AND (x.meta::jsonb->>'model_call')::boolean)
FROM events e
LEFT JOIN exchange_state s ON e.type = 'exchange.completed' AND s.id = e.data->>'exchange'
LEFT JOIN exchanges x ON x.id = s.id
WHERE e.session = %s AND e.seq > %s AND e.seq <= %s
  AND (rethaw_stays(e.type) OR EXISTS (SELECT 1 FROM r WHERE r.line = e.line AND e.seq <= r.upto))
GROUP BY e.type ORDER BY e.type
"""


def _reach(path: list[Reach], upto: int) -> dict[int, int]:
    """Line to the last seq of it that a snapshot at `upto` of this path has in its past."""
    return {reach.line: min(reach.upto, upto) for reach in path}


def shared(one: dict[int, int], two: dict[int, int]) -> tuple[int, int]:
    """(line, seq) of the last event that both pasts have."""
    return max(((line, min(upto, two[line])) for line, upto in one.items() if line in two), key=lambda found: found[1])


async def compare_logs(
    db: Database, before: SnapshotInfo, after: SnapshotInfo
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """The common point {session, line, seq} (None when there is none), and by side what is beyond it."""
    pasts: dict[str, dict[int, int]] = {}
    async with db.connection() as conn:
        for name, info in (("before", before), ("after", after)):
            pasts[name] = _reach(await path_in(conn, info.session, info.line), info.seq)
    common: dict[str, Any] | None = None
    start = 0
    if before.session == after.session:
        line, start = shared(pasts["before"], pasts["after"])
        common = {"session": before.session, "line": line, "seq": start}
    sides: dict[str, dict[str, Any]] = {}
    for name, info in (("before", before), ("after", after)):
        past = pasts[name]
        rows = await db.fetch(_COUNT, (list(past), list(past.values()), info.session, start, info.seq))
        sides[name] = {
            "session": info.session,
            "line": info.line,
            "after": start,
            "upto": info.seq,
            "events": {str(row[0]): int(row[1]) for row in rows},
            "model_calls": sum(int(row[4]) for row in rows),
            "input_tokens": sum(int(row[2]) for row in rows),
            "output_tokens": sum(int(row[3]) for row in rows),
        }
    return common, sides
