"""What does the gateway add? `python -m benchmarks.gateway --json`; the guest part needs root and runsc.

A provider in a process of its own answers after 500 ms, then streams a token every 20 ms; each carries the time it was
sent. 50 streams are read from it directly; then 50 go through a gateway that records them in an embedded PostgreSQL
(relaxed durability; read where the channel would take the bytes); then one agent in a sandbox of a real server makes
calls one after another, once in strict durability ("local", the default) and once in relaxed.

`ttfb_added_ms_p50`: from the request to the first body byte, less the same directly. `chunk_added_ms_p50`, `_p99`: from
the provider's write of a chunk to its arrival, less the same quantile directly. `guest_chunk_added_ms_p50`: the same as
the agent sees it, whose clock is compared with the provider's by requests that carry both. `strict_ttfb_added_ms_p50`:
as the agent sees it by its wall clock, so a pause for the snapshot counts. `log_ms_p50`: one plain append to the log in
the same run, back to back. `raw_ttfb_added_ms_p50`: the least that a durable request costs on this machine: the same 50
requests, each sent by the same HTTP client after an `INSERT` of its body as one row, by a connection that waits as the
gateway's do; `ttfb_ratio` is the gateway's part over it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from rethaw.db.embedded import EmbeddedPostgres
from rethaw.db.migrate import migrate
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.gateway import Gateway, Providers
from rethaw.log.store import Log
from rethaw.log.writer import create_session_in
from rethaw.model.enums import Durability, EventType
from rethaw.model.ids import new_id
from rethaw.model.types import AgentSpec, Fence, NewEvent
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.server import RunningServer

FIRST_BYTE_S = 0.5
CHUNK_S = 0.02
WARM_UP = 100
BODY = json.dumps(
    {"model": "bench", "stream": True, "messages": [{"role": "user", "content": "word " * 2000}]}
).encode()
PATH = "/v1/chat/completions"

AGENT = """
import http.client, json, os, time, urllib.parse

base = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])

def connect():
    return http.client.HTTPConnection(base.hostname, base.port)

def offset():
    "What to add to this clock to get the provider's, from the quickest of some requests."
    best = None
    for _ in range(40):
        c = connect()
        sent = time.time()
        c.request("GET", base.path + "/clock")
        there = float(c.getresponse().read())
        got = time.time()
        c.close()
        if best is None or got - sent < best[0]:
            best = (got - sent, there - (sent + got) / 2)
    return best[1]

def call(body):
    c = connect()
    sent = time.time()
    c.request("POST", base.path + "/chat/completions", body, {"content-type": "application/json"})
    r = c.getresponse()
    first, late = None, []
    while True:
        line = r.readline()
        now = time.time()
        if not line:
            break
        if first is None:
            first = now - sent
        if line.startswith(b"data: {"):
            late.append(now - json.loads(line[6:])["t"])
    c.close()
    return first, late

def bench(ctx, calls, body):
    call(body.encode())
    shift = offset()
    firsts, late = [], []
    for _ in range(calls):
        first, chunks = call(body.encode())
        firsts.append(first)
        late += [seconds + shift for seconds in chunks]
    return {"first": firsts, "late": late}
"""


# ---------------------------------------------------------------- the provider, a process of its own


async def provide(tokens: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                if head.startswith("get"):
                    now = b"%.6f" % time.time()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(now), now))
                    continue
                size = next(int(h.partition(":")[2]) for h in head.split("\r\n") if h.startswith("content-length"))
                await reader.readexactly(size)
                await asyncio.sleep(FIRST_BYTE_S)
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                at = asyncio.get_running_loop().time()
                for n in range(tokens):
                    token = {"t": time.time(), "choices": [{"delta": {"content": f"token {n} "}}]}
                    _chunk(writer, b"data: %b\n\n" % json.dumps(token).encode())
                    at += CHUNK_S
                    await asyncio.sleep(at - asyncio.get_running_loop().time())
                _chunk(writer, b"data: [DONE]\n\n")
                writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@contextlib.contextmanager
def provider(tokens: int) -> Any:
    """Yields its base URL."""
    command = [sys.executable, "-m", "benchmarks.gateway", "--provide", "--tokens", str(tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- direct, and the gateway alone


@dataclass
class Seen:
    """Seconds: to the first body byte of each stream, and of each chunk on its way."""

    first: list[float] = field(default_factory=list[float])
    late: list[float] = field(default_factory=list[float])

    def take(self, data: bytes) -> None:
        now = time.time()
        for line in data.split(b"\n\n"):
            at = line.find(b'{"t": ')
            if at >= 0:
                self.late.append(now - float(line[at + 6 : line.index(b",", at)]))


async def staggered(streams: int, one: Any) -> None:
    """All at once but for their beginnings, which are spread over two seconds as those of independent agents are."""

    async def later(n: int) -> None:
        await asyncio.sleep(2.0 * n / streams)
        await one(n)

    await asyncio.gather(*(later(n) for n in range(streams)))


async def direct(url: str, streams: int) -> Seen:
    seen = Seen()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def one(_: int) -> None:
            started = time.perf_counter()
            first = True
            async with http.post(url + PATH, data=BODY) as r:
                while data := await r.content.readany():
                    seen.take(data)
                    if first:
                        seen.first.append(time.perf_counter() - started)
                        first = False

        await staggered(streams, one)
    return seen


async def raw(url: str, streams: int) -> Seen:
    """As `direct`, each request after a plain durable INSERT of its body. The answers are read, not recorded."""
    seen = Seen()
    connector = aiohttp.TCPConnector(limit=0)
    async with database() as db, aiohttp.ClientSession(connector=connector) as http:
        async with db.connection() as conn:
            await conn.execute("CREATE TABLE requests (body text)")

        async def insert() -> None:
            async with db.connection() as conn:
                await conn.execute("INSERT INTO requests VALUES (%s)", (BODY.decode(),))

        for _ in range(WARM_UP):
            await insert()

        async def one(_: int) -> None:
            started = time.perf_counter()
            await insert()
            async with http.post(url + PATH, data=BODY) as r:
                await r.content.readany()
                seen.first.append(time.perf_counter() - started)
                await r.read()

        await staggered(streams, one)
    return seen


class Stream:
    """Where the gateway's bytes leave it: a GuestStream that takes everything at once."""

    kind, base, received, head_received = "exchange", 0, 0, False
    exchange: str | None = None

    def __init__(self, seen: Seen, number: int) -> None:
        self.id = number
        self.meta: dict[str, object] = {
            "provider": "openai", "method": "POST", "path": PATH, "query": "", "guest_id": "1.1",
            "headers": [["content-type", "application/json"]],
        }  # fmt: skip
        self._seen = seen
        self._started = time.perf_counter()
        self._first = True

    async def read(self) -> bytes | None:
        return None

    async def read_all(self, limit: int) -> bytes:
        return BODY

    async def accept(self, exchange: str) -> None: ...

    async def ack(self, offset: int) -> None: ...

    async def head(self, status: int, reason: str, headers: Sequence[tuple[str, str]]) -> None:
        assert status == 200

    async def write(self, data: bytes) -> None:
        self.offer(data)

    def offer(self, data: bytes) -> bool:
        self._seen.take(data)
        if self._first:
            self._seen.first.append(time.perf_counter() - self._started)
            self._first = False
        return True

    async def end(self) -> None: ...

    async def reset(self, why: str) -> None:
        raise RuntimeError(why)


class Open:
    """Gate and hooks of a relaxed session."""

    def requested(self, exchange: str) -> None: ...

    async def released(self, exchange: str) -> None: ...

    def held(self, exchange: str, until: float) -> None: ...

    def answered(self, exchange: str) -> None: ...


@contextlib.asynccontextmanager
async def database() -> AsyncIterator[Database]:
    with tempfile.TemporaryDirectory(prefix="rethaw-bench-") as home:
        Path(home).chmod(0o711)
        async with EmbeddedPostgres(Path(home) / "pg") as pg, Database(pg.dsn) as db:
            await migrate(db)
            yield db


async def alone(url: str, streams: int) -> tuple[Seen, list[float]]:
    """What `streams` streams of as many sessions see, and the milliseconds of plain appends. After a warm-up: PostgreSQL
    plans the first five calls of each function on each connection anew, 1 to 3 ms more, once in a server's life."""
    async with database() as db, NotifyHub(db) as hub:
        log = Log(db, hub)
        fences: list[Fence] = []
        for _ in range(streams + WARM_UP):
            fence = Fence(session=new_id("s"), generation="g")
            async with db.tx() as conn:
                await create_session_in(conn, fence.session)
                await conn.execute("UPDATE sessions SET generation = 'g', attempt = 1 WHERE id = %s", (fence.session,))
            fences.append(fence)
        appends: list[float] = []
        for _ in range(50):
            started = time.perf_counter()
            await log.append(fences[0], [NewEvent(type=EventType.EMITTED, data={"name": "x"})])
            appends.append((time.perf_counter() - started) * 1000)
        providers = Providers.from_config({"openai": {"base_url": url, "key": "k"}}, {})
        gateway = Gateway(log, providers, "bench")
        await gateway.start()
        seen, agent, open_ = Seen(), AgentSpec(name="bench", durability=Durability.RELAXED), Open()
        sessions = [gateway.session(f.session, agent) for f in fences]
        for session, fence in zip(sessions, fences, strict=True):
            session.attach(fence, 1, open_, open_)
            await session.restored(None)
        unseen = Seen()
        await asyncio.gather(*(session.handle(Stream(unseen, n)) for n, session in enumerate(sessions[streams:])))
        await staggered(streams, lambda n: sessions[n].handle(Stream(seen, n)))
        await gateway.close()
        return seen, appends


# ---------------------------------------------------------------- seen by an agent in its sandbox


def in_guest(url: str, calls: int, durability: Durability) -> Seen:
    settings = {"base_url": url, "key": "k", "auth": "bearer", "format": "openai"}
    with RunningServer(providers={"openai": settings}) as server:
        digest = server.request("POST", "/v1/blobs", code_archive(agent=AGENT.encode()))["digest"]
        agent = {"name": "bench", "entry": "agent.py::bench", "code": digest, "durability": durability.value}
        start = {"agent": agent, "args": {"calls": calls, "body": BODY.decode()}}
        session = server.request("POST", "/v1/sessions", start, timeout_s=300)["id"]
        for _ in range(20):
            with contextlib.suppress(TimeoutError):
                answer = server.request("GET", f"/v1/sessions/{session}/result?wait_s=25", timeout_s=60)
                if answer["state"] != "completed":
                    raise RuntimeError(f"{answer}\n{server.log_tail()}")
                return Seen(answer["result"]["first"], answer["result"]["late"])
        raise RuntimeError(f"the agent did not end\n{server.log_tail()}")


# ---------------------------------------------------------------- numbers


def p(values: Sequence[float], q: float) -> float:
    """The q-quantile in milliseconds."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] * 1000


def measure(streams: int, tokens: int, calls: int, guest: bool) -> dict[str, Any]:
    with provider(tokens) as url:
        straight = asyncio.run(direct(url, streams))
        through, appends = asyncio.run(alone(url, streams))
        least = asyncio.run(raw(url, streams))
        added = p(through.first, 0.5) - p(straight.first, 0.5)
        least_added = p(least.first, 0.5) - p(straight.first, 0.5)
        numbers: dict[str, Any] = {
            "streams": streams,
            "ttfb_added_ms_p50": round(added, 2),
            "raw_ttfb_added_ms_p50": round(least_added, 2),
            "ttfb_ratio": round(added / max(least_added, 0.01), 2),
            "chunk_added_ms_p50": round(p(through.late, 0.5) - p(straight.late, 0.5), 3),
            "chunk_added_ms_p99": round(p(through.late, 0.99) - p(straight.late, 0.99), 2),
            "direct_ttfb_ms_p50": round(p(straight.first, 0.5), 2),
            "direct_chunk_ms_p50": round(p(straight.late, 0.5), 3),
            "direct_chunk_ms_p99": round(p(straight.late, 0.99), 2),
            "log_ms_p50": round(statistics.median(appends), 2),
            "chunks": len(through.late),
        }
        if guest:
            one = asyncio.run(direct(url, 1))
            strict = in_guest(url, calls, Durability.LOCAL)
            relaxed = in_guest(url, calls, Durability.RELAXED)
            numbers |= {
                "guest_chunk_added_ms_p50": round(p(relaxed.late, 0.5) - p(one.late, 0.5), 2),
                "strict_ttfb_added_ms_p50": round(p(strict.first, 0.5) - p(one.first, 0.5), 2),
                "strict_guest_chunk_added_ms_p50": round(p(strict.late, 0.5) - p(one.late, 0.5), 2),
                "relaxed_guest_ttfb_added_ms_p50": round(p(relaxed.first, 0.5) - p(one.first, 0.5), 2),
                "guest_calls": calls,
            }
        return numbers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=150, help="chunks of each answer")
    parser.add_argument("--calls", type=int, default=12, help="of the agent in its sandbox")
    parser.add_argument("--no-guest", action="store_true", help="the gateway alone")
    parser.add_argument("--provide", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.provide:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(provide(args.tokens))
        return
    numbers = measure(args.streams, args.tokens, args.calls, guest=not args.no_guest and os.geteuid() == 0)
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>32} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
