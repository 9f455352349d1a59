"""The embedded PostgreSQL: made once, started, watched, stopped. No TCP; a Unix socket in a private directory.

```
DATA/pg           the cluster, 0700, owned by the user that runs PostgreSQL
DATA/pg.lock      held by the supervisor as long as it lives; only one may run a cluster
DATA/pg.new-XXXX  a cluster being made; renamed to DATA/pg when it is whole, removed at the next start when it is not
RUN/pg/           ours: hba.conf, ident.conf (who may connect: only the user that runs Rethaw), s/ with the socket
```
Run as root, PostgreSQL gets the user `postgres` or `nobody`. Where that user cannot reach a directory (a data directory
or a virtual environment under /root), launch.py shows it to PostgreSQL under /run/rethaw-pg in a private mount namespace.

The postmaster dies with the thread that started it (PR_SET_PDEATHSIG, SIGQUIT: immediate shutdown, crash recovery at
the next start), so start it from a thread that lives as long as the process: the event loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import make_conninfo

from rethaw.db import binaries, cluster, launch
from rethaw.db.binaries import Binaries
from rethaw.db.cluster import Account
from rethaw.model import faults
from rethaw.model.errors import Conflict, RethawError, Unavailable

log = logging.getLogger("rethaw.db")

NAME = "rethaw"  # of the database and its owner; the superuser is `postgres`
READY_S = 300.0  # crash recovery may have up to max_wal_size to replay
_LOCK_S = 15.0  # a former supervisor may still be ending
_ORPHAN_GRACE_S = 3.0  # an orphan was sent SIGQUIT by the kernel
_ORPHAN_QUIT_S = 7.0  # then by us; a postmaster kills its own children 5 s after that
_LOG_LIMIT = 16 << 20
_STARTS = 3  # in a row, when something kills PostgreSQL in the middle of one

# Small: a node's memory belongs to agents. WAL is written whole (fsync, full_page_writes) but compressed.
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "60",
    "superuser_reserved_connections": "3",
    "dynamic_shared_memory_type": "mmap",  # in its own directory: nothing is left in /dev/shm after a SIGKILL
    "shared_buffers": "64MB",
    "huge_pages": "off",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "wal_compression": "on",
    "max_wal_size": "512MB",
    "checkpoint_timeout": "5min",
    "jit": "off",
    "max_worker_processes": "2",
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "max_logical_replication_workers": "0",
    "autovacuum_max_workers": "1",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] ",
    "cluster_name": "rethaw",
}
_SETTINGS_18 = {"io_method": "sync"}  # no worker processes for reads that are few


class _Killed(Unavailable):
    """A signal ended PostgreSQL in the middle of its start."""


class EmbeddedPostgres:
    """A PostgreSQL of our own in `data_dir`. `run_dir`: for its socket (default: beside `data_dir`).

    `start` returns a libpq connection string. Raises Conflict when another process supervises this cluster, Unavailable
    when no fitting binaries are here or PostgreSQL does not come up (its last words are in the message).
    """

    def __init__(self, data_dir: Path, *, run_dir: Path | None = None, log_file: Path | None = None) -> None:
        self.data_dir = Path(os.path.realpath(data_dir))
        self.run_dir = Path(os.path.realpath(run_dir or self.data_dir.parent / "run"))
        self.log_file = log_file or self.run_dir / "postgres.log"
        self.binaries: Binaries | None = None
        self._account: Account | None = None
        self._process: Process | None = None
        self._lock: int | None = None
        self._log_start = 0  # of the newest process's own lines
        self._stopping = asyncio.Event()
        self._changing = asyncio.Lock()  # starting and stopping exclude each other
        self._parent = cluster.socket_parent(self.run_dir, self.data_dir)

    @property
    def pid(self) -> int | None:
        """The postmaster, None when it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def dsn(self) -> str:
        return self._dsn(NAME, NAME)

    @property
    def admin_dsn(self) -> str:
        """For the superuser `postgres`."""
        return self._dsn("postgres", "postgres")

    def _dsn(self, user: str, dbname: str) -> str:
        return make_conninfo(host=str(self._parent / "s"), port=5432, user=user, dbname=dbname)

    async def start(self) -> str:
        """Make the cluster if there is none, clear what a former life left, start, wait until it answers."""
        self._stopping.clear()
        await self._take_lock()
        try:
            async with self._changing:
                await self._start_unless_killed()
        except BaseException:
            await self._halt()
            self._drop_lock()
            raise
        return self.dsn

    async def supervise(self) -> None:
        """Start PostgreSQL again whenever it dies, until `stop` or cancellation: at once, or after a pause that grows to
        5 s while it does not start or dies within its first two seconds."""
        pause, started = 0.0, -1e9
        while not self._stopping.is_set():
            process = self._process
            if process is not None:
                code = await process.wait()
                if self._stopping.is_set() or process is not self._process:
                    continue
                log.warning("PostgreSQL (pid %d) ended with %s; starting it again", process.pid, code)
            pause = 0.0 if time.monotonic() - started > 2 else min(max(0.1, pause * 2), 5.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            try:
                async with self._changing:
                    if not self._stopping.is_set():
                        started = time.monotonic()
                        await self._start()
                        started = time.monotonic()
            except (RethawError, OSError) as e:
                if not self._stopping.is_set():
                    log.error("PostgreSQL does not start: %s", e)
                self._process = None if self.pid is None else self._process

    async def stop(self) -> None:
        """Fast shutdown (clients are disconnected, a checkpoint is written). Nothing of it is left running."""
        self._stopping.set()
        async with self._changing:
            await self._halt()
            shutil.rmtree(self._parent, ignore_errors=True)
            self._drop_lock()

    async def __aenter__(self) -> EmbeddedPostgres:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # ---- steps of a start

    async def _start_unless_killed(self) -> None:
        for left in reversed(range(_STARTS)):
            try:
                return await self._start()
            except _Killed as e:
                if not left:
                    raise
                log.warning("%s; starting it again", e.message)

    async def _start(self) -> None:
        await self._clear_orphans(self.data_dir)
        await self._drop_unfinished()
        who = self._account = cluster.account(self.data_dir)
        self.binaries = await asyncio.to_thread(binaries.choose, cluster.major_of(self.data_dir))
        self._prepare_run_dir(who)
        if cluster.major_of(self.data_dir) is None:
            await self._initdb(who, self.binaries)
        # Nobody lives in the cluster (seen above), so whatever pid these name is not PostgreSQL's: it would refuse to
        # start if that pid belongs to another process now.
        for stale in (self.data_dir / "postmaster.pid", self._parent / "s" / f"{cluster.SOCKET_FILE}.lock"):
            stale.unlink(missing_ok=True)
        faults.point("pg.start")
        places = {"@DATA@": self.data_dir, "@RUN@": self._parent}
        self._process = await self._launch(who, self.binaries, "postgres", self._arguments(), places, signal.SIGQUIT)
        await self._wait_ready(self._process)

    def _arguments(self) -> list[str]:
        settings = dict(_SETTINGS)
        if self.binaries is not None and self.binaries.major >= 18:
            settings |= _SETTINGS_18
        settings["unix_socket_directories"] = "@RUN@/s"
        settings["hba_file"], settings["ident_file"] = "@RUN@/hba.conf", "@RUN@/ident.conf"
        return ["-D", "@DATA@", *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))]

    def _prepare_run_dir(self, who: Account) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        cluster.private_dir(self._parent, 0o711 if who.switch else 0o700)
        cluster.private_dir(self._parent / "s", 0o700, who)
        # The socket's directory keeps everybody else out; `peer` also keeps out other programs of PostgreSQL's user.
        name = cluster.own_name()
        for file, text in (
            ("hba.conf", "local all all peer map=rethaw\n"),
            ("ident.conf", "".join(f'rethaw "{name}" {role}\n' for role in ("postgres", NAME))),
        ):
            (self._parent / file).write_text(text)
            (self._parent / file).chmod(0o644)

    async def _launch(
        self, who: Account, chosen: Binaries, program: str, words: list[str], places: dict[str, Path], on_death: int
    ) -> Process:
        """Run `program` as `who`, to be sent `on_death` when we die. The marks of `places` in `words` become paths that
        it can reach."""
        binds: list[tuple[str, str]] = []
        shown: dict[str, str] = {}
        for i, (mark, path) in enumerate((*places.items(), ("@ROOT@", chosen.root))):
            if who.switch and not cluster.reachable(path, who):
                target = str(cluster.MOUNT / f"d{i}")
                binds.append((str(path), target))
                shown[mark] = target
            else:
                shown[mark] = str(path)
        if binds:
            cluster.MOUNT.mkdir(mode=0o755, parents=True, exist_ok=True)
        for mark, path in shown.items():
            words = [word.replace(mark, path) for word in words]
        executable = str(Path(shown["@ROOT@"]) / chosen.bin.relative_to(chosen.root) / program)
        spec = {
            "uid": who.uid if who.switch else None,
            "gid": who.gid,
            "parent": os.getpid(),
            "signal": int(on_death),
            "binds": binds,
            "mount": str(cluster.MOUNT),
            "argv": [executable, *words],
        }
        self._rotate_log()
        out = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._log_start = os.fstat(out).st_size
        try:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", launch.__file__, json.dumps(spec),
                stdin=DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(out)

    async def _initdb(self, who: Account, chosen: Binaries) -> None:
        log.info("making a database with PostgreSQL %d (%s)", chosen.major, chosen.origin)
        parent = self.data_dir.parent
        if not parent.exists():
            parent.mkdir(parents=True)
            parent.chmod(0o711)
        new = Path(tempfile.mkdtemp(prefix=f"{self.data_dir.name}.new-", dir=parent))
        cluster.private_dir(new, 0o700, who)
        words = ["-D", "@NEW@", "-U", "postgres", "-A", "peer", "-E", "UTF8", "--locale=C", "-k", "--no-instructions"]
        process = await self._launch(who, chosen, "initdb", words, {"@NEW@": new}, signal.SIGKILL)
        try:
            code = await process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        if code != 0:
            raise Unavailable(f"initdb failed with {code}: {self._last_words()}", remedy=f"see {self.log_file}")
        faults.point("pg.initdb.before_rename")
        if self.data_dir.exists():
            self.data_dir.rmdir()
        new.rename(self.data_dir)
        _sync_dir(parent)

    async def _wait_ready(self, process: Process) -> None:
        deadline = time.monotonic() + READY_S
        pause = 0.01
        while True:
            if self._stopping.is_set():
                raise Unavailable("PostgreSQL is being stopped")
            if process.returncode is not None:
                raise (_Killed if process.returncode < 0 else Unavailable)(
                    f"PostgreSQL ended with {process.returncode} at its start: {self._last_words()}",
                    remedy=f"see {self.log_file}",
                )
            try:
                return await self._make_database()
            except psycopg.OperationalError as e:  # not there yet, or gone again
                if time.monotonic() > deadline:
                    raise Unavailable(f"PostgreSQL does not answer after {READY_S:.0f} s: {e}",
                                      remedy=f"see {self.log_file}") from e  # fmt: skip
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.2)

    async def _make_database(self) -> None:
        async with await AsyncConnection.connect(self.admin_dsn, autocommit=True, connect_timeout=10) as conn:
            name = sql.Identifier(NAME)
            if not await (await conn.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (NAME,))).fetchone():
                await conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
            if not await (await conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", (NAME,))).fetchone():
                await conn.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, name))

    # ---- clearing up

    async def _drop_unfinished(self) -> None:
        """What an initdb that was killed half-way left."""
        if not self.data_dir.parent.is_dir():
            return
        for left in self.data_dir.parent.glob(f"{self.data_dir.name}.new-*"):
            await self._clear_orphans(left)
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)

    async def _clear_orphans(self, directory: Path) -> None:
        """Wait until no process of a former life is left in `directory`; those that do not go are made to."""
        start = time.monotonic()
        asked = killed = False
        while left := cluster.processes_in(directory):
            waited = time.monotonic() - start
            if waited > _ORPHAN_GRACE_S and not asked:
                asked = True
                head = cluster.recorded_pid(directory)
                log.warning("PostgreSQL of a former life still runs in %s (%s): ending it", directory, left)
                for pid in left if head is None or head not in left else [head]:
                    cluster.send(pid, directory, signal.SIGQUIT)
            if waited > _ORPHAN_GRACE_S + _ORPHAN_QUIT_S and not killed:
                killed = True
                for pid in left:
                    cluster.send(pid, directory, signal.SIGKILL)
            if waited > 60:
                raise Unavailable(f"processes {left} live in {directory} and cannot be ended", remedy="end them")
            await asyncio.sleep(0.05)

    async def _halt(self) -> None:
        process = self._process
        if process is not None:
            for number, patience in ((signal.SIGINT, 30.0), (signal.SIGQUIT, 8.0), (signal.SIGKILL, 8.0)):
                if process.returncode is not None:
                    break
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await process.wait()
            self._process = None
        if self._lock is not None:
            await self._clear_orphans(self.data_dir)

    async def _take_lock(self) -> None:
        if self._lock is not None:
            raise Conflict(f"PostgreSQL in {self.data_dir} was started already")
        path = self.data_dir.with_name(f"{self.data_dir.name}.lock")
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o711)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                    os.close(fd)
                    raise Conflict(
                        f"another Rethaw (pid {holder}) runs the database in {self.data_dir}",
                        remedy="stop it or choose another data directory",
                    ) from None
                await asyncio.sleep(0.1)
            except BaseException:
                os.close(fd)
                raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock = fd

    def _drop_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _rotate_log(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self.log_file.stat().st_size > _LOG_LIMIT:
                self.log_file.replace(self.log_file.with_name(f"{self.log_file.name}.1"))

    def _last_words(self) -> str:
        try:
            said = self.log_file.read_bytes()[self._log_start :]
        except OSError:
            said = b""
        return " | ".join(said.decode("utf-8", "replace").strip().splitlines()[-4:]) or "it left no word"


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
