"""A database from before forks: what its rows say of their places is taken from the log."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from db_fixtures import *  # noqa: F403

from rethaw.control.inbox import read
from rethaw.db.migrate import migrate, packaged
from rethaw.db.pool import Database


@pytest.fixture(name="old")
async def old_fixture(new_database: object, system_cluster: object) -> AsyncIterator[Database]:
    """A database as migration 2 made it."""
    async with Database(new_database(system_cluster, None)) as db:  # type: ignore[operator]
        await migrate(db, packaged()[:2])
        yield db


async def test_places_are_taken_from_the_log(old: Database) -> None:
    async with old.tx() as conn:
        for statement in (
            "INSERT INTO sessions (id, last_seq, attempt) VALUES ('s_1', 4, 1)",
            "INSERT INTO session_specs VALUES ('s_1', '{}', '{}')",
            "INSERT INTO lines (session, line, branch_seq, why) VALUES ('s_1', 1, 0, 'start')",
            """INSERT INTO events (session, seq, line, attempt, type, data) VALUES
                   ('s_1', 1, 1, 1, 'session.created', '{}'),
                   ('s_1', 2, 1, 1, 'message.received', '{"message": "m_1", "number": 1}'),
                   ('s_1', 3, 1, 1, 'signal.received', '{"signal": "sig_1", "name": "go"}'),
                   ('s_1', 4, 1, 1, 'message.sent', '{"message": "m_2"}')""",
            "INSERT INTO inbox (session, number, id, payload) VALUES ('s_1', 1, 'm_1', '1')",
            "INSERT INTO signals (session, id, name, payload) VALUES ('s_1', 'sig_1', 'go', '1')",
            "INSERT INTO signal_uses (signal, attempt, wait, line, seq) VALUES ('sig_1', 1, '1.1', 1, 4)",
            "INSERT INTO outbox (session, number, id, payload, line, seq) VALUES ('s_1', 1, 'm_2', '2', 1, 4)",
        ):
            await conn.execute(statement)
    assert (await migrate(old))[0] == "0003_forks"
    assert await old.fetch("SELECT seq FROM inbox") == [(2,)]
    assert await old.fetch("SELECT seq FROM signals") == [(3,)]
    assert await old.fetch("SELECT session, seq FROM signal_uses") == [("s_1", 4)]
    assert await old.fetch("SELECT session, message, number, line, seq FROM outbox_places") == [("s_1", "m_2", 1, 1, 4)]
    async with old.connection() as conn:
        assert [m.id for m in await read(conn, "s_1", 0, 10)] == ["m_1"]
    assert await old.fetch("SELECT session, line, upto > 100 FROM rethaw_path('s_1', 1)") == [("s_1", 1, True)]
