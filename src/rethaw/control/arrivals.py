"""What waits of several parts wait for: whether and when each part came, and which of them counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from rethaw.control import lineage, rows
from rethaw.control.rows import Conn, Row
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.types import WaitPart, WaitSpec

MOST = 1000  # parts of one wait
KINDS = ("any", "all")


@dataclass(frozen=True)
class Arrival:
    """Part `index` came `at`, by the database's clock."""

    at: datetime
    index: int
    kind: str
    number: int | None = None
    item: str | None = None
    name: str | None = None
    payload: bytes | None = None
    outcome: dict[str, Any] | None = None
    used: bool = False  # a signal that a wait of its own has taken already


@dataclass(frozen=True)
class Plan:
    """The parts of a wait, their deadlines (of timers) and its own, `until`; as kept in its row."""

    parts: tuple[WaitPart, ...]
    deadlines: tuple[datetime | None, ...]
    until: datetime | None

    @property
    def next(self) -> datetime | None:
        """When time alone may complete it."""
        return min((at for at in (*self.deadlines, self.until) if at is not None), default=None)

    @property
    def children(self) -> list[str]:
        return [part.name for part in self.parts if part.kind == "child" and part.name is not None]

    def dump(self) -> str:
        return json.dumps(
            {
                "parts": [part.model_dump() for part in self.parts],
                "deadlines": [None if at is None else at.isoformat() for at in self.deadlines],
                "until": None if self.until is None else self.until.isoformat(),
            }
        )


def plan_of(text: str) -> Plan:
    """From a wait's row."""
    found = json.loads(text)
    parts = tuple(WaitPart.model_validate(part) for part in found["parts"])
    return Plan(parts, tuple(_time(at) for at in found["deadlines"]), _time(found["until"]))


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


async def plan(conn: Conn, spec: WaitSpec) -> Plan:
    """The deadlines of a wait that begins now."""
    found = await rows.one(conn, "SELECT now() AS now")
    assert found is not None
    now: datetime = found["now"]
    timers = [part.timeout_s if part.kind == "timer" else None for part in spec.parts]
    return Plan(spec.parts, tuple(_after(now, s) for s in timers), _after(now, spec.timeout_s))


def _after(now: datetime, seconds: float | None) -> datetime | None:
    return None if seconds is None else now + timedelta(seconds=seconds)


def check(spec: WaitSpec) -> None:
    """Raises InvalidInput naming what does not fit."""
    if spec.kind not in KINDS:
        if spec.parts:
            raise InvalidInput(f"wait {spec.id} of kind {spec.kind} has parts", remedy='use kind "any"')
        return
    if not 0 < len(spec.parts) <= MOST:
        raise InvalidInput(f"wait {spec.id} is for {len(spec.parts)} things", remedy=f"wait for 1 to {MOST}")
    for part in spec.parts:
        if spec.kind == "all" and part.kind != "child":
            raise InvalidInput(f"wait {spec.id} is for all of a {part.kind} and others", remedy="name children only")
        if part.kind in ("signal", "child") and not part.name:
            raise InvalidInput(f"wait {spec.id} names no {part.kind}", remedy="give name")
        if part.kind == "timer" and part.timeout_s is None:
            raise InvalidInput(f"a timer of wait {spec.id} has no time", remedy="give timeout_s")


async def check_children(conn: Conn, row: Row, spec: WaitSpec) -> None:
    """Raises NotFound for a child that is none of the session's."""
    for part in spec.parts:
        if part.kind == "child" and part.name is not None:
            await own_child(conn, row, part.name)


async def own_child(conn: Conn, row: Row, child: str) -> None:
    """Raises NotFound unless the session (or one that it was forked from) spawned `child` on its path, or its agent's
    child it is anyhow."""
    if rows.clean(child) == child:
        family = await lineage.sessions(conn, row)
        found = await rows.one(
            conn,
            """SELECT 1 AS ok FROM children WHERE child = %s AND parent = ANY(%s)
               UNION ALL
               SELECT 1 FROM events e JOIN rethaw_path(%s, %s) p
                 ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
               WHERE e.session = ANY(%s) AND e.type = 'child.spawned' AND e.data->>'child' = %s LIMIT 1""",
            (child, family, row.id, row.line, family, child),
        )
        if found is not None:
            return
    raise NotFound(f"session {row.id} has no child {child[:80]!r}", remedy="use what ctx.spawn(...) gave")


async def message(conn: Conn, row: Row, after: int) -> dict[str, Any] | None:
    """The first inbox message of the path with a number > `after`."""
    return await rows.one(
        conn,
        """SELECT i.* FROM rethaw_spans(%s, %s) w
           JOIN inbox i ON i.session = w.session AND i.seq > w.after AND i.seq <= w.upto
           WHERE i.number > %s ORDER BY i.number LIMIT 1""",
        (row.id, row.line, after),
    )


async def child(conn: Conn, index: int, child: str) -> Arrival | None:
    """The child's end. Its row stays as it is until the transaction is over: who ends it later sees this wait."""
    found = await rows.one(conn, "SELECT * FROM children WHERE child = %s FOR SHARE", (child,))
    if found is None or found["state"] != "ended":
        return None
    result = found["result"]
    return Arrival(
        found["ended_at"],
        index,
        "child",
        item=child,
        payload=None if result is None else bytes(result),
        outcome=json.loads(found["outcome"]),
    )


async def taken(conn: Conn, index: int, wait: dict[str, Any]) -> Arrival | None:
    """The signal that the wait behind a callback address has got."""
    signal = await rows.one(conn, "SELECT at FROM signals WHERE id = %s", (wait["item"],))
    if signal is None:
        return None
    payload = bytes(wait["payload"]) if wait["payload"] is not None else b"null"
    return Arrival(signal["at"], index, "signal", item=wait["item"], name=wait["name"], payload=payload, used=True)


def first(came: Sequence[Arrival], until: datetime | None, now: datetime, former: dict[str, Any]) -> Arrival | None:
    """Which of `came` completes a wait for any, if it is not over before; None: it timed out. What it was before, in a line
    that was left, it is again."""
    for one in came:
        if former["part"] == one.index and (one.kind != "signal" or former["item"] == one.item):
            return one
    best = min(came, key=lambda one: (one.at, one.index), default=None)
    if until is not None and until <= now and (best is None or until < best.at):
        return None
    return best
