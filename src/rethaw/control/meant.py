"""What somebody probably meant who named a thing that is not there. Only errors come by here."""

from __future__ import annotations

from psycopg import sql

from rethaw.control import rows
from rethaw.control.rows import Conn
from rethaw.model.nearest import did_you_mean, nearest_id

_NEWEST = 5000  # ids that are looked at


async def name(conn: Conn, table: str, wanted: str, otherwise: str, *, column: str = "name") -> str:
    """The remedy of an error about a name that `table` does not have."""
    query = sql.SQL("SELECT DISTINCT {} AS name FROM {} LIMIT %s")
    found = await rows.many(conn, query.format(sql.Identifier(column), sql.Identifier(table)), (_NEWEST,))
    return did_you_mean(wanted, [r["name"] for r in found], otherwise)


async def ident(conn: Conn, table: str, wanted: str, prefix: str, otherwise: str) -> str:
    """The same of an id, or a beginning of one. A session may also be meant by its key or by its agent's name."""
    if not wanted or "\0" in wanted:
        return otherwise
    if table == "sessions":
        found = await rows.one(
            conn,
            """SELECT id, key IS NOT DISTINCT FROM %s AS by_key FROM sessions WHERE key = %s OR agent_name = %s
               ORDER BY by_key DESC, id DESC LIMIT 1""",
            (wanted, wanted, wanted),
        )
        if found is not None:
            what = "which has that key" if found["by_key"] else "the newest of that agent"
            return f"did you mean {found['id']}, {what}?"
    query = sql.SQL("SELECT id FROM {} ORDER BY id DESC LIMIT %s").format(sql.Identifier(table))
    known = [r["id"] for r in await rows.many(conn, query, (_NEWEST,))]
    meant = nearest_id(wanted if wanted.startswith(prefix) else prefix + wanted, known)
    if meant is None:
        return otherwise
    return f"did you mean {meant[: max(len(wanted), len(prefix) + 8)]}?"
