"""A guest's memory and a log in memory, for tests of the gateway alone. Provider and gateway are the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import psycopg

from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.gateway import Gateway, Providers, SessionGateway
from rethaw.log import encoding, exchanges, writer
from rethaw.log.store import Log
from rethaw.model.enums import Durability, EventType, ExchangeState
from rethaw.model.errors import ChannelBroken, Fenced, NotFound, TooLarge, Unavailable
from rethaw.model.ids import new_id
from rethaw.model.types import (
    AgentSpec,
    Chunk,
    Event,
    Exchange,
    Fence,
    NewEvent,
    RequestMeta,
    ResponseHead,
    Usage,
)  # fmt: skip
from rethaw.testing.provider import ScriptedProvider

CHAT = "/v1/chat/completions"


@dataclass
class _Row:
    x: Exchange
    body: bytes
    data: bytearray = field(default_factory=bytearray)
    chunks: list[Chunk] = field(default_factory=list)


class MemoryLog:
    """LogSink for one session, with lines. `away` makes every call raise Unavailable; `slow_s` delays writes."""

    def __init__(self, session: str = "s_1") -> None:
        self.session = session
        self.generation = "g1"
        self.line, self.attempt = 1, 1
        self.parents: dict[int, tuple[int | None, int]] = {1: (None, 0)}
        self.events: list[Event] = []
        self.rows: dict[str, _Row] = {}
        self.snapshots: dict[str, int] = {}
        self.away = False
        self.slow_s = 0.0
        self.appends = 0
        self.looked_up: list[str] = []

    # ---- what tests do

    async def snapshot(self, name: str) -> None:
        self.snapshots[name] = len(self.events)

    async def crash(self, snapshot: str | None) -> Fence:
        """A new line from `snapshot`, a new generation."""
        at = self.snapshots[snapshot] if snapshot else 0
        self.line += 1
        self.parents[self.line] = (self.line - 1, at)
        self.generation = f"g{self.line}"
        self._add(EventType.LINE_OPENED, {"line": self.line})
        return self.fence

    @property
    def fence(self) -> Fence:
        return Fence(session=self.session, generation=self.generation)

    def of(self, kind: EventType) -> list[Event]:
        return [e for e in self.events if e.type is kind]

    def kinds(self) -> list[str]:
        return [e.type.value for e in self.events]

    def close_not_written(self, exchange: str) -> None:
        """The owner died before it could close the exchange."""
        row = self.rows[exchange]
        row.x = row.x.model_copy(update={"state": ExchangeState.OPEN, "owner": "dead"})

    # ---- LogSink

    def _on_path(self, event: Event) -> bool:
        line: int | None = self.line
        limit = 1 << 60
        while line is not None:
            if event.line == line and event.seq <= limit:
                return True
            line, branch = self.parents[line]
            limit = min(limit, branch)
        return False

    def _add(self, kind: EventType, data: dict[str, Any], key: str | None = None, body: bytes | None = None) -> Event:
        if key is not None:
            for e in self.events:
                if e.key == key and self._on_path(e):
                    return e
        event = Event(session=self.session, seq=len(self.events) + 1, line=self.line, attempt=self.attempt, type=kind,
                      data=data, body=body, key=key, at=datetime.now(UTC))  # fmt: skip
        self.events.append(event)
        return event

    async def _enter(self, fence: Fence | None = None) -> None:
        self.appends += 1
        await asyncio.sleep(self.slow_s)
        if self.away:
            raise Unavailable("the log is away")
        if fence is not None and fence != self.fence:
            raise Fenced(f"{fence.generation} is not {self.generation}")

    async def append(self, fence: Fence, events: Sequence[NewEvent]) -> list[Event]:
        await self._enter(fence)
        return [self._add(e.type, e.data, e.key, e.body) for e in events]

    async def last_seq(self, session: str) -> int:
        return len(self.events)

    async def begin_exchange(
        self, fence: Fence, meta: RequestMeta, body: bytes, owner: str, *, upstream: bool = False
    ) -> Exchange:
        await self._enter(fence)
        exchange = new_id("x")
        data = {"exchange": exchange, "request_bytes": len(body)}
        event = self._add(EventType.EXCHANGE_REQUESTED, data, key=f"x:{meta.guest_id}:{meta.digest}")
        if event.data["exchange"] != exchange:
            return self.rows[event.data["exchange"]].x
        x = Exchange(id=exchange, session=self.session, attempt=self.attempt, line=self.line, seq=event.seq, meta=meta,
                     request_bytes=len(body), state=ExchangeState.OPEN, epoch=1, owner=owner)  # fmt: skip
        self.rows[exchange] = _Row(x, body)
        if upstream:
            sent = {"exchange": exchange, "epoch": 1, "try": 1}
            self._add(EventType.EXCHANGE_UPSTREAM, sent, key=f"exchange.upstream:{exchange}:1:1")
        return x

    async def adopt_exchange(self, fence: Fence, exchange: str, guest_id: str, how: str) -> Exchange:
        await self._enter(fence)
        self._add(EventType.EXCHANGE_ADOPTED, {"exchange": exchange, "how": how, "guest_id": guest_id})
        return self.rows[exchange].x

    async def take_over(self, fence: Fence, exchange: str, owner: str, event: NewEvent | None = None) -> Exchange:
        await self._enter(fence)
        row = self.rows[exchange]
        row.data.clear()
        row.chunks.clear()
        row.x = row.x.model_copy(update={"epoch": row.x.epoch + 1, "owner": owner, "head": None, "received": 0})
        if event:
            self._add(event.type, event.data, event.key)
        return row.x

    def _epoch(self, exchange: str, epoch: int) -> _Row:
        if exchange not in self.rows:
            raise NotFound(exchange)
        row = self.rows[exchange]
        if row.x.epoch != epoch:
            raise Fenced(f"epoch {epoch} is not {row.x.epoch}")
        return row

    async def append_response(
        self, exchange: str, epoch: int, head: ResponseHead | None, chunks: Sequence[Chunk]
    ) -> int:
        chunks = list(chunks)
        await self._enter()
        row = self._epoch(exchange, epoch)
        assert row.x.state is ExchangeState.OPEN, row.x.state
        if head is not None:
            row.x = row.x.model_copy(update={"head": head})
        for chunk in chunks:
            if chunk.offset == len(row.data):
                row.data += chunk.data
                row.chunks.append(chunk)
            else:
                assert chunk.offset < len(row.data)
        row.x = row.x.model_copy(update={"received": len(row.data)})
        return len(row.data)

    async def finish_exchange(
        self, exchange: str, epoch: int, state: ExchangeState, usage: Usage | None, event: NewEvent
    ) -> Exchange:
        await self._enter()
        row = self._epoch(exchange, epoch)
        row.x = row.x.model_copy(update={"state": state, "usage": usage, "owner": None})
        self._add(event.type, event.data, event.key)
        return row.x

    async def orphan_exchange(self, fence: Fence, exchange: str) -> None:
        await self._enter(fence)
        row = self.rows[exchange]
        row.x = row.x.model_copy(update={"state": ExchangeState.ORPHANED})
        self._add(EventType.EXCHANGE_ORPHANED, {"exchange": exchange})

    async def exchange(self, exchange: str) -> Exchange:
        self.looked_up.append(exchange)
        await self._enter()
        if exchange not in self.rows:
            raise NotFound(f"no exchange {exchange}")
        return self.rows[exchange].x

    async def read_response(self, exchange: str, offset: int = 0, limit: int = 1 << 20) -> list[Chunk]:
        data = bytes(self.rows[exchange].data)
        return [Chunk(offset=offset, data=data[offset : offset + limit], at_us=0)] if offset < len(data) else []

    async def read_request(self, exchange: str) -> bytes:
        return self.rows[exchange].body

    async def tail(self, fence: Fence, snapshot: str | None) -> list[Exchange]:
        await self._enter(fence)
        at = self.snapshots[snapshot] if snapshot else 0
        asked = {
            e.data["exchange"] for e in self.events
            if e.type in (EventType.EXCHANGE_REQUESTED, EventType.EXCHANGE_ADOPTED) and e.seq <= at and self._on_path(e)
        }  # fmt: skip
        gone = (ExchangeState.ORPHANED, ExchangeState.TORN)
        return [r.x for r in self.rows.values() if r.x.id not in asked and r.x.state not in gone]

    async def read(
        self, session: str, after: int = 0, limit: int = 1000, types: Sequence[EventType] | None = None
    ) -> list[Event]:
        fits = (e for e in self.events if e.seq > after and self._on_path(e) and (types is None or e.type in types))
        return list(fits)[:limit]

    async def follow(self, session: str, after: int = 0, *, path_only: bool = True) -> AsyncIterator[Event]:
        while True:
            for event in self.events[after:]:
                yield event
            after = len(self.events)
            await asyncio.sleep(0.01)


class PostgresLog(Log):
    """The real log, with the same handles for tests. Reads of tests go over a connection of their own, synchronously."""

    def __init__(self, db: Database, hub: NotifyHub) -> None:
        super().__init__(db, hub)
        self.session = new_id("s")
        self.generation = "g1"
        self.sync = psycopg.connect(db.dsn, autocommit=True)

    @classmethod
    async def begin(cls, db: Database, hub: NotifyHub) -> PostgresLog:
        log = cls(db, hub)
        async with db.tx() as conn:
            await writer.create_session_in(conn, log.session)
        log._fence("g1")
        return log

    def _fence(self, generation: str) -> Fence:
        self.generation = generation
        self.sync.execute("UPDATE sessions SET generation = %s, attempt = 1 WHERE id = %s", (generation, self.session))
        return self.fence

    @property
    def fence(self) -> Fence:
        return Fence(session=self.session, generation=self.generation)

    async def snapshot(self, name: str) -> None:
        data = {"snapshot": name, "seq": await self.last_seq(self.session)}
        await self.append(self.fence, [NewEvent(type=EventType.SNAPSHOT_CREATED, data=data)])

    async def crash(self, snapshot: str | None) -> Fence:
        seq = 0
        for event in self.of(EventType.SNAPSHOT_CREATED):
            seq = event.data["seq"] if event.data["snapshot"] == snapshot else seq
        async with self.db.tx() as conn:
            await writer.open_line_in(conn, self.session, seq, "crash", snapshot)
        return self._fence(self.generation + "'")

    def of(self, kind: EventType) -> list[Any]:
        rows = self.sync.execute(
            "SELECT data FROM events WHERE session = %s AND type = %s ORDER BY seq", (self.session, kind.value)
        )
        return [SimpleNamespace(type=kind, data=row[0]) for row in rows]

    def kinds(self) -> list[str]:
        rows = self.sync.execute("SELECT type FROM events WHERE session = %s ORDER BY seq", (self.session,))
        return [row[0] for row in rows]

    @property
    def rows(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for row in self.sync.execute(
            f"SELECT {exchanges.COLUMNS} FROM exchange_rows WHERE session = %s", (self.session,)
        ).fetchall():
            x = exchanges.exchange_of(row)
            data = bytearray()
            for start, size, codec, stored in self.sync.execute(
                "SELECT start, size, codec, data FROM response_chunks WHERE exchange = %s AND epoch = %s ORDER BY start",
                (x.id, x.epoch),
            ).fetchall():
                assert start == len(data)
                data += encoding.unpack(stored, codec, size)
            out[x.id] = SimpleNamespace(x=x, data=data)
        return out

    def close_not_written(self, exchange: str) -> None:
        self.sync.execute("UPDATE exchange_state SET state = 'open', owner = 'dead' WHERE id = %s", (exchange,))


@dataclass
class Call:
    """One request in guest memory, and what is there of its answer."""

    meta: dict[str, object]
    body: bytes
    exchange: str | None = None
    head: tuple[int, str, tuple[tuple[str, str], ...]] | None = None
    data: bytes = b""
    ended: bool = False
    broken: str | None = None

    def copy(self) -> Call:
        """As a snapshot has it."""
        return Call(self.meta, self.body, self.exchange, self.head, self.data, self.ended, self.broken)

    @property
    def status(self) -> int | None:
        return self.head[0] if self.head else None


class FakeStream:
    """GuestStream over a Call."""

    kind = "exchange"
    base = 0

    def __init__(self, call: Call, number: int = 1) -> None:
        self.id = number
        self.call = call
        self.meta = call.meta
        self.exchange = call.exchange
        self.received = len(call.data)
        self.head_received = call.head is not None
        self.hung_up = False
        self.taken = 0
        self.dead = False
        self.credit = asyncio.Event()
        self.credit.set()

    def _alive(self) -> None:
        if self.dead:
            raise ChannelBroken("frozen")

    async def read(self) -> bytes | None:
        return None

    async def read_all(self, limit: int) -> bytes:
        if len(self.call.body) > limit:
            raise TooLarge(f"the body is over {limit} bytes")
        await asyncio.sleep(0)
        return self.call.body

    async def accept(self, exchange: str) -> None:
        self._alive()
        self.call.exchange = self.exchange = exchange

    async def ack(self, offset: int) -> None: ...

    async def head(self, status: int, reason: str, headers: Sequence[tuple[str, str]]) -> None:
        self._alive()
        assert self.call.head is None
        self.call.head = (status, reason, tuple(headers))

    async def write(self, data: bytes) -> None:
        await self.credit.wait()
        self._alive()
        assert self.call.head is not None and not self.call.ended
        self.call.data += data

    def offer(self, data: bytes) -> bool:
        if self.dead or not self.credit.is_set():
            return False
        assert self.call.head is not None and not self.call.ended
        self.call.data += data
        return True

    async def end(self) -> None:
        self._alive()
        self.call.ended = True

    async def reset(self, why: str) -> None:
        self._alive()
        self.call.broken = why


class Gate:
    """A saver that releases when told, or at once."""

    def __init__(self, open_: bool = True) -> None:
        self.asked: list[str] = []
        self.open = asyncio.Event()
        if open_:
            self.open.set()

    def requested(self, exchange: str) -> None:
        self.asked.append(exchange)

    async def released(self, exchange: str) -> None:
        assert exchange in self.asked
        await self.open.wait()


class Hooks:
    def __init__(self) -> None:
        self.holds: list[tuple[str, float]] = []
        self.answers: list[str] = []

    def held(self, exchange: str, until: float) -> None:
        self.holds.append((exchange, until))

    def answered(self, exchange: str) -> None:
        self.answers.append(exchange)


@dataclass
class Rig:
    """A gateway with one session, a scripted provider behind it, and guest calls in front."""

    log: Any
    provider: ScriptedProvider
    gateway: Gateway
    session: SessionGateway
    agent: AgentSpec
    owner: str
    gate: Gate = field(default_factory=Gate)
    hooks: Hooks = field(default_factory=Hooks)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    streams: dict[int, FakeStream] = field(default_factory=dict)
    counter: int = 0

    def call(self, body: bytes, *, path: str = CHAT, provider: str = "openai", method: str = "POST", query: str = "",
             headers: Sequence[tuple[str, str]] = (("Content-Type", "application/json"),)) -> Call:  # fmt: skip
        """A new request in guest memory, not served yet."""
        self.counter += 1
        meta: dict[str, object] = {"provider": provider, "method": method, "path": path, "query": query,
                                   "headers": [list(h) for h in headers], "guest_id": f"1.{self.counter}"}  # fmt: skip
        return Call(meta, body)

    def serve(self, *calls: Call) -> None:
        """Hand the calls' streams over, as after a go()."""
        for call in calls:
            stream = self.streams[id(call)] = FakeStream(call)
            self.tasks[id(call)] = asyncio.create_task(self.session.handle(stream))

    async def ask(self, body: bytes, **kw: Any) -> Call:
        call = self.call(body, **kw)
        self.serve(call)
        await self.done(call)
        return call

    async def done(self, *calls: Call, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(self.tasks[id(c)] for c in calls))

    async def hang_up(self, call: Call, taken: int = 0) -> None:
        """`taken`: bytes of the answer that the client had read."""
        stream = self.streams[id(call)]
        stream.dead = stream.hung_up = True
        stream.taken = taken
        await self._cancel(call)

    async def _cancel(self, call: Call) -> None:
        task = self.tasks.pop(id(call))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def quiesce(self, *calls: Call) -> None:
        async with self.session.settled():
            for call in calls:
                if id(call) in self.tasks:
                    await self._cancel(call)
                    self.streams[id(call)].dead = True
            await self.session.flush()

    def go(self, *calls: Call, left: Mapping[str, int] | None = None) -> None:
        self.session.hello([c.exchange for c in calls if c.exchange], left or {})
        self.serve(*calls)

    async def snapshot(self, name: str, *calls: Call) -> list[Call]:
        """Quiesce, remember, go on. Returns guest memory as the snapshot has it."""
        await self.quiesce(*calls)
        copies = [c.copy() for c in calls]
        await self.log.snapshot(name)
        self.counters = self.counter
        self.go(*(c for c in calls if not c.ended and c.broken is None))
        return copies

    async def restore(
        self, snapshot: str | None, *calls: Call, node_died: bool = False, left: Mapping[str, int] | None = None
    ) -> None:
        """The sandbox died (with its node, maybe); `calls` and `left` is guest memory in the snapshot."""
        for task in list(self.tasks.values()):
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        for stream in self.streams.values():
            stream.dead = True
        self.tasks.clear()
        self.streams.clear()
        if node_died:
            await kill(self.gateway)
            self.owner += "'"
            self.gateway = Gateway(self.log, providers(self.provider), self.owner, batch_ms=5)
            await self.gateway.start()
            self.session = self.gateway.session(self.log.session, self.agent)
        else:
            await self.session.detach()
        fence = await self.log.crash(snapshot)
        self.counter = self.counters
        self.gate, self.hooks = Gate(), Hooks()
        self.session.attach(fence, 1, self.gate, self.hooks)
        await self.session.restored(snapshot)
        self.go(*calls, left=left)

    counters: int = 0

    async def until(self, condition: Any, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.002)

    def events(self, *kinds: EventType) -> list[str]:
        return [k for k in self.log.kinds() if k in kinds]

    def upstream_tries(self) -> int:
        return len(self.log.of(EventType.EXCHANGE_UPSTREAM))


async def kill(gateway: Gateway) -> None:
    """As if the process had died: nothing more is written."""
    shared = gateway._shared  # pyright: ignore[reportPrivateUsage]
    shared.batcher._dirty.clear()
    for task in [*shared.tasks, shared.batcher._task]:
        task.cancel()
    await asyncio.gather(*shared.tasks, return_exceptions=True)
    await shared.upstream.close()


def providers(provider: ScriptedProvider) -> Providers:
    return Providers.from_config(
        {
            "openai": {"base_url": provider.openai_url, "key": "sk-real"},
            "anthropic": {"base_url": provider.anthropic_url, "key": "ak-real"},
            "keyless": {"base_url": provider.url, "key_env": "NO_SUCH_KEY", "format": "openai"},
            "raw": {"base_url": provider.url, "auth": "none"},
        },
        {},
    )


async def make_rig(provider: ScriptedProvider, log: Any = None, **agent: Any) -> Rig:
    log = log or MemoryLog()
    spec = AgentSpec(name="a", **{"hold_max_s": 0.0, **agent})
    window = 5.0
    gateway = Gateway(log, providers(provider), "node-1", adopt_window_s=window, batch_ms=5)
    await gateway.start()
    session = gateway.session(log.session, spec)
    rig = Rig(log, provider, gateway, session, spec, "node-1")
    session.attach(log.fence, 1, rig.gate, rig.hooks)
    await session.restored(None)
    return rig


__all__ = ["CHAT", "Call", "Durability", "Gate", "MemoryLog", "Rig", "kill", "make_rig", "providers"]
