"""Request bodies in the database: what is stored already, what is new, and back to the exact bytes."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rethaw.db.pool import Connection
from rethaw.log import content, encoding
from rethaw.log.content import Plan
from rethaw.model.errors import RethawError

_BODIES, _ENDS, _SESSIONS = 4, 128, 64  # remembered: bodies of a session, boundaries of a body, sessions
_LOOK = 64 * 1024  # new bytes from which asking what is stored is cheaper than sending
_LOOK_SEGMENTS = 8

_STORED = (
    "SELECT true, key FROM segments WHERE session = ANY(%s::text[]) AND key = ANY(%b::bytea[])"
    " UNION ALL SELECT false, digest FROM content WHERE session = ANY(%s::text[]) AND digest = ANY(%b::bytea[])"
)
_EXPAND = (
    "WITH RECURSIVE c AS (SELECT k AS root, s.prev, s.parts, 0 AS depth FROM unnest(%b::bytea[]) k,"
    " LATERAL (SELECT * FROM segments s WHERE s.session = ANY(%s::text[]) AND s.key = k LIMIT 1) s"
    " UNION ALL SELECT c.root, s.prev, s.parts, c.depth + 1 FROM c,"
    " LATERAL (SELECT * FROM segments s WHERE s.session = ANY(%s::text[]) AND s.key = c.prev LIMIT 1) s)"
    " SELECT root, parts FROM c ORDER BY root, depth DESC"
)


class Memory:
    """Boundaries of recently stored chains, by session: a hint that saves scanning. Segments are never deleted but with
    their whole session, so what was stored once is stored."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, list[list[tuple[int, bytes]]]] = OrderedDict()

    def known(self, session: str) -> dict[int, set[bytes]]:
        out: dict[int, set[bytes]] = {}
        for ends in self._sessions.get(session, ()):
            for end, key in ends:
                out.setdefault(end, set()).add(key)
        return out

    def stored(self, session: str, plan: Plan) -> None:
        """`plan` is committed."""
        bodies = self._sessions.setdefault(session, [])
        self._sessions.move_to_end(session)
        if plan.ends:
            bodies.append(plan.ends[-_ENDS:])
            del bodies[:-_BODIES]
        while len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)

    def forget(self, session: str) -> None:
        self._sessions.pop(session, None)


@dataclass(frozen=True)
class Columns:
    """A plan as arrays for rethaw_begin_exchange."""

    digests: list[bytes]
    sizes: list[int]
    codecs: list[int]
    contents: list[bytes]
    keys: list[bytes]
    prevs: list[bytes | None]
    totals: list[int]
    parts: list[bytes]


async def make_plan(body: bytes, known: content.Known) -> Plan:
    """`content.plan`, in a thread when the body is large."""
    if len(body) < encoding.OFF_LOOP:
        return content.plan(body, known)
    return await asyncio.to_thread(content.plan, body, known)


async def drop_stored(conn: Connection, sessions: Sequence[str], plan: Plan) -> None:
    """Take out of `plan` what the session or an ancestor has stored already, if there is enough of it to ask."""
    if plan.new_bytes < _LOOK and len(plan.segments) < _LOOK_SEGMENTS:
        return
    keys = [s.key for s in plan.segments]
    cursor = await conn.execute(_STORED, (list(sessions), keys, list(sessions), list(plan.contents)), binary=True)
    have: tuple[set[bytes], set[bytes]] = (set(), set())
    for is_segment, name in await cursor.fetchall():
        have[0 if is_segment else 1].add(bytes(name))
    plan.segments = [s for s in plan.segments if s.key not in have[0]]
    needed = {piece[0] for s in plan.segments for piece in content.unpack(s.parts) if isinstance(piece, tuple)}
    plan.contents = {d: data for d, data in plan.contents.items() if d in needed and d not in have[1]}


async def columns(plan: Plan) -> Columns:
    def pack() -> list[tuple[int, bytes]]:
        return [encoding.pack(data) for data in plan.contents.values()]

    packed = pack() if plan.new_bytes < encoding.OFF_LOOP else await asyncio.to_thread(pack)
    return Columns(
        digests=list(plan.contents),
        sizes=[len(data) for data in plan.contents.values()],
        codecs=[codec for codec, _ in packed],
        contents=[stored for _, stored in packed],
        keys=[s.key for s in plan.segments],
        prevs=[s.prev for s in plan.segments],
        totals=[s.size for s in plan.segments],
        parts=[s.parts for s in plan.segments],
    )


async def rebuild(conn: Connection, sessions: Sequence[str], keys: Sequence[bytes | None]) -> bytes:
    """The bytes of `keys` expanded, one after the other, from rows of any of `sessions`. Raises RethawError when they are not what was stored."""
    wanted = [bytes(k) for k in keys if k is not None]
    if not wanted:
        return b""
    cursor = await conn.execute(_EXPAND, (list(dict.fromkeys(wanted)), list(sessions), list(sessions)), binary=True)
    spans: dict[bytes, list[bytes | tuple[bytes, int]]] = {}
    for root, parts in await cursor.fetchall():
        spans.setdefault(bytes(root), []).extend(content.unpack(bytes(parts)))
    digests = {piece[0] for span in spans.values() for piece in span if isinstance(piece, tuple)}
    stored = await contents(conn, sessions, digests)
    return await asyncio.to_thread(_join, wanted, spans, stored)


async def contents(conn: Connection, sessions: Sequence[str], digests: Iterable[bytes]) -> dict[bytes, bytes]:
    """Contents by digest."""
    cursor = await conn.execute(
        "SELECT digest, data, codec, size FROM content WHERE session = ANY(%s::text[]) AND digest = ANY(%b::bytea[])",
        (list(sessions), list(digests)),
        binary=True,
    )
    return {bytes(d): encoding.unpack(data, codec, size) for d, data, codec, size in await cursor.fetchall()}


def _join(
    wanted: Sequence[bytes], spans: dict[bytes, list[bytes | tuple[bytes, int]]], stored: dict[bytes, bytes]
) -> bytes:
    out: list[bytes] = []
    for key in wanted:
        digest = hashlib.sha256()
        for piece in spans.get(key, ()):
            data = stored.get(piece[0], b"") if isinstance(piece, tuple) else piece
            digest.update(data)
            out.append(data)
        if digest.digest() != key:
            raise RethawError(f"a stored request is damaged: segment {key.hex()[:16]} does not expand to its hash")
    return b"".join(out)
