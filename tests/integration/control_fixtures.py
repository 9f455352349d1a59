"""A PostgreSQL of our own for the tests of control and api: one cluster for a test run, one database for each test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from rethaw.control.control import Control
from rethaw.control.loops import ControlLoops
from rethaw.control.policy import Policy
from rethaw.control.snapshots import Catalog
from rethaw.control.wakeups import Transactions
from rethaw.db.migrate import migrate
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.log.store import Log
from rethaw.model.enums import EventType, State
from rethaw.model.ids import new_generation, new_id
from rethaw.model.types import (
    AgentSpec,
    Assignment,
    Event,
    Fence,
    NewEvent,
    NodeInfo,
    Section,
    SessionView,
    SnapshotInfo,
    StateChange,
)

_BIN = Path("/usr/lib/postgresql/15/bin")
T = TypeVar("T")


@pytest.fixture(scope="session", name="control_cluster")
def cluster_fixture() -> Iterator[str]:
    """The DSN (without a database) of a throw-away cluster."""
    if not _BIN.exists():
        pytest.skip("PostgreSQL 15 is not installed")
    home = Path(tempfile.mkdtemp(prefix="rethaw-control-", dir="/tmp"))
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(home, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = home / "data"
    subprocess.run(
        [_BIN / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, capture_output=True, cwd=home, **as_user,
    )  # fmt: skip
    server = subprocess.Popen(
        [_BIN / "postgres", "-D", data, "-k", home, "-c", "listen_addresses=", "-c", "fsync=off",
         "-c", "max_connections=80", "-c", "shared_buffers=32MB"],
        stdout=subprocess.DEVNULL, stderr=(home / "log").open("wb"), cwd=home, **as_user,
    )  # fmt: skip
    try:
        dsn = f"host={home} user=postgres"
        until = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(f"{dsn} dbname=postgres").close()
                break
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        with psycopg.connect(f"{dsn} dbname=postgres", autocommit=True) as conn:
            conn.execute("CREATE DATABASE template_rethaw")
        asyncio.run(_migrate(f"{dsn} dbname=template_rethaw"))
        yield dsn
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(home, ignore_errors=True)


async def _migrate(dsn: str) -> None:
    async with Database(dsn) as db:
        await migrate(db)


@pytest.fixture(name="control_dsn")
def dsn_fixture(control_cluster: str) -> Iterator[str]:
    """The DSN of an empty, migrated database."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{control_cluster} dbname=postgres", autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE template_rethaw")  # type: ignore[arg-type]
    yield f"{control_cluster} dbname={name}"
    with psycopg.connect(f"{control_cluster} dbname=postgres", autocommit=True) as conn:
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]


async def eventually(look: Callable[[], Awaitable[T | None]], seconds: float = 10.0) -> T:
    """What `look` finds, tried until a deadline."""
    until = time.monotonic() + seconds
    while True:
        found = await look()
        if found:
            return found
        assert time.monotonic() < until, "it did not happen in time"
        await asyncio.sleep(0.01)


AGENT = AgentSpec(name="tester", command=("/bin/true",), memory_bytes=64 << 20)


@dataclass
class Node:
    """A node as control sees one, by hand."""

    control: Control
    id: str = field(default_factory=lambda: new_id("n"))
    incarnation: str = field(default_factory=new_generation)
    revision: int = 0
    memory_bytes: int = 4 << 30

    async def register(self) -> None:
        info = NodeInfo(
            id=self.id, incarnation=self.incarnation, data_dir="/x", engines=("gvisor",), memory_bytes=self.memory_bytes
        )
        await self.control.register_node(info)

    async def restart(self) -> None:
        self.incarnation, self.revision = new_generation(), 0
        await self.register()

    async def work(self, timeout_s: float = 0.0) -> list[Assignment]:
        found = await self.control.assignments(self.id, self.incarnation, self.revision, timeout_s)
        if found:
            self.revision = found[-1].revision
        return found

    async def one(self, action: str, session: str | None = None) -> Assignment:
        found = [a for a in await self.work(5.0) if session is None or a.session == session]
        assert [a.action for a in found] == [action], found
        return found[0]


@dataclass
class World:
    """Control over a database, and hands to play a node's part."""

    db: Database
    hub: NotifyHub
    log: Log
    control: Control
    catalog: Catalog
    node: Node
    count: int = 0

    @property
    def loops(self) -> ControlLoops:
        return ControlLoops(self.control)

    async def start(self, agent: AgentSpec = AGENT, key: str | None = None, **args: Any) -> tuple[str, Fence]:
        """A running session and its fence."""
        view, _ = await self.control.create(agent, args, key)
        assignment = await self.node.one("start", view.id)
        fence = Fence(session=view.id, generation=assignment.generation)
        await self.report(fence, State.RUNNING)
        return view.id, fence

    async def report(self, fence: Fence, state: State, **more: Any) -> SessionView:
        return await self.control.report(fence, StateChange(state=state, **more))

    async def larger_node_away(self) -> None:
        """A node that could hold any agent was seen once: sessions wait for it."""
        await self.sql(
            """INSERT INTO nodes (id, incarnation, info, memory_bytes, lease_until)
               SELECT 'away', 'x', info, 1::bigint << 52, now() - interval '1 day' FROM nodes LIMIT 1"""
        )

    async def append(self, fence: Fence, kind: EventType, body: bytes | None = None, **data: Any) -> Event:
        key = data.pop("key", None)
        return (await self.log.append(fence, [NewEvent(type=kind, data=data, body=body, key=key)]))[0]

    async def act(self, fence: Fence) -> Event:
        """Something that the agent does."""
        self.count += 1
        return await self.append(fence, EventType.EMITTED, b"1", name=f"n{self.count}")

    def info(self, view: SessionView, seq: int, **more: Any) -> SnapshotInfo:
        assert view.generation is not None
        values: dict[str, Any] = {
            "id": new_id("snap"), "session": view.id, "parent": view.snapshot, "line": view.line,
            "attempt": view.attempt, "seq": seq, "generation": view.generation, "engine": "gvisor",
            "engine_build": "b", "cpu": "c", "image": "i", "path": "p",
            "digest": "0", "sections": (Section(name="s", raw_bytes=1),), "resync": "00",
            "why": "exchange", "paused_ms": 1.0, "durable_ms": 2.0, "raw_bytes": 10, "stored_bytes": 5,
        }  # fmt: skip
        return SnapshotInfo(**{**values, **more})

    async def save(self, fence: Fence, **more: Any) -> SnapshotInfo:
        """A snapshot of everything so far."""
        view = await self.control.session(fence.session)
        return await self.catalog.commit(fence, self.info(view, more.pop("seq", view.last_seq), **more))

    async def sleep(self, fence: Fence, reason: Any) -> SnapshotInfo:
        """Suspend in order."""
        await self.report(fence, State.SUSPENDING, reason=reason)
        info = await self.save(fence, why="suspend")
        await self.report(fence, State.SUSPENDED, reason=reason)
        return info

    async def back(self, session: str, action: str = "restore") -> tuple[Assignment, Fence]:
        """Take the next assignment and run it."""
        assignment = await self.node.one(action, session)
        fence = Fence(session=session, generation=assignment.generation)
        await self.report(fence, State.RUNNING)
        return assignment, fence

    async def events(self, session: str, *types: EventType) -> list[Event]:
        """Of the path."""
        return await self.log.read(session, types=list(types) or None)

    async def states(self, session: str) -> list[str]:
        return [e.data["state"] for e in await self.events(session, EventType.SESSION_STATE)]

    async def run(self, fn: Callable[[Any], Awaitable[T]]) -> T:
        return await Transactions(self.db, self.hub).run(fn)

    async def sql(self, query: str, *params: Any) -> list[Any]:
        """One statement; rows if it returns any."""
        async with self.db.connection() as conn:
            cursor = await conn.execute(query, params)  # type: ignore[arg-type]
            return await cursor.fetchall() if cursor.description else []


@contextlib.asynccontextmanager
async def world(dsn: str, policy: Policy | None = None, **control: Any) -> AsyncIterator[World]:
    policy = policy or Policy()
    async with Database(dsn) as db, NotifyHub(db) as hub:
        log = Log(db, hub)
        made = Control(db, log, hub, public_url="http://rethaw.test", secret=b"secret", policy=policy, **control)
        node = Node(made)
        out = World(db, hub, log, made, Catalog(db, hub, policy), node)
        await node.register()
        yield out


@pytest.fixture(name="w")
async def world_fixture(control_dsn: str) -> AsyncIterator[World]:
    async with world(control_dsn) as made:
        yield made
