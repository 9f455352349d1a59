"""What does the context log cost? `python -m benchmarks.context_log --json`, as anybody; uses the embedded PostgreSQL.

Growth: 200 turns; each adds a message of 50 KB and sends the whole conversation, about 1 GB in all. `new_bytes` is what
is new in them: each message once, and each answer. `stored_bytes` is what all tables of the log grew by on disk, with
rows, indexes and pages. The messages are random letters, which no compressor gets below three quarters; real ones
shrink further. `uncompressed_growth_ratio` leaves that out: as if contents were stored as they are.

Appends: one event of 50 KB of random bytes for each, in turns with a plain psycopg INSERT of a row of that size into a
table with the same key, both committed to the same PostgreSQL (fsync on). `appends_per_s` is one writer, the median of
16 rounds; `parallel_...` are 8 at a time, each in a session of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rethaw.db.embedded import EmbeddedPostgres
from rethaw.db.migrate import migrate
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.log.store import Log
from rethaw.log.writer import create_session_in
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.ids import new_id
from rethaw.model.types import Chunk, Fence, NewEvent, RequestMeta, ResponseHead, Usage

MESSAGE = 50_000  # bytes
ROUNDS, PER_ROUND, WRITERS = 16, 40, 8
TABLES = ["events", "content", "segments", "exchanges", "exchange_state", "response_heads", "response_chunks"]
RAW = "INSERT INTO raw (session, seq, type, data, body) VALUES (%s, %s, %s, %s::jsonb, %s)"


def ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 3)


async def new_fence(db: Database) -> Fence:
    fence = Fence(session=new_id("s"), generation="g")
    async with db.tx() as conn:
        await create_session_in(conn, fence.session)
        await conn.execute("UPDATE sessions SET generation = 'g', attempt = 1 WHERE id = %s", (fence.session,))
    return fence


async def on_disk(db: Database) -> int:
    rows = await db.fetch("SELECT sum(pg_total_relation_size(t::regclass)) FROM unnest(%s::text[]) t", (TABLES,))
    return int(rows[0][0])


async def growth(db: Database, log: Log, turns: int) -> dict[str, Any]:
    fence = await new_fence(db)
    before = await on_disk(db)
    messages: list[dict[str, str]] = []
    new = sent = 0
    took: list[float] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": base64.b64encode(os.urandom(MESSAGE * 3 // 4)).decode()})
        body = json.dumps({"model": "m", "messages": messages, "stream": True}).encode()
        meta = RequestMeta(
            provider="openai", method="POST", path="/v1/chat/completions", model="m", model_call=True,
            digest=hashlib.sha256(body).hexdigest(), guest_id=f"1.{turn}",
        )  # fmt: skip
        start = time.perf_counter()
        x = await log.begin_exchange(fence, meta, body, "bench")
        took.append(time.perf_counter() - start)
        answer = json.dumps(
            {"role": "assistant", "content": f"answer {turn} " + base64.b64encode(os.urandom(300)).decode()}
        )
        await log.append_response(x.id, 1, ResponseHead(status=200), [Chunk(offset=0, data=answer.encode(), at_us=0)])
        done = NewEvent(type=EventType.EXCHANGE_COMPLETED, data={"exchange": x.id, "status": 200})
        await log.finish_exchange(x.id, 1, ExchangeState.COMPLETE, Usage(input_tokens=1, output_tokens=1), done)
        new += len(json.dumps(messages[-1])) + 2 * len(answer)  # the answer, and again as a message of the next turn
        sent += len(body)
        messages.append(json.loads(answer))
        if turn in (turns // 2, turns - 1) and await log.read_request(x.id) != body:
            sys.exit("a request did not come back exactly")
    stored = await on_disk(db) - before
    saved = int((await db.fetch("SELECT sum(size) - sum(length(data)) FROM content"))[0][0])
    if not (await log.verify(fence.session)).ok:
        sys.exit("the log does not verify")
    return {
        "turns": turns, "sent_bytes": sent, "new_bytes": new, "stored_bytes": stored,
        "growth_ratio": round(stored / new, 3), "uncompressed_growth_ratio": round((stored + saved) / new, 3),
        "request_ms_p50": ms(took), "request_ms_last": ms(took[-10:]),
    }  # fmt: skip


async def appends(db: Database, log: Log) -> dict[str, Any]:
    body = os.urandom(MESSAGE)
    data = {"stream": "stdout", "offset": 1}
    text = json.dumps(data)
    async with db.tx() as conn:
        await conn.execute(
            "CREATE TABLE raw (session text, seq bigint, type text, data jsonb, body bytea, PRIMARY KEY (session, seq))"
        )
        await conn.execute("ALTER TABLE raw ALTER COLUMN body SET STORAGE EXTERNAL")

    async def ours(fence: Fence, _: int) -> None:
        await log.append(fence, [NewEvent(type=EventType.OUTPUT, data=data, body=body)])

    async def raw(fence: Fence, n: int) -> None:
        async with db.connection() as conn:
            await conn.execute(RAW, (fence.session, n, "output", text, body), binary=True)

    async def block(write: Callable[[Fence, int], Awaitable[None]], fence: Fence, first: int) -> list[float]:
        took: list[float] = []
        for n in range(first, first + PER_ROUND):
            start = time.perf_counter()
            await write(fence, n)
            took.append(time.perf_counter() - start)
        return took

    one = await new_fence(db)
    mine: list[float] = []
    plain: list[float] = []
    await block(raw, one, 10**6)  # statements prepared, files grown
    await block(ours, one, 0)
    rates: list[tuple[float, float]] = []
    for n in range(ROUNDS):
        plain += await block(raw, one, n * PER_ROUND)
        mine += await block(ours, one, 0)
        rates.append((PER_ROUND / sum(mine[-PER_ROUND:]), PER_ROUND / sum(plain[-PER_ROUND:])))
    many = [await new_fence(db) for _ in range(WRITERS)]
    wall = {"raw": 0.0, "ours": 0.0}
    for n in range(ROUNDS // 2):
        for name, write in (("raw", raw), ("ours", ours)):
            start = time.perf_counter()
            await asyncio.gather(*(block(write, fence, n * PER_ROUND) for fence in many))
            wall[name] += time.perf_counter() - start
    total = WRITERS * PER_ROUND * (ROUNDS // 2)
    per_s, raw_per_s = (statistics.median(rate[i] for rate in rates) for i in (0, 1))
    return {
        "append_ms_p50": ms(mine), "raw_append_ms_p50": ms(plain),
        "appends_per_s": round(per_s, 1), "raw_appends_per_s": round(raw_per_s, 1),
        "append_ratio": round(per_s / raw_per_s, 3),
        "parallel_appends_per_s": round(total / wall["ours"], 1),
        "parallel_raw_appends_per_s": round(total / wall["raw"], 1),
        "parallel_append_ratio": round(wall["raw"] / wall["ours"], 3),
    }  # fmt: skip


async def measure(turns: int) -> dict[str, Any]:
    home = Path(tempfile.mkdtemp(prefix="rethaw-bench-"))
    try:
        async with EmbeddedPostgres(home / "pg") as pg, Database(pg.dsn) as db, NotifyHub(db) as hub:
            await migrate(db)
            log = Log(db, hub)
            out = await growth(db, log, turns) | await appends(db, log)
            return {"benchmark": "context_log", "postgres": pg.binaries.major if pg.binaries else None} | out
    finally:
        shutil.rmtree(home)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context_log", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--turns", type=int, default=200)
    args = parser.parse_args()
    result = asyncio.run(measure(args.turns))
    if not args.json:
        for name, value in result.items():
            sys.stdout.write(f"{name:>28}  {value}\n")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
