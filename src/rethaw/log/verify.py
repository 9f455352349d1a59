"""Checking a session's log: no gap in seq, every stored hash right, every response without a hole."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field

from rethaw.db.pool import Database
from rethaw.log import content, encoding, lineage, requests
from rethaw.model.errors import NotFound, RethawError

_PAGE = 64


@dataclass
class Report:
    """What was looked at, and what is wrong (nothing, then `ok`)."""

    session: str
    events: int = 0
    exchanges: int = 0
    contents: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    problems: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        return not self.problems


async def verify_in(db: Database, session: str) -> Report:
    """Reads everything of `session`. Raises NotFound."""
    report = Report(session)
    async with db.connection() as conn:
        await lineage.parts_in(conn, session)  # a format that is not known is not called damaged
    await _events(db, report)
    await _contents(db, report)
    await _exchanges(db, report)
    return report


async def _events(db: Database, report: Report) -> None:
    async with db.tx() as conn:
        await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        row = await (
            await conn.execute(
                "SELECT last_seq, line, fork_seq, first_line FROM sessions WHERE id = %s", (report.session,)
            )
        ).fetchone()
        if row is None:
            raise NotFound(f"no session {report.session}", remedy="check the id")
        last, line, before, first_line = row
        count, low, high = await (
            await conn.execute(
                "SELECT count(*), coalesce(min(seq), %s::bigint + 1), coalesce(max(seq), %s) FROM events"
                " WHERE session = %s",
                (before, before, report.session),
            )
        ).fetchone() or (0, before + 1, before)
        lines = await (
            await conn.execute(
                "SELECT count(*), max(l.line), bool_and(l.parent IS NULL OR l.parent < l.line) FROM lines l"
                " WHERE l.session = %s",
                (report.session,),
            )
        ).fetchone()
    report.events = count
    if (low, high, count) != (before + 1, last, last - before):
        report.problems.append(f"{count} events from {low} to {high}, but the session ends at {last}")
    if lines is None or lines[0] != line - first_line + 1 or lines[1] != line or not lines[2]:
        report.problems.append(f"the lines {lines} do not lead to line {line}")
    after = 0
    while True:
        rows = await db.fetch(
            "SELECT seq, body, codec, size FROM events WHERE session = %s AND seq > %s AND body IS NOT NULL"
            " ORDER BY seq LIMIT %s",
            (report.session, after, _PAGE),
            binary=True,
        )
        if not rows:
            return
        for seq, body, codec, size in rows:
            after = seq
            try:
                encoding.unpack(body, codec, size)
            except RethawError as e:
                report.problems.append(f"event {seq}: {e}")


async def _contents(db: Database, report: Report) -> None:
    after = b""
    while True:
        rows = await db.fetch(
            "SELECT digest, data, codec, size FROM content WHERE session = %s AND digest > %s ORDER BY digest LIMIT %s",
            (report.session, after, _PAGE),
            binary=True,
        )
        if not rows:
            return

        def check(rows: list[tuple[bytes, bytes, int, int]] = rows) -> None:  # pyright: ignore[reportArgumentType]
            for digest, data, codec, size in rows:
                try:
                    right = hashlib.sha256(encoding.unpack(data, codec, size)).digest() == digest
                except RethawError:
                    right = False
                if not right:
                    report.problems.append(f"content {digest.hex()[:16]} is damaged")

        await asyncio.to_thread(check)
        report.contents += len(rows)
        after = rows[-1][0]


async def _exchanges(db: Database, report: Report) -> None:
    rows = await db.fetch(
        "SELECT x.id, x.head, x.chain, x.tail, x.request_bytes,"
        " EXISTS (SELECT 1 FROM events e WHERE e.session = x.session AND e.seq = x.seq"
        "         AND e.type = 'exchange.requested' AND e.data->>'exchange' = x.id)"
        " FROM exchanges x WHERE x.session = %s ORDER BY x.seq",
        (report.session,),
        binary=True,
    )
    report.exchanges = len(rows)
    # One walk over the segments, each hashed once: going from a chain's beginning to its end for each exchange would
    # read a conversation as often as it was sent.
    segments = await _Segments.load(db, report.session)
    for ident, head, chain, tail, size, logged in rows:
        if not logged:
            report.problems.append(f"exchange {ident} has no event")
        try:
            total = 0
            for key in (head, chain, tail):
                if key is not None:
                    total += await segments.size(bytes(key))
            if total != size:
                report.problems.append(f"the request of {ident} has {total} bytes instead of {size}")
            report.request_bytes += total
        except RethawError as e:
            report.problems.append(f"the request of {ident}: {e}")
    holes = await db.fetch(
        "SELECT c.exchange, c.epoch, c.start FROM (SELECT c.*, coalesce(lag(c.start + c.size) OVER"
        " (PARTITION BY c.exchange, c.epoch ORDER BY c.start), 0) AS expected FROM response_chunks c"
        " JOIN exchanges x ON x.id = c.exchange WHERE x.session = %s) c WHERE c.start <> c.expected",
        (report.session,),
    )
    report.problems.extend(
        f"the response of {x} (epoch {epoch}) has a hole before {start}" for x, epoch, start in holes
    )
    sizes = await db.fetch(
        "SELECT coalesce(sum(c.size), 0) FROM response_chunks c JOIN exchanges x ON x.id = c.exchange"
        " WHERE x.session = %s",
        (report.session,),
    )
    report.response_bytes = int(sizes[0][0])


class _Segments:
    """Segments of a session and its ancestors, checked on first use and remembered with their running hash."""

    def __init__(self, db: Database, sessions: list[str]) -> None:
        self._db, self._sessions = db, sessions
        self._rows: dict[bytes, tuple[bytes | None, int, bytes]] = {}
        self._checked: dict[bytes, tuple[hashlib._Hash, int]] = {}  # pyright: ignore[reportPrivateUsage]

    @classmethod
    async def load(cls, db: Database, session: str) -> _Segments:
        async with db.connection() as conn:
            out = cls(db, [part.session for part in await lineage.parts_in(conn, session)])
        rows = await db.fetch(
            "SELECT DISTINCT ON (key) key, prev, size, parts FROM segments WHERE session = ANY(%s::text[])",
            (out._sessions,),
            binary=True,
        )
        out._rows = {bytes(k): (None if p is None else bytes(p), size, bytes(parts)) for k, p, size, parts in rows}
        return out

    async def size(self, key: bytes) -> int:
        """Bytes of the expansion of `key`, whose hash is right. Raises RethawError."""
        way: list[bytes] = []
        at: bytes | None = key
        while at is not None and at not in self._checked:
            if at not in self._rows:
                raise RethawError(f"segment {at.hex()[:16]} is missing")
            way.append(at)
            at = self._rows[at][0]
        for step in reversed(way):
            await self._check(step)
        return self._checked[key][1]

    async def _check(self, key: bytes) -> None:
        prev, size, parts = self._rows[key]
        running, total = (
            (hashlib.sha256(), 0) if prev is None else (self._checked[prev][0].copy(), self._checked[prev][1])
        )
        pieces = content.unpack(parts)
        async with self._db.connection() as conn:
            stored = await requests.contents(conn, self._sessions, {p[0] for p in pieces if isinstance(p, tuple)})
        for piece in pieces:
            data = stored.get(piece[0], b"") if isinstance(piece, tuple) else piece
            running.update(data)
            total += len(data)
        if running.digest() != key or total != size:
            raise RethawError(f"segment {key.hex()[:16]} does not expand to its hash")
        self._checked[key] = running, total
