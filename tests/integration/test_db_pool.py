"""The pool's patience, notifications, and migrations on every PostgreSQL we support."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psycopg
import pytest
from db_fixtures import *  # noqa: F403
from db_fixtures import Cluster, eventually, new_session

from rethaw.db import migrate as migrations
from rethaw.db.migrate import Migration, migrate
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.log.store import Log
from rethaw.model.enums import EventType
from rethaw.model.errors import Conflict, InvalidInput, RethawError, Unavailable
from rethaw.model.types import NewEvent


async def test_a_killed_postgres_is_waited_for(own_cluster: Cluster) -> None:
    async with Database(own_cluster.pg.dsn) as db:
        await asyncio.gather(*(db.fetch("SELECT pg_sleep(0.05)") for _ in range(5)))  # five idle connections
        pid = own_cluster.kill()
        done = await asyncio.gather(*(db.fetch("SELECT 1") for _ in range(5)))
        assert all(rows[0][0] == 1 for rows in done)
        async with asyncio.timeout(30):  # backends outlive their postmaster for a moment and may have answered
            while own_cluster.pg.pid == pid:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await db.fetch("SELECT 1")


async def test_what_never_answers_is_unavailable_after_the_deadline() -> None:
    db = Database("host=/nonexistent dbname=x", deadline_s=0.5)
    start = time.monotonic()
    with pytest.raises(Unavailable, match="check that PostgreSQL runs"):
        await db.open()
    assert 0.2 < time.monotonic() - start < 5


async def test_serialization_failures_are_tried_again(db: Database) -> None:
    async with db.tx() as conn:
        await conn.execute("CREATE TABLE n (v int)")
        await conn.execute("INSERT INTO n VALUES (0)")

    async def add() -> None:
        async def once(conn: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
            await conn.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            rows = await (await conn.execute("SELECT v FROM n")).fetchall()
            await conn.execute("UPDATE n SET v = %s", (int(str(rows[0][0])) + 1,))

        await db.run(once)

    await asyncio.gather(*(add() for _ in range(6)))
    assert (await db.fetch("SELECT v FROM n"))[0][0] == 6


async def test_other_errors_are_not_tried_again(db: Database) -> None:
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        async with db.connection() as conn:
            await conn.execute("SELECT * FROM no_such_table")

    with pytest.raises(psycopg.errors.UndefinedTable):
        await db.retrying(fail)
    assert tries == 1
    with pytest.raises(InvalidInput):
        await db.fetch("SELECT %s", ("nul\0",))


async def test_a_transaction_rolls_back_and_its_connection_is_used_again(wheel_cluster: Cluster, db: Database) -> None:
    one = Database(db.dsn, size=1)
    async with one:
        with pytest.raises(ZeroDivisionError):
            async with one.tx() as conn:
                await conn.execute("CREATE TABLE gone (n int)")
                backend = conn.info.backend_pid
                1 / 0  # noqa: B018
        assert (await one.fetch("SELECT pg_backend_pid(), to_regclass('gone')"))[0] == (backend, None)
        task = asyncio.create_task(one.fetch("SELECT pg_sleep(60)"))
        await asyncio.sleep(0)

        async def sleeping() -> bool:
            rows = await db.fetch("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%%pg_sleep(60)%%'"
                                  " AND pid <> pg_backend_pid() AND state = 'active'")  # fmt: skip
            return bool(rows)

        await eventually(sleeping)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await one.fetch("SELECT 1"))[0][0] == 1


# ---------------------------------------------------------------- notifications


async def test_hub_wakes_who_waits_for_this_key(db: Database, hub: NotifyHub) -> None:
    hub.poll_s = 60
    with hub.subscribe("c", "k") as mine, hub.subscribe("c", "other") as other:
        await asyncio.wait_for(hub.listening.wait(), 10)
        assert await mine.wait(0.5) in (True, False)  # the wake-up of a new LISTEN
        await other.wait(0)
        async with db.connection() as conn:
            await conn.execute("SELECT pg_notify('c', 'k')")
        assert await mine.wait(10)
        assert not await other.wait(0.1)
    waiting = asyncio.create_task(hub.wait("c", "k", 10))
    await asyncio.sleep(0)
    hub.publish("c", "k")
    assert await asyncio.wait_for(waiting, 5)


async def test_hub_publishes_to_other_processes(db: Database, hub: NotifyHub) -> None:
    async with NotifyHub(db, poll_s=60) as other:
        with other.subscribe("c", "k") as theirs:
            await asyncio.wait_for(other.listening.wait(), 10)
            await theirs.wait(0.5)
            hub.publish("c", "k")
            assert await theirs.wait(10)


async def test_what_the_hub_sent_itself_does_not_wake_its_waiters_twice_and_what_sql_says_does(
    db: Database, hub: NotifyHub
) -> None:
    hub.poll_s = 60
    async with NotifyHub(db, poll_s=60) as other:
        with other.subscribe("c", "k") as theirs, hub.subscribe("c", "k") as mine:
            for one in (hub, other):
                await asyncio.wait_for(one.listening.wait(), 10)
            await theirs.wait(0.5)
            await mine.wait(0)
            hub.publish("c", "k")
            assert await mine.wait(0)
            assert await theirs.wait(10)
            assert not await mine.wait(0.2)
            for _ in range(3):  # each connection of the pool, also one that the hub might have used
                async with db.connection() as conn:
                    await conn.execute("SELECT pg_notify('c', 'k')")
                assert await mine.wait(10) and await theirs.wait(10)
            # Its own connection is lost: what is published next may be, later ones are not.
            pid = hub._own  # pyright: ignore[reportPrivateUsage]
            await db.fetch("SELECT pg_terminate_backend(%s)", (pid,))
            heard = False
            for _ in range(50):
                hub.publish("c", "k")
                if heard := await theirs.wait(0.2):
                    break
            assert heard and hub._own != pid  # pyright: ignore[reportPrivateUsage]


async def test_hub_polls_without_listening(db: Database) -> None:
    hub = NotifyHub(db, poll_s=0.05)  # not started
    start = time.monotonic()
    assert not await hub.wait("c", "k", 30)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------- migrations


@pytest.fixture(params=["wheel_cluster", "system_cluster"])
def each_cluster(request: pytest.FixtureRequest) -> Cluster:
    return request.getfixturevalue(request.param)


async def test_up_from_empty_on_each_version(each_cluster: Cluster, new_database: Callable[..., str]) -> None:
    async with Database(new_database(each_cluster, None)) as db:
        names = [m.name for m in migrations.packaged()]
        assert names[0] == "0001_log"
        done = await asyncio.gather(*(migrate(db) for _ in range(3)))  # at the same time: once
        assert sorted(done) == [[], [], names]
        fence = await new_session(db)
        await Log(db).append(fence, [NewEvent(type=EventType.EMITTED, body=b"\0")])
        assert (await Log(db).verify(fence.session)).ok


async def test_a_newer_database_is_refused_by_name(db: Database) -> None:
    known = migrations.packaged()
    future = Migration(len(known) + 1, f"{len(known) + 1:04}_future", "CREATE TABLE future ()")
    assert await migrate(db, [*known, future]) == [future.name]
    with pytest.raises(Conflict, match="_future"):
        await migrate(db)


async def test_a_changed_migration_is_refused_by_name(db: Database) -> None:
    known = migrations.packaged()
    changed = Migration(1, known[0].name, known[0].sql + "\n")
    with pytest.raises(Conflict, match="0001_log"):
        await migrate(db, [changed, *known[1:]])


async def test_a_failing_migration_leaves_nothing(wheel_cluster: Cluster, new_database: Callable[..., str]) -> None:
    async with Database(new_database(wheel_cluster, None)) as db:
        bad = Migration(2, "0002_bad", "CREATE TABLE half (); SELECT 1/0")
        with pytest.raises(psycopg.errors.DivisionByZero):
            await migrate(db, [Migration(1, "0001_ok", "CREATE TABLE ok ()"), bad])
        assert (await db.fetch("SELECT to_regclass('ok'), to_regclass('half')"))[0] == (None, None)


def test_numbers_must_not_repeat(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "migrations"
    folder.mkdir()
    for name in ("0001_a.sql", "0001_b.sql"):
        (folder / name).touch()
    monkeypatch.setattr(migrations.resources, "files", lambda _: folder.parent)
    with pytest.raises(RethawError, match="0001_b"):
        migrations.packaged()
