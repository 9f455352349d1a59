"""The context log: what `rethaw.model.ports.LogSink` promises, on PostgreSQL, and what readers need besides.

Each write is one SQL function in a transaction of its own: one round trip, one flush to disk (0001_log.sql). Each may be
repeated: events carry a key, exchanges are recognised by the guest's own id of the call, responses by offset.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Connection, Database
from rethaw.log import encoding, exchanges, requests, writer
from rethaw.log.lineage import Part, parts_in
from rethaw.log.verify import Report, verify_in
from rethaw.model import faults
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.errors import Conflict, InvalidInput, NotFound, TooLarge, Unavailable
from rethaw.model.ids import new_id
from rethaw.model.types import (
    EXCHANGE_LIMIT,
    MIB,
    Chunk,
    Event,
    Exchange,
    Fence,
    NewEvent,
    RequestMeta,
    ResponseHead,
    Usage,
)

log = logging.getLogger("rethaw.log")

RESPONSES = "rethaw_exchange"  # NOTIFY channel; the payload is the exchange's id
_PAGE_EVENTS, _PAGE_BYTES = 500, 16 * MIB  # of one query when following
_POLL_S = 0.5  # without a hub
_PARTS = 4096  # sessions whose parts are remembered
_X = exchanges.COLUMNS

_READ = """
WITH p AS MATERIALIZED (
    SELECT q.session, q.line, q.upto FROM sessions s, rethaw_path(s.id, s.line) q WHERE s.id = %(session)s
), e AS (
    SELECT e.*, NOT (rethaw_stays(e.type) OR EXISTS (
        SELECT 1 FROM p WHERE p.session = e.session AND p.line = e.line AND e.seq <= p.upto)) AS superseded
    FROM events e
    WHERE e.session = %(part)s AND e.seq > %(after)s AND e.seq <= %(upto)s
      AND (%(types)s::text[] IS NULL OR e.type = ANY(%(types)s))
), page AS (
    SELECT * FROM e WHERE %(all_lines)s OR NOT superseded ORDER BY seq LIMIT %(limit)s
)
SELECT seq, line, attempt, at, type, key, data, size, codec, body, superseded
FROM (SELECT page.*, sum(size) OVER (ORDER BY seq) - size AS before FROM page) t
WHERE before < %(budget)s ORDER BY seq
"""


class Log:
    """The log on `db`. `hub`: wakes followers at once; without one they poll, and each append notifies by itself."""

    def __init__(self, db: Database, hub: NotifyHub | None = None) -> None:
        self.db = db
        self.hub = hub
        self._memory = requests.Memory()
        self._parts: dict[str, list[Part]] = {}

    # ---- events

    async def append(self, fence: Fence, events: Sequence[NewEvent]) -> list[Event]:
        """See LogSink. An event without a key gets one that readers do not see, so that a repeat finds it."""
        if not events:
            return []
        own = secrets.token_urlsafe(9)  # 72 bits, unique within the session is enough
        keys = [f"{encoding.OWN_KEY}{own}.{i}" if e.key is None else None for i, e in enumerate(events)]
        rows = await encoding.rows(events, keys)

        async def once() -> list[Event]:
            async with self.db.connection() as conn:
                faults.point("log.append.before_commit")
                out = await writer.append_rows(
                    conn, fence.session, events, rows, generation=fence.generation, notify=self.hub is None
                )
                faults.point("log.append.after_commit")
                return out

        out = await self.db.retrying(once)
        self._tell(writer.CHANNEL, fence.session)
        return out

    async def last_seq(self, session: str) -> int:
        rows = await self.db.fetch("SELECT last_seq FROM sessions WHERE id = %s", (session,))
        if not rows:
            raise _no_session(session)
        return int(rows[0][0])

    async def read(
        self,
        session: str,
        after: int = 0,
        limit: int = 1000,
        types: Sequence[EventType] | None = None,
        all_lines: bool = False,
    ) -> list[Event]:
        """Up to `limit` events with seq > `after`, in order, bodies included. `all_lines`: those that the current path
        left out too, marked `superseded`. Raises NotFound."""
        out: list[Event] = []
        while len(out) < limit:
            page = await self._page(session, after, limit - len(out), types, all_lines)
            if not page:
                break
            out.extend(page)
            after = page[-1].seq
        return out

    async def parts(self, session: str) -> list[Part]:
        """The stretches that the log of `session` consists of: those of its ancestors, then its own. Raises NotFound."""
        known = self._parts.get(session)
        if known is None:

            async def once() -> list[Part]:
                async with self.db.connection() as conn:
                    return await parts_in(conn, session)

            known = await self.db.retrying(once)
            if not known:
                raise _no_session(session)
            if len(self._parts) >= _PARTS:
                self._parts.clear()
            self._parts[session] = known
        return known

    async def _page(
        self, session: str, after: int, limit: int, types: Sequence[EventType] | None, all_lines: bool
    ) -> list[Event]:
        """Fewer than `limit` when their bodies are large; empty at the end only."""
        for part in await self.parts(session):
            if after < part.upto:
                page = await self._page_of(part, session, after, limit, types, all_lines)
                if page:
                    return page
        await self.last_seq(session)
        return []

    async def _page_of(
        self, part: Part, session: str, after: int, limit: int, types: Sequence[EventType] | None, all_lines: bool
    ) -> list[Event]:
        params: dict[str, Any] = {
            "session": session, "part": part.session, "after": max(after, part.after), "upto": part.upto,
            "limit": min(limit, _PAGE_EVENTS), "all_lines": all_lines,
            "types": None if types is None else [t.value for t in types], "budget": _PAGE_BYTES,
        }  # fmt: skip

        async def once() -> list[Event]:
            async with self.db.connection() as conn:
                cursor = await conn.execute(_READ, params, binary=True)
                rows = await cursor.fetchall()
            return [writer.event_of(part.session, row[:10], superseded=row[10]) for row in rows]

        return await self.db.retrying(once)

    async def follow(self, session: str, after: int = 0, *, path_only: bool = True) -> AsyncIterator[Event]:
        """Events with seq > `after`, for ever. `path_only`: an event is given when it is on the path at the time it is
        read. Raises NotFound for an unknown session, and when the session is erased."""
        hub = self.hub or NotifyHub(self.db, poll_s=_POLL_S)
        with hub.subscribe(writer.CHANNEL, session) as news:
            while True:
                try:
                    page = await self._page(session, after, _PAGE_EVENTS, None, not path_only)
                except Unavailable as e:
                    log.warning("following %s goes on when the database is back: %s", session, e)
                    continue
                for event in page:
                    yield event
                    after = event.seq
                if not page:
                    await news.wait()

    # ---- exchanges

    async def begin_exchange(
        self, fence: Fence, meta: RequestMeta, body: bytes, owner: str, *, upstream: bool = False
    ) -> Exchange:
        """See LogSink. A call that the path holds already (same guest id and digest) is returned as it is."""
        if len(body) > EXCHANGE_LIMIT:
            raise TooLarge(f"a request of {len(body)} bytes", remedy=f"the limit is {EXCHANGE_LIMIT}")
        ident = new_id("x")
        key = encoding.exchange_key(meta.guest_id, meta.digest) if meta.guest_id else f"{encoding.OWN_KEY}x:{ident}"
        data: dict[str, Any] = {
            "exchange": ident, "provider": meta.provider, "method": meta.method, "path": meta.path,
            "request_bytes": len(body), "guest_id": meta.guest_id,
        }  # fmt: skip
        if meta.model is not None:
            data["model"] = meta.model
        first: tuple[str, str] | tuple[None, None] = (None, None)
        if upstream:
            sent = encoding.dump_data({"exchange": ident, "epoch": 1, "try": 1})
            first = (sent, f"{EventType.EXCHANGE_UPSTREAM.value}:{ident}:1:1")
        sessions = [part.session for part in await self.parts(fence.session)]
        plan = await requests.make_plan(body, self._known(sessions))
        encoded: list[requests.Columns] = []

        async def once() -> Exchange:
            async with self.db.connection() as conn:
                if not encoded:
                    await requests.drop_stored(conn, sessions, plan)
                    encoded.append(await requests.columns(plan))
                c = encoded[0]
                faults.point("log.exchange.before_commit")
                row = await _one(
                    conn,
                    f"SELECT {_X} FROM rethaw_begin_exchange(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s,"
                    " %b::bytea[], %b::int[], %b::smallint[], %b::bytea[],"
                    " %b::bytea[], %b::bytea[], %b::bigint[], %b::bytea[], %s, %s)",
                    (fence.session, fence.generation, ident, key, exchanges.dump(meta), encoding.dump_data(data), owner,
                     len(body), plan.head, plan.chain, plan.tail, c.digests, c.sizes, c.codecs, c.contents,
                     c.keys, c.prevs, c.totals, c.parts, *first),
                )  # fmt: skip
                faults.point("log.exchange.after_commit")
                return exchanges.exchange_of(row)

        out = await self.db.retrying(once)
        if out.id == ident:
            self._memory.stored(fence.session, plan)
        self._tell(writer.CHANNEL, fence.session)
        return out

    async def adopt_exchange(self, fence: Fence, exchange: str, guest_id: str, how: str) -> Exchange:
        """See LogSink. Once for each guest id on a path."""
        data = encoding.dump_data({"exchange": exchange, "guest_id": guest_id, "how": how})
        out = await self._change(
            fence.session,
            f"SELECT {_X} FROM rethaw_adopt_exchange(%s, %s, %s, %s, %s)",
            (exchange, fence.session, fence.generation, data, f"{encoding.OWN_KEY}adopt:{exchange}:{guest_id}"),
        )
        return out

    async def take_over(self, fence: Fence, exchange: str, owner: str, event: NewEvent | None = None) -> Exchange:
        """See LogSink. Raises Conflict when the exchange is not OPEN."""
        seen = (await self.exchange(exchange)).epoch
        change = await self._event_columns(event, f"{encoding.OWN_KEY}take:{exchange}:{seen + 1}")
        return await self._change(
            fence.session,
            f"SELECT {_X} FROM rethaw_take_over(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (exchange, fence.session, fence.generation, seen, owner, *change),
        )

    async def finish_exchange(
        self, exchange: str, epoch: int, state: ExchangeState, usage: Usage | None, event: NewEvent
    ) -> Exchange:
        """See LogSink. An ORPHANED exchange keeps its state and gets usage and event. Raises Conflict when the exchange
        ended in another state."""
        if state in (ExchangeState.OPEN, ExchangeState.ORPHANED):
            raise InvalidInput(f"an exchange cannot be finished as {state.value}")
        change = await self._event_columns(event, f"{encoding.OWN_KEY}finish:{exchange}:{epoch}")
        out = await self._change(
            None,
            f"SELECT {_X} FROM rethaw_finish_exchange(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (exchange, epoch, state.value, exchanges.dump(usage), *change),
        )
        self._tell(RESPONSES, exchange)
        return out

    async def orphan_exchange(self, fence: Fence, exchange: str) -> None:
        """See LogSink. A TORN exchange stays as it is."""
        data = encoding.dump_data({"exchange": exchange})

        async def once() -> None:
            async with self.db.connection() as conn:
                faults.point("log.exchange.before_commit")
                await conn.execute(
                    "SELECT rethaw_orphan_exchange(%s, %s, %s, %s, %s)",
                    (exchange, fence.session, fence.generation, data, f"{encoding.OWN_KEY}orphan:{exchange}"),
                )
                faults.point("log.exchange.after_commit")

        await self.db.retrying(once)
        self._tell(writer.CHANNEL, fence.session)

    async def exchange(self, exchange: str) -> Exchange:
        rows = await self.db.fetch(f"SELECT {_X} FROM exchange_rows WHERE id = %s", (exchange,), binary=True)
        if not rows:
            raise _no_exchange(exchange)
        return exchanges.exchange_of(rows[0])

    async def list_exchanges(self, session: str) -> list[Exchange]:
        """Every exchange of the session's log, oldest first, of all lines and attempts, shared ones included."""
        rows = await self.db.fetch(
            f"SELECT r.* FROM rethaw_ancestry(%s) a, LATERAL (SELECT {_X} FROM exchange_rows x"
            " WHERE x.session = a.session AND x.seq <= a.upto) r ORDER BY r.seq",
            (session,),
            binary=True,
        )
        return [exchanges.exchange_of(row) for row in rows]

    async def stood(self, fence: Fence, exchange: str) -> ExchangeState | None:
        """See LogSink."""
        rows = await self.db.fetch("SELECT rethaw_stood(%s, %s)", (fence.session, exchange))
        if not rows:
            raise _no_exchange(exchange)
        return None if rows[0][0] == "own" else ExchangeState(rows[0][0])

    async def tail(self, fence: Fence, snapshot: str | None) -> list[Exchange]:
        """See LogSink."""
        await self.parts(fence.session)  # its first request need not ask
        upto = -1
        if snapshot is not None:
            rows = await self.db.fetch(
                "SELECT (data->>'seq')::bigint FROM events WHERE session = %s AND type = 'snapshot.created'"
                " AND data->>'snapshot' = %s UNION ALL SELECT branch_seq FROM lines WHERE session = %s AND snapshot = %s",
                (fence.session, snapshot, fence.session, snapshot),
            )
            if not rows:
                raise NotFound(f"no snapshot {snapshot} in the log of {fence.session}", remedy="check the id")
            upto = int(rows[0][0])
        rows = await self.db.fetch(
            f"SELECT {_X} FROM rethaw_tail(%s, %s, %s)", (fence.session, fence.generation, upto), binary=True
        )
        return [exchanges.exchange_of(row) for row in rows]

    # ---- bytes of requests and responses

    async def read_request(self, exchange: str) -> bytes:
        """See LogSink. Raises RethawError when what is stored is damaged."""

        async def once() -> bytes:
            async with self.db.connection() as conn:
                cursor = await conn.execute(
                    "SELECT session, head, chain, tail FROM exchanges WHERE id = %s", (exchange,), binary=True
                )
                row = await cursor.fetchone()
                if row is None:
                    raise _no_exchange(exchange)
                sessions = [part.session for part in await parts_in(conn, row[0])]
                return await requests.rebuild(conn, sessions, row[1:])

        return await self.db.retrying(once)

    async def append_response(
        self, exchange: str, epoch: int, head: ResponseHead | None, chunks: Sequence[Chunk]
    ) -> int:
        """See LogSink. `chunks` follow one another. Raises Conflict when they would leave a gap, or come after the
        end; TooLarge."""
        end = chunks[-1].offset + len(chunks[-1].data) if chunks else 0
        if end > EXCHANGE_LIMIT:
            raise TooLarge(f"a response of {end} bytes", remedy=f"the limit is {EXCHANGE_LIMIT}")
        state = {"batch": exchanges.batch(chunks, 0)}

        async def once() -> int:
            while True:
                b = state["batch"]
                async with self.db.connection() as conn:
                    faults.point("log.response.before_commit")
                    received, applied = await _one(
                        conn,
                        "SELECT * FROM rethaw_append_response(%s, %s, %s, %s, %s, %s, %s, %b::int[], %b::bigint[])",
                        (exchange, epoch, exchanges.dump(head), b.start, b.size, b.codec, b.data, b.lens, b.ats),
                    )
                    faults.point("log.response.after_commit")
                if applied or b.start + b.size <= received:
                    return int(received)
                if b.start > received:
                    raise Conflict(f"the log has {received} bytes of exchange {exchange}, the next start at {b.start}")
                state["batch"] = exchanges.batch(chunks, received)

        out = await self.db.retrying(once)
        self._tell(RESPONSES, exchange)
        return out

    async def read_response(self, exchange: str, offset: int = 0, limit: int = 1 << 20) -> list[Chunk]:
        """See LogSink."""
        rows = await self.db.fetch(
            "SELECT start, size, codec, data, lens, ats FROM ("
            " SELECT c.*, sum(c.size) OVER (ORDER BY c.start) - c.size AS before"
            " FROM response_chunks c JOIN exchange_state s ON s.id = c.exchange AND s.epoch = c.epoch"
            " WHERE c.exchange = %s AND c.start + c.size > %s) t WHERE before < %s ORDER BY start",
            (exchange, offset, limit),
            binary=True,
        )
        if not rows:
            await self.exchange(exchange)
        out: list[Chunk] = []
        for start, size, codec, data, lens, ats in rows:
            for chunk in exchanges.chunks_of(start, encoding.unpack(data, codec, size), lens, ats, offset):
                if out and chunk.offset - out[0].offset >= limit:
                    return out
                out.append(chunk)
        return out

    async def wait_response(self, exchange: str, received: int, timeout_s: float) -> Exchange:
        """The exchange once it has more than `received` bytes or is not OPEN any more, or as it is after `timeout_s`."""
        hub = self.hub or NotifyHub(self.db, poll_s=_POLL_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        with hub.subscribe(RESPONSES, exchange) as news:
            while True:
                now = await self.exchange(exchange)
                left = deadline - loop.time()
                if now.received > received or now.state is not ExchangeState.OPEN or left <= 0:
                    return now
                await news.wait(left)

    # ---- the whole session

    async def stats(self, session: str) -> dict[str, int]:
        """What durability did: crashes, exchanges, upstream_calls, served_from_log, tokens_not_paid_twice,
        input_tokens, output_tokens. From events and usage of all lines."""
        rows = await self.db.fetch(
            "SELECT count(*) FILTER (WHERE type = 'session.crashed'),"
            " count(*) FILTER (WHERE type = 'exchange.requested'), count(*) FILTER (WHERE type = 'exchange.upstream'),"
            " count(*) FILTER (WHERE type = 'exchange.served'),"
            " coalesce(sum(CASE WHEN type = 'exchange.served' AND jsonb_typeof(data->'tokens') = 'number'"
            " THEN (data->>'tokens')::numeric END), 0)::bigint,"
            " (SELECT coalesce(sum((s.usage::jsonb->>'input_tokens')::bigint), 0)::bigint FROM exchange_state s"
            "  JOIN exchanges x USING (id) WHERE x.session = %s),"
            " (SELECT coalesce(sum((s.usage::jsonb->>'output_tokens')::bigint), 0)::bigint FROM exchange_state s"
            "  JOIN exchanges x USING (id) WHERE x.session = %s)"
            " FROM events WHERE session = %s AND type IN"
            " ('session.crashed', 'exchange.requested', 'exchange.upstream', 'exchange.served')",
            (session, session, session),
        )
        names = ("crashes", "exchanges", "upstream_calls", "served_from_log", "tokens_not_paid_twice",
                 "input_tokens", "output_tokens")  # fmt: skip
        return dict(zip(names, map(int, rows[0]), strict=True))

    async def erase(self, session: str) -> None:
        """Erase the whole session, for good; a tombstone stays. Raises NotFound."""

        async def once(conn: Connection) -> None:
            await writer.erase_in(conn, session)

        self._memory.forget(session)
        self._parts.pop(session, None)
        await self.db.run(once)
        self._tell(writer.CHANNEL, session)

    async def erased(self, session: str) -> bool:
        """Whether the session has a tombstone."""
        return bool(await self.db.fetch("SELECT 1 FROM erasures WHERE session = %s", (session,)))

    async def verify(self, session: str) -> Report:
        """Check that seq has no gap and that every stored hash is right. Reads the whole session. Raises NotFound."""
        return await self.db.retrying(lambda: verify_in(self.db, session))

    # ---- inner

    def _known(self, sessions: Sequence[str]) -> dict[int, set[bytes]]:
        out: dict[int, set[bytes]] = {}
        for session in sessions:
            for end, keys in self._memory.known(session).items():
                out.setdefault(end, set()).update(keys)
        return out

    def _tell(self, channel: str, key: str) -> None:
        if self.hub is not None:
            self.hub.publish(channel, key)

    async def _event_columns(self, event: NewEvent | None, key: str) -> tuple[Any, ...]:
        """type, data, key, size, codec, body of one event; NULLs for none."""
        if event is None:
            return (None,) * 6
        rows = await encoding.rows([event], [key if event.key is None else None])
        return rows.types[0], rows.datas[0], rows.keys[0], rows.sizes[0], rows.codecs[0], rows.bodies[0]

    async def _change(self, session: str | None, query: str, params: tuple[Any, ...]) -> Exchange:
        async def once() -> Exchange:
            async with self.db.connection() as conn:
                faults.point("log.exchange.before_commit")
                row = await _one(conn, query, params)
                faults.point("log.exchange.after_commit")
                return exchanges.exchange_of(row)

        out = await self.db.retrying(once)
        self._tell(writer.CHANNEL, session or out.session)
        return out


async def _one(conn: Connection, query: str, params: tuple[Any, ...]) -> tuple[Any, ...]:
    cursor = await conn.execute(query.encode(), params, binary=True)
    row = await cursor.fetchone()
    assert row is not None, query
    return row


def _no_session(session: str) -> NotFound:
    return NotFound(f"no session {session}", remedy="check the id")


def _no_exchange(exchange: str) -> NotFound:
    return NotFound(f"no exchange {exchange}", remedy="check the id")
