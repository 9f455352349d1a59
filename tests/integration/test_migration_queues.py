"""A database from before queues: who has a slot is taken from the sessions' states."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from db_fixtures import *  # noqa: F403

from rethaw.db.migrate import migrate, packaged
from rethaw.db.pool import Database

STATES = ("queued", "running", "suspended", "recovering", "completed", "cancelled")


@pytest.fixture(name="old")
async def old_fixture(new_database: object, system_cluster: object) -> AsyncIterator[Database]:
    """A database as migration 6 made it."""
    async with Database(new_database(system_cluster, None)) as db:  # type: ignore[operator]
        await migrate(db, [m for m in packaged() if m.version < 7])
        yield db


async def test_unfinished_sessions_have_slots(old: Database) -> None:
    async with old.tx() as conn:
        for state in (*STATES, "template"):
            stored = "suspended" if state == "template" else state
            await conn.execute("INSERT INTO sessions (id, state) VALUES (%s, %s)", (state, stored))
            await conn.execute("INSERT INTO session_specs (session, agent, args) VALUES (%s, '{}', '{}')", (state,))
        await conn.execute("INSERT INTO templates (name, session) VALUES ('t', 'template')")
    assert (await migrate(old))[0] == "0007_queues"
    found = await old.fetch("SELECT session, queue, slot FROM session_specs")
    assert {session: slot for session, _, slot in found} == {
        "queued": "waiting", "running": "held", "suspended": "held", "recovering": "held", "template": "held",
        "completed": "free", "cancelled": "free",
    }  # fmt: skip
    assert [session for session, queue, _ in found if queue == ""] == ["template"]
