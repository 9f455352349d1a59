"""An embedded PostgreSQL for a test run and an empty, migrated database for each test. By its own supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from rethaw.db.embedded import EmbeddedPostgres
from rethaw.db.migrate import migrate
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.log.store import Log
from rethaw.log.writer import create_session_in
from rethaw.model.ids import new_id
from rethaw.model.types import Fence

SYSTEM_BIN = Path("/usr/lib/postgresql/15/bin")


class Cluster:
    """An EmbeddedPostgres on an event loop of its own, in a thread that lives as long as it does."""

    def __init__(self, pg: EmbeddedPostgres) -> None:
        self.pg = pg
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(pg.start())
        self._supervisor = asyncio.run_coroutine_threadsafe(pg.supervise(), self._loop)

    def _run(self, coro: Awaitable[object]) -> None:
        asyncio.run_coroutine_threadsafe(coro, self._loop).result(120)  # type: ignore[arg-type]

    def kill(self) -> int:
        """SIGKILL the postmaster, once it runs. Returns its pid."""
        until = time.monotonic() + 30
        while True:
            pid = self.pg.pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return pid
            assert time.monotonic() < until, "PostgreSQL was not started again"
            time.sleep(0.01)

    def close(self) -> None:
        self._run(self.pg.stop())
        self._supervisor.result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


def _cluster(bin_dir: Path | None) -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="rethaw-db-"))
    before = os.environ.get("RETHAW_PG_BIN")
    if bin_dir is not None:
        os.environ["RETHAW_PG_BIN"] = str(bin_dir)
    cluster = Cluster(EmbeddedPostgres(home / "pg"))
    if before is None:
        os.environ.pop("RETHAW_PG_BIN", None)
    else:
        os.environ["RETHAW_PG_BIN"] = before
    try:
        asyncio.run(_template(cluster.pg))
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(home)


async def _template(pg: EmbeddedPostgres) -> None:
    with psycopg.connect(pg.admin_dsn, autocommit=True) as conn:
        conn.execute("CREATE DATABASE migrated OWNER rethaw")
    async with Database(psycopg.conninfo.make_conninfo(pg.dsn, dbname="migrated")) as db:
        await migrate(db)


@pytest.fixture(scope="session")
def wheel_cluster() -> Iterator[Cluster]:
    yield from _cluster(None)


@pytest.fixture(scope="session")
def system_cluster() -> Iterator[Cluster]:
    if not SYSTEM_BIN.is_dir():
        pytest.skip("PostgreSQL 15 is not installed")
    yield from _cluster(SYSTEM_BIN)


@pytest.fixture
def new_database() -> Iterator[Callable[[Cluster, str | None], str]]:
    """Makes databases, from the template named or empty, that are dropped after the test."""
    made: list[tuple[Cluster, str]] = []

    def make(cluster: Cluster, template: str | None = "migrated") -> str:
        name = f"t_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(cluster.pg.admin_dsn, autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name} OWNER rethaw TEMPLATE {template or 'template0'}".encode())
        made.append((cluster, name))
        return psycopg.conninfo.make_conninfo(cluster.pg.dsn, dbname=name)

    yield make
    for cluster, name in made:
        with psycopg.connect(cluster.pg.admin_dsn, autocommit=True) as conn:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
async def db(wheel_cluster: Cluster, new_database: Callable[..., str]) -> AsyncIterator[Database]:
    async with Database(new_database(wheel_cluster)) as db:
        yield db


@pytest.fixture
async def hub(db: Database) -> AsyncIterator[NotifyHub]:
    async with NotifyHub(db) as hub:
        yield hub


@pytest.fixture
def log(db: Database, hub: NotifyHub) -> Log:
    return Log(db, hub)


@pytest.fixture
async def fence(db: Database) -> Fence:
    return await new_session(db)


async def new_session(db: Database, generation: str = "g1") -> Fence:
    """A session in its first attempt."""
    session = new_id("s")
    async with db.tx() as conn:
        await create_session_in(conn, session)
        await conn.execute("UPDATE sessions SET generation = %s, attempt = 1 WHERE id = %s", (generation, session))
    return Fence(session=session, generation=generation)


async def eventually(look: Callable[[], Awaitable[bool]], seconds: float = 15.0) -> None:
    """Wait until `look` says so. Fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await look():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster that the test may kill."""
    yield from _cluster(None)
