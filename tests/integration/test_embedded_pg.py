"""The embedded PostgreSQL's supervisor: private, durable, never two, never an orphan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from db_fixtures import SYSTEM_BIN, eventually

from rethaw.db import binaries, cluster, embedded
from rethaw.db.embedded import EmbeddedPostgres
from rethaw.db.pool import Connection, Database
from rethaw.model.errors import Conflict, InvalidInput, Unavailable

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")

PARENT = """
import asyncio, sys
from pathlib import Path
from rethaw.db.embedded import EmbeddedPostgres

async def main():
    pg = EmbeddedPostgres(Path(sys.argv[1]) / "pg", run_dir=Path(sys.argv[1]) / "run")
    print(await pg.start(), flush=True)
    print(pg.pid, flush=True)
    await pg.supervise()

asyncio.run(main())
"""


def make(home: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(home / "pg", run_dir=home / "run")


async def count(dsn: str, add: bool = False) -> int:
    async with Database(dsn) as db:
        if add:

            async def once(conn: Connection) -> None:
                await conn.execute("CREATE TABLE IF NOT EXISTS t (n int)")
                await conn.execute("INSERT INTO t VALUES (1)")

            await db.run(once)
        return int((await db.fetch("SELECT count(*) FROM t"))[0][0])


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout


def popen(*words: str, **kw: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **kw)


def parent(home: Path, **env: str) -> subprocess.Popen[str]:
    return popen(sys.executable, "-c", PARENT, str(home), env={**os.environ, **env})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def nobody_left(directory: Path, seconds: float = 10.0) -> None:
    async def gone() -> bool:
        return not cluster.processes_in(directory)

    await eventually(gone, seconds)


async def ended(family: list[int], seconds: float = 10.0) -> None:
    """A process that ends has no directory any more before it is one no more."""

    async def gone() -> bool:
        return not [pid for pid in family if alive(pid)]

    await eventually(gone, seconds)


@pytest.fixture
async def pg(tmp_path: Path) -> AsyncIterator[EmbeddedPostgres]:
    pg = make(tmp_path)
    yield pg
    await pg.stop()
    assert not cluster.processes_in(pg.data_dir)


async def test_start_stop_and_start_again(pg: EmbeddedPostgres) -> None:
    for n in (1, 2, 3):
        dsn = await pg.start()
        pid = pg.pid
        assert pid is not None and pid in cluster.processes_in(pg.data_dir)
        assert await count(dsn, add=True) == n
        await pg.stop()
        assert pg.pid is None and not cluster.processes_in(pg.data_dir) and not alive(pid)


async def test_it_is_private_and_durable(pg: EmbeddedPostgres) -> None:
    dsn = await pg.start()
    pid = pg.pid
    owner = Path(f"/proc/{pid}").stat().st_uid
    assert owner != 0
    assert stat.S_IMODE(pg.data_dir.stat().st_mode) == 0o700 and pg.data_dir.stat().st_uid == owner
    where = Path(psycopg.conninfo.conninfo_to_dict(dsn)["host"])  # type: ignore[arg-type]
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    inodes = {line.split()[9] for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]}
    mine = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert not {f"socket:[{inode}]" for inode in inodes} & mine  # no TCP
    async with Database(dsn) as db:
        for setting, value in (("fsync", "on"), ("synchronous_commit", "on"), ("full_page_writes", "on"),
                               ("data_checksums", "on"), ("server_encoding", "UTF8")):  # fmt: skip
            assert (await db.fetch(f"SHOW {setting}"))[0][0] == value
        assert (await db.fetch("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"))[0][0] is False


@needs_root
async def test_nobody_else_may_connect(pg: EmbeddedPostgres) -> None:
    dsn = await pg.start()
    host = str(psycopg.conninfo.conninfo_to_dict(dsn)["host"])
    code = f"""if True:
        import os, sys, ctypes
        sys.path[:] = {sys.path!r}
        import psycopg
        uid = int(sys.argv[1])
        fd = os.open({host!r}, os.O_PATH)  # as if the directory could be reached
        os.setgroups([]); os.setgid(uid); os.setuid(uid)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, so that /proc/self/fd works
        for where in ({host!r}, "/proc/self/fd/%d" % fd):
            for user in ("rethaw", "postgres"):
                try:
                    psycopg.connect(host=where, port=5432, user=user, dbname="postgres")
                    print("connected")
                except psycopg.OperationalError as e:
                    print("refused", e)
    """
    for name in ("postgres", "nobody", "daemon"):
        uid = pwd.getpwnam(name).pw_uid
        out = await asyncio.to_thread(run, sys.executable, "-c", code, str(uid))
        assert out.count("refused") == 4 and "connected" not in out, (name, out)
        # PostgreSQL's own user gets as far as the server, which does not know it; others do not even get there
        assert ("Peer authentication failed" in out) == (uid == pg.data_dir.stat().st_uid), (name, out)


async def test_no_orphan_when_the_parent_is_killed(tmp_path: Path, pg: EmbeddedPostgres) -> None:
    process = parent(tmp_path)
    assert process.stdout is not None
    dsn = (await asyncio.to_thread(process.stdout.readline)).strip()
    pid = int(await asyncio.to_thread(process.stdout.readline))
    assert await count(dsn, add=True) == 1
    family = cluster.processes_in(tmp_path / "pg")
    assert pid in family and len(family) > 3
    process.kill()
    process.wait()
    await nobody_left(tmp_path / "pg")
    await ended(family)
    assert await count(await pg.start(), add=True) == 2


async def test_starting_at_once_after_the_parent_was_killed(tmp_path: Path, pg: EmbeddedPostgres) -> None:
    """The former life is still shutting down; its lock and its postmaster are waited for."""
    process = parent(tmp_path)
    assert process.stdout is not None
    dsn = (await asyncio.to_thread(process.stdout.readline)).strip()
    assert await count(dsn, add=True) == 1
    process.kill()
    assert await count(await pg.start(), add=True) == 2
    process.wait()


@pytest.mark.parametrize("survivor", ["postmaster", "children"])
async def test_an_orphan_that_does_not_go_is_ended(
    tmp_path: Path, pg: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, survivor: str
) -> None:
    """A postmaster without a supervisor (as if the kernel had not told it), or its children stopped in their tracks."""
    monkeypatch.setattr(embedded, "_ORPHAN_GRACE_S", 0.3)
    monkeypatch.setattr(embedded, "_ORPHAN_QUIT_S", 0.5)
    dsn = await pg.start()
    assert await count(dsn, add=True) == 1
    family = cluster.processes_in(pg.data_dir)
    other = make(tmp_path)
    os.close(pg._lock)  # type: ignore[arg-type]
    pg._lock = None
    if survivor == "children":
        children = [p for p in family if p != pg.pid]
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # the one that served `count` may have gone by now
                os.kill(child, signal.SIGSTOP)
        assert pg.pid is not None
        os.kill(pg.pid, signal.SIGKILL)
    assert await count(await other.start(), add=True) == 2
    assert not set(family) & set(cluster.processes_in(pg.data_dir))
    await other.stop()


@pytest.mark.parametrize("whose", ["ours", "nobody's", "garbage"])
async def test_a_stale_pid_file_is_no_obstacle(tmp_path: Path, pg: EmbeddedPostgres, whose: str) -> None:
    await pg.start()
    dsn = pg.dsn
    assert await count(dsn, add=True) == 1
    family = cluster.processes_in(pg.data_dir)
    text = (pg.data_dir / "postmaster.pid").read_text()
    lock = Path(psycopg.conninfo.conninfo_to_dict(dsn)["host"]) / ".s.PGSQL.5432.lock"  # type: ignore[arg-type]
    for pid in family:
        cluster.send(pid, pg.data_dir, signal.SIGKILL)
    await nobody_left(pg.data_dir)
    await pg.stop()
    owner = pg.data_dir.stat()
    stranger = popen("sleep", "600", user=owner.st_uid if ROOT else None, extra_groups=[] if ROOT else None)
    try:
        # a recycled pid: it lives, belongs to PostgreSQL's own user, and is no PostgreSQL
        pid = {"ours": str(stranger.pid), "nobody's": "4194303", "garbage": "x\0y"}[whose]
        (pg.data_dir / "postmaster.pid").write_text("\n".join([pid, *text.splitlines()[1:]]) + "\n")
        lock.parent.mkdir(parents=True, exist_ok=True)
        os.chown(lock.parent, owner.st_uid, owner.st_gid)
        lock.write_text(f"{pid}\n")
        assert await count(await pg.start(), add=True) == 2
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_it_is_started_again_when_it_dies(pg: EmbeddedPostgres) -> None:
    dsn = await pg.start()
    watcher = asyncio.create_task(pg.supervise())
    for n, number in enumerate((signal.SIGKILL, signal.SIGQUIT, signal.SIGKILL), 1):
        before = pg.pid
        assert before is not None
        os.kill(before, number)
        assert await count(dsn, add=True) == n  # by the pool's own patience

        async def another(before: int = before) -> bool:
            return pg.pid not in (None, before)

        await eventually(another)
    await pg.stop()
    await asyncio.wait_for(watcher, 10)


@pytest.mark.parametrize("moment", ["launched", "answers"])
async def test_killed_in_the_middle_of_a_start(
    pg: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It is started again, as it is when it dies later; but not for ever."""
    real, killed = pg._make_database, list[int]()

    async def kill() -> None:
        assert pg._process is not None
        killed.append(pg._process.pid)
        pg._process.kill()
        await pg._process.wait()

    async def make_database() -> None:
        if moment == "answers":
            await real()
        if len(killed) < times:
            await kill()
            raise psycopg.OperationalError("the connection is lost")
        await real()

    monkeypatch.setattr(pg, "_make_database", make_database)
    times = 2
    assert await count(await pg.start(), add=True) == 1
    assert len(killed) == 2 and pg.pid not in killed
    await pg.stop()
    killed.clear()
    times = 100
    with pytest.raises(Unavailable, match="ended with -9 at its start"):
        await pg.start()
    assert len(killed) == 3


@pytest.mark.parametrize("when", ["anywhere", "before_rename"])
async def test_killed_while_the_cluster_is_made(tmp_path: Path, pg: EmbeddedPostgres, when: str) -> None:
    if when == "before_rename":
        process = parent(tmp_path, RETHAW_FAULTS="pg.initdb.before_rename=kill")
        assert await asyncio.to_thread(process.wait, 60) == -signal.SIGKILL
    else:
        process = parent(tmp_path)

        async def half_way() -> bool:
            return any(tmp_path.glob("pg.new-*/base"))

        await eventually(half_way)
        process.kill()
        process.wait()
    assert not (tmp_path / "pg").exists() and list(tmp_path.glob("pg.new-*"))
    assert await count(await pg.start(), add=True) == 1
    assert not list(tmp_path.glob("pg.new-*"))


async def test_two_never_run_one_cluster(tmp_path: Path, pg: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_S", 0.2)
    dsn = await pg.start()
    with pytest.raises(Conflict, match=str(os.getpid())):
        await make(tmp_path).start()
    with pytest.raises(Conflict):
        await pg.start()
    assert await count(dsn, add=True) == 1


@pytest.mark.skipif(not SYSTEM_BIN.is_dir(), reason="PostgreSQL 15 is not installed")
async def test_a_cluster_keeps_its_major_version(
    tmp_path: Path, pg: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETHAW_PG_BIN", str(SYSTEM_BIN))
    assert await count(await pg.start(), add=True) == 1
    await pg.stop()
    monkeypatch.delenv("RETHAW_PG_BIN")
    assert await count(await pg.start(), add=True) == 2
    assert pg.binaries is not None and pg.binaries.major == 15
    await pg.stop()
    wheel = [c for c in binaries.candidates() if "embedded" in c[2]]
    monkeypatch.setattr(binaries, "candidates", lambda: wheel)
    with pytest.raises(Unavailable, match=r"made by PostgreSQL 15.*version 18.*RETHAW_PG_BIN"):
        await pg.start()
    other = make(tmp_path / "other")
    await other.start()
    assert other.binaries is not None and other.binaries.major >= 18
    await other.stop()


async def test_no_binaries(pg: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(binaries, "candidates", lambda: [(tmp_path, tmp_path, "nowhere")])
    with pytest.raises(Unavailable, match="DATABASE_URL"):
        await pg.start()


async def test_a_directory_that_is_no_cluster(pg: EmbeddedPostgres) -> None:
    pg.data_dir.mkdir()
    (pg.data_dir / "precious").touch()
    with pytest.raises(InvalidInput, match="not empty"):
        await pg.start()
    assert (pg.data_dir / "precious").exists()


async def test_a_long_path(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    home.mkdir(mode=0o755)
    pg = make(home)
    assert await count(await pg.start(), add=True) == 1
    where = Path(psycopg.conninfo.conninfo_to_dict(pg.dsn)["host"])  # type: ignore[arg-type]
    await pg.stop()
    assert not where.exists()


async def test_a_failed_start_says_why(pg: EmbeddedPostgres) -> None:
    await pg.start()
    await pg.stop()
    with (pg.data_dir / "postgresql.conf").open("a") as f:
        f.write("no_such_setting = 1\n")
    with pytest.raises(Unavailable, match="no_such_setting"):
        await pg.start()


@needs_root
async def test_unprivileged(tmp_path: Path) -> None:
    """As any user with a name it runs as that user."""
    user = pwd.getpwnam("nobody")
    home = Path("/tmp") / f"rethaw-unprivileged-{os.getpid()}"
    home.mkdir(mode=0o700)
    os.chown(home, user.pw_uid, user.pw_gid)
    try:
        process = popen(sys.executable, "-c", PARENT, str(home), cwd="/",
                        user=user.pw_uid, group=user.pw_gid, extra_groups=[])  # fmt: skip
        assert process.stdout is not None
        await asyncio.to_thread(process.stdout.readline)
        pid = int(await asyncio.to_thread(process.stdout.readline))
        assert Path(f"/proc/{pid}").stat().st_uid == user.pw_uid
        process.kill()
        process.wait()
        await nobody_left(home / "pg")
    finally:
        shutil.rmtree(home)


async def test_sockets_of_a_namespace_reach_us(pg: EmbeddedPostgres) -> None:
    """tmp_path is closed to others, so PostgreSQL saw it through a private mount; nothing of that shows outside."""
    await pg.start()
    assert "rethaw-pg" not in Path("/proc/self/mounts").read_text()
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(Path(psycopg.conninfo.conninfo_to_dict(pg.dsn)["host"]) / ".s.PGSQL.5432"))  # type: ignore[arg-type]
    start = time.monotonic()
    await pg.stop()
    assert time.monotonic() - start < 20
