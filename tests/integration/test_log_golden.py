"""Logs of version 1 of the format are read as they were, byte for byte, and their sessions go on; a newer format is refused
by name. Who changes the format makes a version 2 and keeps these."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from control_fixtures import World, cluster_fixture, world  # noqa: F401 - fixtures
from golden_logs import GOLDEN, load, seen

from rethaw.db.migrate import migrate, packaged
from rethaw.db.pool import Database
from rethaw.log import encoding
from rethaw.model.enums import EventType, State
from rethaw.model.errors import Conflict, RethawError

VERSIONS = sorted(GOLDEN.parent.glob("logs-v*"))


@pytest.fixture(name="empty_dsn")
def empty_fixture(control_cluster: str) -> Any:
    """The DSN of an empty database, without any migration."""
    with psycopg.connect(f"{control_cluster} dbname=postgres", autocommit=True) as conn:
        conn.execute("CREATE DATABASE golden")
    yield f"{control_cluster} dbname=golden"
    with psycopg.connect(f"{control_cluster} dbname=postgres", autocommit=True) as conn:
        conn.execute("DROP DATABASE golden WITH (FORCE)")


@pytest.fixture(name="loaded", params=VERSIONS, ids=lambda p: p.name)
async def loaded_fixture(empty_dsn: str, request: Any) -> AsyncIterator[tuple[World, dict[str, Any]]]:
    """A world over the golden rows, brought up from the migration of then, and what was read of them then."""
    async with Database(empty_dsn) as db:
        about = await load(db, request.param)
        applied = await migrate(db)
        names = [m.name for m in packaged()]
        assert applied == names[names.index(about["migration"]) + 1 :]
    async with world(empty_dsn) as w:
        yield w, about["seen"]


def holds(now: Any, then: Any, where: str = "") -> None:
    """`now` is `then`, but that objects may have got more members."""
    if isinstance(then, dict):
        for key, value in then.items():
            assert key in now, f"{where}.{key} is gone"
            holds(now[key], value, f"{where}.{key}")
    elif isinstance(then, (list, tuple)):
        assert len(now) == len(then), where
        for number, (one, other) in enumerate(zip(now, then, strict=True)):
            holds(one, other, f"{where}[{number}]")
    else:
        assert now == then, where


async def test_golden_logs_are_read_and_go_on(loaded: tuple[World, dict[str, Any]]) -> None:
    w, then = loaded
    kinds: set[str] = set()
    for session, expected in then.items():
        holds(await seen(w, session), expected, session)
        report = await w.log.verify(session)
        assert report.ok, report.problems
        kinds |= {e["type"] for e in expected["events"]}
        assert any(e["superseded"] for e in expected["events"])
    assert {"session.crashed", "exchange.orphaned", "wait.completed", "session.forked", "output"} <= kinds
    assert all(len(expected["exchanges"]) > 2 for expected in then.values())
    # And their sessions are what they always were: one is taken back and goes on, and is forked.
    first, fork = then
    kept = (await w.events(first, EventType.SNAPSHOT_CREATED))[-1].data["snapshot"]
    await w.sql("UPDATE snapshots SET node = %s", w.node.id)
    await w.control.rewind(first, kept)
    assignment, fence = await w.back(first)
    assert assignment.snapshot is not None and assignment.agent.name == "golden"
    await w.act(fence)
    info = await w.save(fence)
    (child,) = await w.control.fork(first, info.id)
    assert [m.payload for m in await w.control.outbox(child.id)] == [b'"kept"', b'"after the crash"']
    assert (await w.control.session(fork)).state == State.FAILED
    for session in (first, fork, child.id):
        assert (await w.log.verify(session)).ok


async def test_a_newer_format_is_refused_by_name(loaded: tuple[World, dict[str, Any]]) -> None:
    w, then = loaded
    first, fork = then
    await w.sql("UPDATE sessions SET log_format = 2 WHERE id = %s", first)
    reads: list[Callable[[], Any]] = [
        lambda: w.log.read(first),
        lambda: w.log.read(fork),  # whose log begins in it
        lambda: w.log.verify(first),
    ]
    for read in reads:
        with pytest.raises(Conflict, match=f"{first}.*format 2.*up to 1") as refused:
            await read()
        assert "newer Rethaw" in str(refused.value)


def test_bytes_of_an_unknown_codec_are_refused_by_name() -> None:
    with pytest.raises(RethawError, match="codec 2"):
        encoding.unpack(b"x", 2, 1)


def test_there_are_golden_logs_and_they_are_small() -> None:
    assert GOLDEN in VERSIONS
    assert sum(path.stat().st_size for path in Path(GOLDEN).rglob("*")) < 200 * 1024
