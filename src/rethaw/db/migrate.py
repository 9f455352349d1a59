"""Numbered SQL migrations, applied in order under an advisory lock and recorded with their checksums."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from rethaw.db.pool import Connection, Database
from rethaw.model.errors import Conflict, RethawError, Unavailable

log = logging.getLogger("rethaw.db")

_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_LOCK = 0x7265746861770001  # "rethaw" and a number: no other program's advisory lock
OLDEST_SERVER = 150000


@dataclass(frozen=True)
class Migration:
    version: int
    name: str  # "0001_log"
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def packaged() -> list[Migration]:
    """The migrations that this version of Rethaw brings, in order. Raises RethawError when numbers repeat or miss."""
    found: list[Migration] = []
    for entry in resources.files("rethaw.db").joinpath("migrations").iterdir():
        match = _NAME.fullmatch(entry.name)
        if match is not None:
            found.append(Migration(int(match[1]), entry.name.removesuffix(".sql"), entry.read_text("utf-8")))
    found.sort(key=lambda m: m.version)
    if [m.version for m in found] != list(range(1, len(found) + 1)):
        raise RethawError(f"migrations are not numbered 1, 2, 3 ...: {[m.name for m in found]}")
    return found


async def migrate(db: Database, migrations: Sequence[Migration] | None = None) -> list[str]:
    """Bring the database up to this version, in one transaction. Returns the names of what was applied.

    Raises Conflict when the database was made by a newer or another Rethaw, Unavailable when the server is too old.
    """
    wanted = packaged() if migrations is None else list(migrations)

    async def apply(conn: Connection) -> list[str]:
        if conn.info.server_version < OLDEST_SERVER:
            raise Unavailable(
                f"PostgreSQL {conn.info.server_version // 10000} is too old", remedy="use PostgreSQL 15 or newer"
            )
        await conn.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        await conn.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (version int PRIMARY KEY, name text NOT NULL,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        rows = await (
            await conn.execute("SELECT version, name, checksum FROM schema_migrations ORDER BY version")
        ).fetchall()
        known = {m.version: m for m in wanted}
        for version, name, checksum in rows:
            ours = known.get(version)
            if ours is None:
                raise Conflict(
                    f"the database has migration {name}, this Rethaw ends at {wanted[-1].name if wanted else 'none'}",
                    remedy="start the newer Rethaw that made it",
                )
            if ours.checksum != checksum:
                raise Conflict(
                    f"the database's migration {name} is not the one of this Rethaw ({ours.name})",
                    remedy="start the Rethaw that made it, or use a new database",
                )
        done = {row[0] for row in rows}
        names: list[str] = []
        for migration in wanted:
            if migration.version in done:
                continue
            await conn.execute(migration.sql.encode())
            await conn.execute(
                "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
                (migration.version, migration.name, migration.checksum),
            )
            names.append(migration.name)
            log.info("applied migration %s", migration.name)
        return names

    return await db.run(apply)
