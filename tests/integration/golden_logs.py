"""Logs that this version once wrote and every later one must read: tests/golden/logs-v1.

Run as a program, it writes them, for a new version of the format: `python tests/integration/golden_logs.py DSN DIRECTORY`,
where DSN names an empty database. Those that are there are never made anew: a reader that cannot read them has broken
somebody's data.

In the directory: TABLE.copy, the rows as `COPY TABLE (columns) TO STDOUT` gives them; about.json: the last migration that
they were written under, the columns, and what was read back then.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from control_fixtures import World, world

from rethaw.db.migrate import migrate, packaged
from rethaw.db.pool import Database
from rethaw.model.enums import EventType, ExchangeState, Reason, State
from rethaw.model.types import (
    AgentSpec,
    Chunk,
    Exchange,
    Fence,
    NewEvent,
    RequestMeta,
    ResponseHead,
    Usage,
    WaitSpec,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "logs-v1"
AGENT = AgentSpec(name="golden", command=("/bin/agent", "--now"), memory_bytes=64 << 20, env={"A": "b"})
ODD = "a nul \0, a lone surrogate \ud800, a private use \uf8ff"


def turn(n: int) -> dict[str, Any]:
    return {"role": "user" if n % 2 == 0 else "assistant", "content": f"turn {n}: " + f"words of turn {n} " * 90}


def request(turns: int, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [turn(n) for n in range(turns)], **more}).encode()


async def ask(w: World, fence: Fence, body: bytes, guest_id: str) -> Exchange:
    meta = RequestMeta(
        provider="openai", method="POST", path="/v1/chat/completions", headers=(("X-A", "b"), ("x-odd", ODD)),
        digest=hashlib.sha256(body).hexdigest(), model_call=True, model="m", guest_id=guest_id,
    )  # fmt: skip
    return await w.log.begin_exchange(fence, meta, body, w.node.incarnation, upstream=True)


async def answered(w: World, x: Exchange, batches: list[list[bytes]]) -> None:
    at, head = 0, ResponseHead(status=200, reason="OK", headers=(("content-type", "text/event-stream"),))
    for batch in batches:
        chunks: list[Chunk] = []
        for data in batch:
            chunks.append(Chunk(offset=at, data=data, at_us=at * 10))
            at += len(data)
        await w.log.append_response(x.id, x.epoch, head, chunks)
    event = NewEvent(type=EventType.EXCHANGE_COMPLETED, data={"exchange": x.id, "status": 200, "output_tokens": 3})
    usage = Usage(model="m", input_tokens=40, cached_tokens=8, output_tokens=3)
    await w.log.finish_exchange(x.id, x.epoch, ExchangeState.COMPLETE, usage, event)


def streamed(text: str) -> list[list[bytes]]:
    events = [f'data: {{"delta": "{word}"}}\n\n'.encode() for word in text.split()]
    return [events[:2], events[2:5], [*events[5:], b"data: [DONE]\n\n"]]


async def conversation(w: World) -> str:
    """Messages, signals, calls streamed and not, snapshots, a crash with what it took back, an end. Its session."""
    session, fence = await w.start(AGENT, "golden-key", topic="a nul \0")
    await w.control.send(session, json.dumps({"hello": ODD}).encode(), "first")
    inbox = WaitSpec(id="1.1", kind="inbox", after=0, timeout_s=60)
    await w.control.open_wait(fence, 1, inbox)
    await w.control.consume(fence, 1, 1)
    whole = await ask(w, fence, request(3, temperature=0.5, tools=[{"name": "t", "text": "x" * 3000}]), "1.2")
    await answered(w, whole, [[b'{"choices": [1, 2, 3]}']])
    await w.append(fence, EventType.MESSAGE_SENT, b'"kept"', message="m_golden_kept", key="send:1.3")
    await w.save(fence)
    await w.append(fence, EventType.OUTPUT, b"\0\xff binary output" * 100, stream="stdout", offset=0)
    await w.append(fence, EventType.EMITTED, json.dumps(ODD).encode(), name="odd", odd=ODD)
    await w.control.signal(session, "approval", b'{"ok": true}', "sig-1")
    await w.control.open_wait(fence, 1, WaitSpec(id="1.4", kind="signal", name="approval"))
    stream = await ask(w, fence, request(5), "1.5")
    await answered(w, stream, streamed("a stream of several words that came in three batches"))
    info = await w.save(fence)
    lost = await ask(w, fence, request(6), "1.6")
    await w.log.append_response(lost.id, 1, ResponseHead(status=200), [Chunk(offset=0, data=b"half", at_us=1)])
    await w.append(fence, EventType.MESSAGE_SENT, b'"taken back"', message="m_golden_lost", key="send:1.7")
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
    _, fence = await w.back(session)
    await w.log.orphan_exchange(fence, lost.id)
    await w.control.open_wait(fence, 1, WaitSpec(id="1.8", kind="signal", name="never", timeout_s=86400))
    await w.control.open_wait(fence, 1, WaitSpec(id="1.9", kind="timer", timeout_s=0.0))
    await w.append(fence, EventType.MESSAGE_SENT, b'"after the crash"', message="m_golden_after", key="send:1.10")
    await w.save(fence, why="requested", parent=info.id)
    await w.append(fence, EventType.SESSION_RESULT, b'{"done": true}', key="result:1.11")
    await w.report(fence, State.COMPLETED, reason=Reason.EXITED, exit_code=0)
    return session


async def branch(w: World, session: str) -> str:
    """A fork from the middle, taken back once."""
    at = (await w.events(session, EventType.SNAPSHOT_CREATED))[1].data
    (view,) = await w.control.fork(session, str(at["snapshot"]))
    _, fence = await w.back(view.id)
    await w.append(fence, EventType.MESSAGE_SENT, b'"of the fork"', message="m_golden_fork", key="send:1.7")
    own = await w.save(fence)
    gone = await ask(w, fence, request(7), "1.20")
    await answered(w, gone, streamed("an answer that a rewind left behind for another one"))
    await w.control.rewind(view.id, own.id)
    _, fence = await w.back(view.id)
    again = await ask(w, fence, request(7, top_p=1), "1.20")
    await answered(w, again, streamed("the answer of the line that was kept to the end"))
    await w.report(fence, State.FAILED, reason=Reason.EXITED, exit_code=3)
    return view.id


async def seen(w: World, session: str) -> dict[str, Any]:
    """All that a reader of the log gets, as JSON."""
    events = await w.log.read(session, all_lines=True)
    exchanges = await w.log.list_exchanges(session)
    calls: list[dict[str, Any]] = []
    for x in exchanges:
        chunks = await w.log.read_response(x.id)
        calls.append({
            "exchange": x.model_dump(mode="json"),
            "request": text(await w.log.read_request(x.id)),
            "chunks": [[c.offset, text(c.data), c.at_us] for c in chunks],
        })  # fmt: skip
    view = await w.control.session(session)
    messages = [*await w.control.inbox(session), *await w.control.outbox(session)]
    return {
        "events": [json.loads(json.dumps({**e.model_dump(), "body": text(e.body), "at": e.at.isoformat()})) for e in events],
        "lines": [list(row) for row in await w.sql(
            "SELECT q.session, q.line, q.upto FROM sessions s, rethaw_path(s.id, s.line) q WHERE s.id = %s", session)],
        "exchanges": calls,
        "messages": [[m.id, m.number, text(m.payload), m.at.isoformat()] for m in messages],
        "state": [view.state, view.reason, view.last_seq, view.line, view.attempt, view.crashes, view.exit_code],
        "agent": view.agent.model_dump(mode="json", exclude_defaults=True),
        "stats": await w.log.stats(session),
    }  # fmt: skip


def text(data: bytes | None) -> str | None:
    """Bytes as base64, long ones by their hash."""
    if data is None:
        return None
    return base64.b64encode(data).decode() if len(data) <= 96 else f"{len(data)}:{hashlib.sha256(data).hexdigest()}"


async def make(dsn: str, directory: Path) -> None:
    async with Database(dsn) as db:
        await migrate(db)
    async with world(dsn) as w:
        session = await conversation(w)
        fork = await branch(w, session)
        about = {"migration": packaged()[-1].name, "tables": await dump(w.db, directory),
                 "seen": {session: await seen(w, session), fork: await seen(w, fork)}}  # fmt: skip
    (directory / "about.json").write_text(json.dumps(about, indent=1) + "\n")


async def dump(db: Database, directory: Path) -> dict[str, list[str]]:
    """Write every table that has rows; its columns by name."""
    directory.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[str]] = {}
    found = await db.fetch(
        """SELECT table_name, string_agg(column_name, ',' ORDER BY ordinal_position) FROM information_schema.columns
           JOIN information_schema.tables USING (table_schema, table_name)
           WHERE table_schema = 'public' AND table_type = 'BASE TABLE' AND table_name <> 'schema_migrations'
           GROUP BY 1 ORDER BY 1"""
    )
    async with db.connection() as conn:
        for table, names in found:
            query = (
                f"COPY (SELECT {names} FROM {table} ORDER BY {names.split(',')[0]}, {names.split(',')[1]}) TO STDOUT"
            )
            async with conn.cursor().copy(query.encode()) as copy:
                rows = b"".join([bytes(block) async for block in copy])
            if rows:
                (directory / f"{table}.copy").write_bytes(rows)
                tables[table] = names.split(",")
    return tables


async def load(db: Database, directory: Path) -> dict[str, Any]:
    """Put the rows into an empty database as they were, under the migration of then. Returns about.json."""
    about = json.loads((directory / "about.json").read_text())
    until = [m.name for m in packaged()].index(about["migration"]) + 1
    await migrate(db, packaged()[:until])
    async with db.tx() as conn:
        await conn.execute("SET LOCAL session_replication_role = replica")  # any order of tables
        for table, columns in about["tables"].items():
            async with conn.cursor().copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode()) as copy:
                await copy.write((directory / f"{table}.copy").read_bytes())
    return about


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1], Path(sys.argv[2])))
