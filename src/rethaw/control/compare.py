"""What the log has between two snapshots: how far they share a path, and what each side has beyond it."""

from __future__ import annotations

from typing import Any

from rethaw.db.pool import Database
from rethaw.model.errors import NotFound
from rethaw.model.types import SnapshotInfo

Past = dict[tuple[str, int], int]  # (session, line) to the last seq of it that is in the past of a snapshot

# `r`: the past. Of two on one path, what the world did in between counts whatever line it was logged on; of two that
# parted, only what is on the side's own lines is the side's.
_COUNT = """
WITH r AS MATERIALIZED (SELECT * FROM unnest(%s::text[], %s::int[], %s::bigint[]) AS r(session, line, upto)),
     s AS MATERIALIZED (SELECT session, max(upto) AS upto FROM r GROUP BY session)
SELECT e.type, count(*),
       coalesce(sum((x.usage::jsonb->>'input_tokens')::bigint), 0)::bigint,
       coalesce(sum((x.usage::jsonb->>'output_tokens')::bigint), 0)::bigint,
       count(*) FILTER (WHERE (x.meta::jsonb->>'model_call')::boolean)
FROM s JOIN events e ON e.session = s.session AND e.seq > %s AND e.seq <= s.upto
LEFT JOIN exchange_rows x ON e.type = 'exchange.completed' AND x.id = e.data->>'exchange'
WHERE (%s AND rethaw_stays(e.type))
   OR EXISTS (SELECT 1 FROM r WHERE r.session = e.session AND r.line = e.line AND e.seq <= r.upto)
GROUP BY e.type ORDER BY e.type
"""


def shared(one: Past, two: Past) -> tuple[str, int, int] | None:
    """(session, line, seq) of the last event that both pasts have, None when there is none."""
    both = [(min(upto, two[key]), key) for key, upto in one.items() if key in two]
    if not both:
        return None
    seq, (session, line) = max(both)
    return session, line, seq


async def _past(db: Database, info: SnapshotInfo) -> Past:
    found = await db.fetch("SELECT session, line, upto FROM rethaw_path(%s, %s)", (info.session, info.line))
    if not found:
        raise NotFound(f"the log of session {info.session} is gone", remedy="`rethaw ls` shows the sessions there are")
    return {(str(row[0]), int(row[1])): min(int(row[2]), info.seq) for row in found}


async def compare_logs(
    db: Database, before: SnapshotInfo, after: SnapshotInfo
) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """The common point {session, line, seq} (None when there is none), and by side what is beyond it."""
    pasts = {"before": await _past(db, before), "after": await _past(db, after)}
    point = shared(pasts["before"], pasts["after"])
    start = 0 if point is None else point[2]
    parted = point is not None and before.seq > start and after.seq > start
    sides: dict[str, dict[str, Any]] = {}
    for name, info in (("before", before), ("after", after)):
        past = pasts[name]
        sessions, lines = [key[0] for key in past], [key[1] for key in past]
        rows = await db.fetch(_COUNT, (sessions, lines, list(past.values()), start, not parted))
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
    if point is None:
        return None, sides
    return {"session": point[0], "line": point[1], "seq": point[2]}, sides
