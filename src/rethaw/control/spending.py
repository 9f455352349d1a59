"""What a session's model calls have used so far, from its log.

At each call of a session with a budget that is asked. Exchanges that can change no more are added up in a row now and then,
and only what came after them is counted again: a session of 10,000 calls is asked about as fast as one of ten."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from psycopg.types.json import Jsonb

from rethaw.control import rows
from rethaw.control.rows import Conn, Row

FOLD = 64  # calls that are counted anew before they are added to the sums

# An epoch more than one: sent again after its node was lost, unless it came to nothing then. One statement, so that sums and
# the rest are of one moment.
_USED = """
WITH t AS MATERIALIZED (SELECT upto, pending, sums FROM spent_totals WHERE session = %(session)s),
x AS MATERIALIZED (
    SELECT id, seq, meta, true AS new FROM exchanges
    WHERE session = %(session)s AND attempt = ANY(%(attempts)s) AND seq > coalesce((SELECT upto FROM t), 0)
    UNION ALL
    SELECT id, seq, meta, false FROM exchanges WHERE id = ANY(coalesce((SELECT pending FROM t), '{}'))
)
SELECT asked, answered, calls, input, cached, output, uncounted, true AS settled, 0 AS new, 0 AS upto, NULL AS ids
FROM t, jsonb_to_recordset(t.sums) AS r(
    asked text, answered text, calls bigint, input bigint, cached bigint, output bigint, uncounted bigint)
UNION ALL
SELECT asked, answered, sum(n)::bigint, sum(input)::bigint, sum(cached)::bigint, sum(output)::bigint,
       sum(uncounted)::bigint, settled, count(*) FILTER (WHERE new), max(seq), array_agg(id) FILTER (WHERE NOT settled)
FROM (
    SELECT x.id, x.seq, x.new, x.meta::json->>'model' AS asked, s.usage::json->>'model' AS answered,
           CASE WHEN s.state = 'torn' THEN s.epoch - 1 ELSE s.epoch END AS n,
           coalesce((s.usage::json->>'input_tokens')::bigint, 0) AS input,
           coalesce((s.usage::json->>'cached_tokens')::bigint, 0) AS cached,
           coalesce((s.usage::json->>'output_tokens')::bigint, 0) AS output,
           CASE WHEN s.state = 'complete' AND s.usage::json->>'output_tokens' IS NULL
                     AND (SELECT h.head::json->>'status' FROM response_heads h
                          WHERE h.exchange = x.id AND h.epoch = s.epoch) LIKE '2%%' THEN 1 ELSE 0 END AS uncounted,
           s.state <> 'open' AND s.owner IS NULL AS settled
    FROM x JOIN exchange_state s USING (id) WHERE (x.meta::json->>'model_call')::boolean) calls
GROUP BY asked, answered, settled"""


@dataclass(frozen=True)
class Used:
    """Of the calls that asked for one model and were answered by one."""

    asked: str | None
    answered: str | None
    calls: int
    input: int
    cached: int
    output: int
    uncounted: int

    def plus(self, other: Used) -> Used:
        added = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return Used(self.asked, self.answered, **added)


_NAMES = tuple(field.name for field in fields(Used))
_COUNTS = _NAMES[2:]


async def used(conn: Conn, row: Row, *, fold: bool = False) -> list[Used]:
    """By now, on every line and in every attempt. `fold`: the row is locked, so what is settled may be added up."""
    attempts = list(range(1, max(row.attempt, row.high_attempt) + 1))
    async with conn.cursor(row_factory=rows.dict_row) as cursor:
        await cursor.execute(_USED, {"session": row.id, "attempts": attempts})
        found = await cursor.fetchall()
    if fold and sum(one["new"] for one in found) >= FOLD:
        await _fold(conn, row.id, found)
    return _added(found)


async def add_up(conn: Conn, session: str) -> None:
    """Keep the sums of what is settled by now. Raises NotFound."""
    await used(conn, await rows.load(conn, session, lock=True), fold=True)


async def _fold(conn: Conn, session: str, found: list[dict[str, Any]]) -> None:
    """Seqs are given out under the row's lock: no exchange that is not seen yet can have a smaller one."""
    sums = [{name: getattr(one, name) for name in _NAMES} for one in _added(one for one in found if one["settled"])]
    pending = [ident for one in found for ident in one["ids"] or ()]
    await conn.execute(
        """INSERT INTO spent_totals (session, upto, pending, sums) VALUES (%s, %s, %s, %s)
           ON CONFLICT (session) DO UPDATE SET upto = excluded.upto, pending = excluded.pending, sums = excluded.sums""",
        (session, max(one["upto"] for one in found), pending, Jsonb(sums, dumps=json.dumps)),
    )


def _added(found: Iterable[dict[str, Any]]) -> list[Used]:
    """One for each pair of models."""
    out: dict[tuple[str | None, str | None], Used] = {}
    for one in found:
        made = Used(one["asked"], one["answered"], **{name: int(one[name]) for name in _COUNTS})
        pair = (made.asked, made.answered)
        out[pair] = out[pair].plus(made) if pair in out else made
    return list(out.values())
