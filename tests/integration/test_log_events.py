"""Events of the context log: gapless, fenced, once, exact, on lines, append-only, followed."""

from __future__ import annotations

import asyncio
import os

import psycopg
import pytest
from db_fixtures import *  # noqa: F403
from db_fixtures import Cluster, eventually, new_session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.log.lineage import STAYS, lines_in, path_in
from rethaw.log.store import Log
from rethaw.log.writer import append_in, create_session_in, open_line_in
from rethaw.model import faults
from rethaw.model.enums import EventType as T
from rethaw.model.errors import Conflict, Fenced, InvalidInput, NotFound, RethawError, TooLarge
from rethaw.model.ports import LogSink
from rethaw.model.types import Event, Fence, NewEvent


def emitted(n: int, **kw: object) -> NewEvent:
    return NewEvent(type=T.EMITTED, data={"n": n}, **kw)  # type: ignore[arg-type]


def test_log_is_a_log_sink(log: Log) -> None:
    sink: LogSink = log
    assert sink is log


async def test_append_is_ordered_and_gapless(log: Log, fence: Fence) -> None:
    first = await log.append(fence, [emitted(1), emitted(2, body=b"two")])
    assert [(e.seq, e.line, e.attempt, e.key) for e in first] == [(1, 1, 1, None), (2, 1, 1, None)]
    assert await log.append(fence, []) == []
    third = (await log.append(fence, [emitted(3)]))[0]
    assert third.seq == 3 and await log.last_seq(fence.session) == 3
    assert await log.read(fence.session) == [*first, third]
    assert [e.seq for e in await log.read(fence.session, 1, 1)] == [2]


async def test_many_writers_leave_no_gap(db: Database, log: Log, fence: Fence) -> None:
    other = Log(db)

    async def write(log: Log, who: int) -> list[Event]:
        out: list[Event] = []
        for i in range(25):
            out += await log.append(fence, [emitted(i), emitted(who)])
        return out

    written = await asyncio.gather(*(write(log if n % 2 else other, n) for n in range(8)))
    assert sorted(e.seq for events in written for e in events) == list(range(1, 401))
    read = await log.read(fence.session)
    assert [e.seq for e in read] == list(range(1, 401))
    for events in written:  # each writer's order is kept, pairs are not torn apart
        assert [e.seq for e in events] == sorted(e.seq for e in events)
        assert all(b.seq == a.seq + 1 for a, b in zip(events[::2], events[1::2], strict=True))
    assert (await log.verify(fence.session)).ok


async def test_a_wrong_generation_is_fenced_and_writes_nothing(log: Log, fence: Fence) -> None:
    zombie = Fence(session=fence.session, generation="old")
    with pytest.raises(Fenced, match="g1"):
        await log.append(zombie, [emitted(1)])
    with pytest.raises(Fenced):
        await log.append(zombie, [emitted(1), emitted(2)])
    with pytest.raises(NotFound, match="s_none"):
        await log.append(Fence(session="s_none", generation="g1"), [emitted(1)])
    assert await log.last_seq(fence.session) == 0


async def test_keys_make_an_append_idempotent(log: Log, fence: Fence) -> None:
    first = await log.append(fence, [emitted(1, key="a", body=b"x\0y"), emitted(2)])
    again = await log.append(fence, [emitted(9, key="a"), emitted(3), emitted(4, key="a")])
    assert again[0] == first[0] == again[2] and again[1].seq == 3
    assert (await log.append(fence, [emitted(7, key="a")])) == [first[0]]
    assert await log.last_seq(fence.session) == 3
    for bad in ("", "~x", "a\0", "\ud800", "x" * 1001):
        with pytest.raises(InvalidInput):
            await log.append(fence, [emitted(1, key=bad)])


async def test_lines(db: Database, log: Log, fence: Fence) -> None:
    s = fence.session
    await log.append(fence, [emitted(1), emitted(2, key="k"), NewEvent(type=T.MESSAGE_RECEIVED, key="m")])
    async with db.tx() as conn:
        assert await open_line_in(conn, s, 1, "crash", "snap_1") == 2
    opened = (await log.read(s, types=[T.LINE_OPENED]))[0]
    assert opened.data == {"line": 2, "parent": 1, "branch_seq": 1, "why": "crash", "snapshot": "snap_1"}
    assert (opened.line, opened.seq) == (2, 4)
    # what came from outside stays, what the guest did after the branch does not
    assert [e.seq for e in await log.read(s)] == [1, 3, 4]
    assert [(e.seq, e.superseded) for e in await log.read(s, all_lines=True)] == [
        (1, False), (2, True), (3, False), (4, False),
    ]  # fmt: skip
    # so the key is free again on this line; that of the message is not
    new, message = await log.append(fence, [emitted(2, key="k"), NewEvent(type=T.MESSAGE_RECEIVED, key="m")])
    assert (new.seq, new.line, message.seq) == (5, 2, 3)
    # a line opened from before its parent's branch sees nothing of that parent
    async with db.tx() as conn:
        assert await open_line_in(conn, s, 0, "again", None, attempt=2) == 3
        assert [(r.line, r.upto) for r in await path_in(conn, s)][1:] == [(2, 0), (1, 0)]
        assert [(r.line, r.upto) for r in await path_in(conn, s, 2)][1:] == [(1, 1)]
        assert [(row.line, row.parent, row.branch_seq) for row in await lines_in(conn, s)] == [
            (1, None, 0), (2, 1, 1), (3, 2, 0),
        ]  # fmt: skip
    assert [e.seq for e in await log.read(s)] == [3, 4, 6]
    assert (await log.append(fence, [emitted(1)]))[0].attempt == 2
    # and one opened from a line that was left sees that one
    async with db.tx() as conn:
        assert await open_line_in(conn, s, 2, "rewind", None, parent=1) == 4
    assert [e.seq for e in await log.read(s)] == [1, 2, 3, 4, 6, 8]
    async with db.tx() as conn:
        with pytest.raises(InvalidInput):
            await open_line_in(conn, s, 9, "beyond", None)
    with pytest.raises(NotFound):
        async with db.tx() as conn:
            await open_line_in(conn, "s_none", 0, "x", None)
    assert (await log.verify(s)).ok


async def test_sql_and_python_agree_on_what_stays(db: Database) -> None:
    rows = await db.fetch("SELECT t FROM unnest(%s::text[]) t WHERE rethaw_stays(t)", ([t.value for t in T],))
    assert {row[0] for row in rows} == {t.value for t in STAYS}


_texts = st.text(st.characters(), max_size=12)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.dictionaries(_texts, _json, max_size=5), body=st.none() | st.binary(max_size=2000))
async def test_data_and_bodies_are_kept_exactly(log: Log, fence: Fence, data: dict[str, object], body: bytes) -> None:
    event = (await log.append(fence, [NewEvent(type=T.EMITTED, data=data, body=body)]))[0]
    read = (await log.read(fence.session, event.seq - 1))[0]
    assert read.data == data and read.body == body


async def test_bytes_that_text_cannot_hold(log: Log, fence: Fence) -> None:
    odd = {"nul\0": "a\0b", "lone": "\ud800", "own escape": "\uf8ff0000", "pair": "\ud83d\ude00", "emoji": "😀"}
    bodies = [b"", b"\0", b"\xff\xfe\0" * 100, os.urandom(300), b"\xed\xa0\x80", None]
    await log.append(fence, [NewEvent(type=T.EMITTED, data=odd, body=b) for b in bodies])
    events = await log.read(fence.session)
    assert [e.body for e in events] == bodies
    assert all(e.data == odd for e in events)
    with pytest.raises(InvalidInput):
        await log.append(fence, [NewEvent(type=T.EMITTED, data={"x": float("nan")})])
    with pytest.raises(TooLarge):
        await log.append(fence, [NewEvent(type=T.EMITTED, data={"x": "y" * (2 << 20)})])


async def test_large_bodies_are_paged(log: Log, fence: Fence) -> None:
    big = os.urandom(10 << 20)
    for n in range(3):
        await log.append(fence, [emitted(n, body=big)])
    page = await log._page(fence.session, 0, 500, None, False)  # pyright: ignore[reportPrivateUsage]
    assert len(page) == 2
    assert [e.body == big for e in await log.read(fence.session)] == [True] * 3


TABLES = ("lines", "events", "content", "segments", "exchanges", "response_heads", "response_chunks")


@pytest.mark.parametrize("table", TABLES)
async def test_append_only(db: Database, log: Log, fence: Fence, table: str) -> None:
    from test_log_exchanges import answer, ask

    body = b'{"messages":["%s"]}' % (b"x" * 3000)
    exchange = await ask(log, fence, body)
    await answer(log, exchange, b"answer")
    for statement in (
        f"UPDATE {table} SET session = 'x'", f"DELETE FROM {table}", f"TRUNCATE {table}",
        f"DELETE FROM {table} WHERE session = '{fence.session}'",
    ):  # fmt: skip
        with pytest.raises(psycopg.Error) as caught:
            async with db.tx() as conn:
                await conn.execute(statement.encode())
        assert caught.value.sqlstate == "RT003", statement
    assert await log.read_request(exchange.id) == body


async def test_erasure_is_whole_or_not_at_all(db: Database, log: Log, fence: Fence) -> None:
    from test_log_exchanges import answer, ask

    other = await new_session(db)
    for f in (fence, other):
        exchange = await ask(log, f, b'{"messages":["%s"]}' % (b"x" * 3000))
        await answer(log, exchange, b"answer")
    # a tombstone alone, or with a part of the session gone, does not commit
    for partly in ("", "DELETE FROM events WHERE session = %(s)s", "DELETE FROM sessions WHERE id = %(s)s"):
        with pytest.raises(psycopg.Error) as caught:
            async with db.tx() as conn:
                await conn.execute("INSERT INTO erasures VALUES (%(s)s, now(), 1)", {"s": fence.session})
                if partly:
                    await conn.execute(partly.encode(), {"s": fence.session})
        assert caught.value.sqlstate == "RT003"
    with pytest.raises(Conflict):
        await db.fetch("DELETE FROM sessions WHERE id = %s RETURNING id", (fence.session,))
    assert (await log.verify(fence.session)).ok

    await log.erase(fence.session)
    for table in TABLES:
        assert not await db.fetch(f"SELECT 1 FROM {table} WHERE session = %s", (fence.session,)), table
    assert not await db.fetch("SELECT 1 FROM exchange_state s WHERE NOT EXISTS (SELECT 1 FROM exchanges x"
                              " WHERE x.id = s.id)")  # fmt: skip
    assert await log.erased(fence.session) and not await log.erased(other.session)
    for call in (log.read(fence.session), log.verify(fence.session), log.erase(fence.session),
                 log.append(fence, [emitted(1)])):  # fmt: skip
        with pytest.raises(NotFound):
            await call
    with pytest.raises(Conflict):
        async with db.tx() as conn:
            await create_session_in(conn, fence.session)
    with pytest.raises(Conflict):
        await db.fetch("DELETE FROM erasures RETURNING session")
    assert (await log.verify(other.session)).ok


async def test_verify_finds_damage(db: Database, log: Log, fence: Fence) -> None:
    from test_log_exchanges import ask

    await ask(log, fence, b'{"messages":["%s"]}' % (b"x" * 3000))
    await ask(log, fence, b'{"messages":["y","z"]}')
    assert (await log.verify(fence.session)).ok
    async with db.tx() as conn:
        for table in ("content", "segments", "events"):
            await conn.execute(f"ALTER TABLE {table} DISABLE TRIGGER append_only".encode())
        await conn.execute("UPDATE content SET data = data || '\\x00'")
        await conn.execute("UPDATE segments SET parts = overlay(parts placing '\\x21'::bytea from 6 for 1)"
                           " WHERE prev IS NOT NULL")  # fmt: skip
        await conn.execute("UPDATE events SET seq = seq + 10")
    problems = " ".join((await log.verify(fence.session)).problems)
    for word in ("content", "segment", "events from 11"):
        assert word in problems


async def test_follow_sees_everything_once(db: Database, log: Log, fence: Fence, hub: NotifyHub) -> None:
    got: list[int] = []

    async def follow() -> None:
        async for event in log.follow(fence.session):
            got.append(event.seq)

    task = asyncio.create_task(follow())
    elsewhere = Log(db)  # no hub: notifies in its transaction
    for n in range(40):
        await (log if n % 2 else elsewhere).append(fence, [emitted(n)])
    async with db.tx() as conn:
        await append_in(conn, fence.session, [emitted(41)], generation=None)

    async def all_there() -> bool:
        return len(got) == 41

    await eventually(all_there)
    assert got == list(range(1, 42))
    assert not task.done()
    await log.erase(fence.session)
    with pytest.raises(NotFound):
        await asyncio.wait_for(task, 10)


async def test_follow_gives_the_path_that_is_current(db: Database, log: Log, fence: Fence) -> None:
    await log.append(fence, [emitted(1), emitted(2)])
    async with db.tx() as conn:
        await open_line_in(conn, fence.session, 1, "crash", None)
    path, everything = log.follow(fence.session), log.follow(fence.session, 1, path_only=False)
    assert [(await anext(path)).seq, (await anext(path)).seq] == [1, 3]
    second = await anext(everything)
    assert (second.seq, second.superseded) == (2, True)


async def test_follow_goes_on_when_postgres_was_killed(own_cluster: Cluster) -> None:
    async with Database(own_cluster.pg.dsn.replace("dbname=rethaw", "dbname=migrated")) as db, NotifyHub(db) as hub:
        log = Log(db, hub)
        fence = await new_session(db)
        got: list[int] = []

        async def follow() -> None:
            async for event in log.follow(fence.session):
                got.append(event.seq)

        task = asyncio.create_task(follow())
        for n in range(3):
            await log.append(fence, [emitted(n)])
            own_cluster.kill()
        await log.append(fence, [emitted(3)])

        async def all_there() -> bool:
            return len(got) == 4

        await eventually(all_there, 30)
        assert got == [1, 2, 3, 4]
        await asyncio.wait_for(hub.listening.wait(), 20)  # notified again, not polling only
        task.cancel()


async def test_a_lost_commit_reply_duplicates_nothing(db: Database, log: Log, fence: Fence) -> None:
    """The connection is cut when the transaction is committed and its answer is on the way."""
    once = db.retrying
    lost = 0

    async def losing(fn, **kw):  # type: ignore[no-untyped-def]
        nonlocal lost
        first = True

        async def wrapped():  # type: ignore[no-untyped-def]
            nonlocal first, lost
            out = await fn()
            if first:
                first = False
                lost += 1
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return out

        return await once(wrapped, **kw)

    db.retrying = losing  # type: ignore[method-assign]
    try:
        await log.append(fence, [emitted(1), emitted(2)])
        await log.append(fence, [emitted(3)])
    finally:
        db.retrying = once  # type: ignore[method-assign]
    assert lost == 2
    assert [e.data["n"] for e in await log.read(fence.session)] == [1, 2, 3]


async def test_killing_postgres_while_appending_duplicates_and_loses_nothing(own_cluster: Cluster) -> None:
    async with Database(own_cluster.pg.dsn.replace("dbname=rethaw", "dbname=migrated")) as db:
        log = Log(db)
        fence = await new_session(db)
        stop = asyncio.Event()
        written = 0

        async def write() -> None:
            nonlocal written
            while not stop.is_set():
                await log.append(fence, [emitted(written)])
                written += 1

        task = asyncio.create_task(write())
        for kills in range(6):
            goal = written + 20

            async def progress(goal: int = goal) -> bool:
                assert not task.done()
                return written >= goal

            await eventually(progress, 30)
            if kills % 2:
                own_cluster.kill()
            else:
                with psycopg.connect(own_cluster.pg.admin_dsn) as conn:
                    conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rethaw'")
        stop.set()
        await task
        assert [e.data["n"] for e in await log.read(fence.session, limit=100_000)] == list(range(written))
        assert (await log.verify(fence.session)).ok


async def test_fault_points_are_passed(log: Log, fence: Fence) -> None:
    faults.configure("log.append.before_commit:1=raise")
    try:
        with pytest.raises(RethawError, match="before_commit"):
            await log.append(fence, [emitted(1)])
        faults.configure("log.append.after_commit:1=raise")
        with pytest.raises(RethawError, match="after_commit"):
            await log.append(fence, [emitted(2)])
    finally:
        faults.configure("")
    assert [e.data["n"] for e in await log.read(fence.session)] == [2]
