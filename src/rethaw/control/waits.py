"""Waits of a session's guest: inbox, signal, timer, several things at once. Rows and events.

A wait belongs to the line that opened it. After a crash it is as it was at the snapshot; repeated with the same id and
the same arguments it keeps its first deadline and gets what it got before, unless the path gave that to another."""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import datetime
from typing import Any

from rethaw.control import arrivals, rows, wakeups
from rethaw.control.policy import Policy
from rethaw.control.recovery import resume
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import EventType, State
from rethaw.model.errors import Conflict, InvalidInput, NotFound
from rethaw.model.types import Fence, NewEvent, WaitSpec, WaitState

_ON_ITS_WAY_S = 2.0  # an outcome told to the node this shortly before it froze the guest may not have got there
_FIND = "SELECT * FROM waits WHERE session = %s AND attempt = %s AND id = %s"


class Addresses:
    """Callback addresses. A token is an HMAC of the wait, so the same wait has the same address after a restart, and
    the database holds its hash only: who reads the database cannot answer in a person's place."""

    def __init__(self, public_url: str, secret: bytes) -> None:
        self._base = public_url.rstrip("/")
        self._secret = secret

    def token(self, session: str, attempt: int, wait: str) -> str:
        return hmac.new(self._secret, f"{session}\0{attempt}\0{wait}".encode(), hashlib.sha256).hexdigest()

    def url(self, token: str) -> str:
        return f"{self._base}/v1/callbacks/{token}"

    @staticmethod
    def hash(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()


async def find(conn: Conn, session: str, attempt: int, wait: str) -> dict[str, Any] | None:
    return await rows.one(conn, _FIND, (session, attempt, wait))


async def open_wait(conn: Conn, row: Row, attempt: int, spec: WaitSpec, addresses: Addresses) -> WaitState:
    """Open or repeat a wait of the locked row's current attempt."""
    if attempt != row.attempt:
        raise Conflict(f"attempt {attempt} of session {row.id} is over", remedy=f"its current one is {row.attempt}")
    _check(spec)
    found = await _find(conn, row, attempt, spec.id)
    if found is not None and found["state"] == "done" and _same(found, spec):
        await _given(conn, row, found)
        return _state(row.id, found, addresses)
    if found is not None and not _same(found, spec):
        if found["state"] == "open":
            await _cancel(conn, row, found, "opened with other arguments")
        new: dict[str, Any] = {"state": "stale", "deadline": None, "opened_at": None, "parts": None, "part": None}
        found = {**found, **new, "item": _kept_item(found, spec)}
    if found is None or found["state"] in ("stale", "cancelled"):
        await arrivals.check_children(conn, row, spec)
        found = await _open(conn, row, attempt, spec, found)
    if spec.kind == "signal" and found["state"] == "open":
        await conn.execute(
            """INSERT INTO callbacks (hash, session, attempt, wait) VALUES (%s, %s, %s, %s)
               ON CONFLICT (hash) DO NOTHING""",
            (addresses.hash(addresses.token(row.id, attempt, spec.id)), row.id, attempt, spec.id),
        )
    if await _try(conn, row, found):
        found = await find(conn, row.id, attempt, spec.id)
        assert found is not None
        await _given(conn, row, found)
    return _state(row.id, found, addresses)


_GIVEN = """
UPDATE waits w SET given_at = clock_timestamp() FROM sessions s
WHERE w.session = %s AND w.attempt = %s AND w.id = %s AND w.state = 'done'
  AND w.given_at IS NULL AND s.id = w.session AND s.generation = %s"""
_LOOK = """
SELECT s.generation AS life, w.* FROM sessions s
LEFT JOIN waits w ON w.session = s.id AND w.attempt = %(attempt)s AND w.id = %(wait)s WHERE s.id = %(session)s"""


async def look(conn: Conn, fence: Fence, attempt: int, wait: str, addresses: Addresses) -> WaitState:
    """The wait as it stands, by one statement. Raises Fenced, NotFound, and Conflict when it was cancelled."""
    values = {"session": fence.session, "generation": fence.generation, "attempt": attempt, "wait": wait}
    found = await rows.one(conn, _LOOK, values)
    if found is None:
        raise rows.unknown(fence.session)
    if found["life"] != fence.generation:
        raise rows.outlived(fence)
    if found["id"] is None:
        raise NotFound(f"session {fence.session} has no wait {attempt}/{wait}", remedy="open it first")
    if found["state"] in ("cancelled", "stale"):
        raise Conflict(f"wait {wait} of session {fence.session} is {found['state']}", remedy="open it again")
    return _state(fence.session, found, addresses)


async def given(conn: Conn, fence: Fence, attempt: int, wait: str) -> None:
    """Its guest is being told that it is done. Written late, or never, it is only taken for unheard for longer."""
    await conn.execute(_GIVEN, (fence.session, attempt, wait, fence.generation))


async def cancel(conn: Conn, row: Row, attempt: int, wait: str) -> None:
    """The guest does not want it any more. What is done stays done."""
    found = await find(conn, row.id, attempt, wait)
    if found is not None and found["state"] == "open":
        await _cancel(conn, row, found, "by the agent")
    elif found is not None and found["state"] == "done":
        await _given(conn, row, found)


_COLUMNS = """session, attempt, id, kind, name, after, timeout_s, state, opened_at, deadline, opened_line, opened_seq,
    done_line, done_seq, timed_out, number, item, payload, parts, children, part, outcome"""
_INHERIT = f"""
WITH p AS MATERIALIZED (SELECT q.* FROM sessions s, rethaw_path(s.id, s.line) q WHERE s.id = %(first)s),
w AS (
    SELECT DISTINCT ON (w.id) w.*, w.state IN ('done', 'cancelled') AND w.done_seq <= a.upto
           AND EXISTS (SELECT 1 FROM p d WHERE d.line = w.done_line AND w.done_seq <= d.upto) AS over
    FROM rethaw_ancestry(%(first)s) a
    JOIN waits w ON w.session = a.session AND w.attempt = %(attempt)s AND w.opened_seq <= a.upto
    JOIN p ON p.line = w.opened_line AND w.opened_seq <= p.upto
    WHERE a.depth > 0 AND (%(wait)s::text IS NULL OR w.id = %(wait)s)
    ORDER BY w.id, a.depth
)
INSERT INTO waits ({_COLUMNS})
SELECT f, w.attempt, w.id, w.kind, w.name, w.after, w.timeout_s, CASE WHEN over THEN w.state ELSE 'open' END, w.opened_at,
       w.deadline, w.opened_line, w.opened_seq, CASE WHEN over THEN w.done_line END, CASE WHEN over THEN w.done_seq END,
       over AND w.timed_out, CASE WHEN over THEN w.number END, CASE WHEN over THEN w.item END,
       CASE WHEN over THEN w.payload END, w.parts, w.children, CASE WHEN over THEN w.part END,
       CASE WHEN over THEN w.outcome END
FROM unnest(%(forks)s::text[]) f, w WHERE %(wait)s::text IS NOT NULL OR NOT over
ON CONFLICT DO NOTHING"""


async def inherit(conn: Conn, forks: list[str], attempt: int, wait: str | None = None) -> bool:
    """Give `forks` (of one parent at one position) the waits that their ancestors had there: the open ones, or `wait`
    alone, whatever became of it. Whether there were any. Each keeps its first deadline."""
    values = {"first": forks[0], "forks": forks, "attempt": attempt, "wait": wait}
    return (await conn.execute(_INHERIT, values)).rowcount > 0


async def settle(conn: Conn, row: Row, policy: Policy) -> None:
    """Complete every open wait of the locked row that can be; wake the session if policy suspended it."""
    done = False
    waiting = await rows.many(
        conn,
        "SELECT * FROM waits WHERE session = %s AND attempt = %s AND state = 'open' ORDER BY opened_seq",
        (row.id, row.attempt),
    )
    several = any(found["kind"] in arrivals.KINDS for found in waiting)
    for found in waiting:
        if (
            several and done and found["kind"] == "signal"
        ):  # completed with a wait that has its callback address as a part
            still = await find(conn, row.id, row.attempt, found["id"])
            if still is None or still["state"] != "open":
                continue
        done = await _try(conn, row, found) or done
    if not done:
        return
    if row.policy_suspended:  # as it was locked: nothing here moves a session
        await resume(conn, await rows.load(conn, row.id), policy)
    elif row.state == State.SUSPENDING:
        await rows.update(conn, row.id, wake=True)


async def unheard(conn: Conn, row: Row, seq: int, open_calls: tuple[str, ...] | None) -> str | None:
    """A wait whose outcome the guest as captured at `seq` may not have heard of. `open_calls`: the waits that it is
    known to be still waiting for; None: the node does not say, so everything unsure counts."""
    calls = None if open_calls is None else list(open_calls)
    found = await rows.one(
        conn,
        """SELECT id FROM waits WHERE session = %s AND attempt = %s AND state = 'done'
           AND CASE WHEN %s::text[] IS NOT NULL THEN id = ANY(%s::text[])
                    ELSE given_at IS NULL OR done_seq > %s OR given_at > %s - make_interval(secs => %s) END LIMIT 1""",
        (row.id, row.attempt, calls, calls, seq, row.state_since, _ON_ITS_WAY_S),
    )
    return None if found is None else str(found["id"])


def _check(spec: WaitSpec) -> None:
    for text in (spec.id, spec.name or "", *(t for p in spec.parts for t in (p.name or "", p.wait or ""))):
        if len(text) > 200 or rows.clean(text) != text:
            raise InvalidInput(f"{text[:80]!r} cannot name a wait", remedy="use at most 200 characters, no NUL")
    if spec.kind == "timer" and spec.timeout_s is None:
        raise InvalidInput(f"timer {spec.id} has no time", remedy="give timeout_s")
    if spec.kind == "signal" and not spec.name:
        raise InvalidInput(f"wait {spec.id} names no signal", remedy="give name")
    for timeout_s in (spec.timeout_s, *(part.timeout_s for part in spec.parts)):
        if timeout_s is not None and not 0 <= timeout_s <= 10 * 366 * 86_400:
            raise InvalidInput(f"wait {spec.id} would take {timeout_s:g} s", remedy="at most ten years")
    arrivals.check(spec)


def _same(found: dict[str, Any], spec: WaitSpec) -> bool:
    same = found["kind"] == spec.kind and found["name"] == spec.name and found["timeout_s"] == spec.timeout_s
    if found["parts"] is not None and arrivals.plan_of(found["parts"]).parts != spec.parts:
        return False
    return same and (spec.kind != "inbox" or found["after"] == spec.after)


def _kept_item(found: dict[str, Any], spec: WaitSpec) -> str | None:
    same_signal = found["kind"] == spec.kind == "signal" and found["name"] == spec.name
    return found["item"] if same_signal else None


async def _open(conn: Conn, row: Row, attempt: int, spec: WaitSpec, former: dict[str, Any] | None) -> dict[str, Any]:
    data: dict[str, Any] = {"wait": spec.id, "kind": spec.kind}
    if spec.name is not None:
        data["name"] = spec.name
    if spec.timeout_s is not None:
        data["timeout_s"] = spec.timeout_s
    plan: arrivals.Plan | None = None
    if spec.kind in arrivals.KINDS:
        kept = former["parts"] if former else None
        plan = arrivals.plan_of(kept) if kept is not None else await arrivals.plan(conn, spec)
        data["parts"] = [{"kind": part.kind, **({"name": part.name} if part.name else {})} for part in spec.parts]
    event = (await rows.append(conn, row.id, NewEvent(type=EventType.WAIT_OPENED, data=data)))[0]
    opened = await rows.one(
        conn,
        """INSERT INTO waits (session, attempt, id, kind, name, after, timeout_s, state, deadline, opened_line,
                              opened_seq, item, parts, children)
           VALUES (%s, %s, %s, %s, %s, %s, %s, 'open',
                   coalesce(%s::timestamptz, now() + make_interval(secs => %s::float8)), %s, %s, %s, %s, %s)
           ON CONFLICT (session, attempt, id) DO UPDATE SET
               kind = excluded.kind, name = excluded.name, after = excluded.after, timeout_s = excluded.timeout_s,
               state = 'open', deadline = excluded.deadline, opened_line = excluded.opened_line,
               opened_seq = excluded.opened_seq, item = excluded.item, opened_at = coalesce(%s, now()),
               parts = excluded.parts, children = excluded.children, part = %s, outcome = NULL,
               done_line = NULL, done_seq = NULL, given_at = NULL, timed_out = false, number = NULL, payload = NULL
           RETURNING *""",
        (
            row.id,
            attempt,
            spec.id,
            spec.kind,
            spec.name,
            spec.after,
            spec.timeout_s,
            plan.next if plan is not None else former["deadline"] if former else None,
            spec.timeout_s,
            event.line,
            event.seq,
            former["item"] if former else None,
            plan.dump() if plan is not None else None,
            (plan.children or None) if plan is not None else None,
            former["opened_at"] if former else None,
            former["part"] if former else None,
        ),
    )
    assert opened is not None
    if opened["deadline"] is not None:
        wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    return opened


async def _try(conn: Conn, row: Row, found: dict[str, Any]) -> bool:
    """Complete an open wait if what it waits for is there, or its time is over."""
    if found["kind"] in arrivals.KINDS:
        return await _try_parts(conn, row, found)
    if found["kind"] == "inbox":
        message = await arrivals.message(conn, row, found["after"])
        if message is not None:
            await _done(
                conn, row, found, number=message["number"], item=message["id"], payload=bytes(message["payload"])
            )
            return True
    elif found["kind"] == "signal":
        signal = await _signal_for(conn, row, found)
        if signal is not None:
            seq = await _done(conn, row, found, item=signal["id"], payload=bytes(signal["payload"]))
            await _use(conn, row, found, signal["id"], seq)
            return True
    deadline: datetime | None = found["deadline"]
    if deadline is not None:
        over = await rows.one(conn, "SELECT clock_timestamp() >= %s AS over", (deadline,))
        if over is not None and over["over"]:
            await _done(conn, row, found, timed_out=True)
            return True
    return False


async def _try_parts(conn: Conn, row: Row, found: dict[str, Any]) -> bool:
    """Complete a wait for several things: with the first that came, or once all have come."""
    plan = arrivals.plan_of(found["parts"])
    clock = await rows.one(conn, "SELECT clock_timestamp() AS now")
    assert clock is not None
    now: datetime = clock["now"]
    ended = await arrivals.ended(conn, plan)
    came: list[arrivals.Arrival] = []
    for index, part in enumerate(plan.parts):
        deadline = plan.deadlines[index]
        one: arrivals.Arrival | None = None
        if part.kind == "signal":
            one = await _signal_part(conn, row, found, index, str(part.name), part.wait)
        elif part.kind == "child" and part.name in ended:
            one = arrivals.child(index, ended[part.name])
        elif part.kind == "timer" and deadline is not None and deadline <= now:
            one = arrivals.Arrival(deadline, index, "timer")
        elif part.kind == "inbox" and (message := await arrivals.message(conn, row, part.after)) is not None:
            payload = bytes(message["payload"])
            one = arrivals.Arrival(
                message["at"], index, "inbox", number=message["number"], item=message["id"], payload=payload
            )
        if one is not None:
            came.append(one)
    if found["kind"] == "all":
        if len(came) == len(plan.parts):
            outcome, results = arrivals.together(came) or (None, None)
            await _done(conn, row, found, payload=results, outcome=outcome)
            return True
    elif (best := arrivals.first(came, plan.until, now, found)) is not None:
        seq = await _done(
            conn, row, found, number=best.number, item=best.item, payload=best.payload, of=best
        )  # fmt: skip
        if best.kind == "signal" and not best.used:
            await _use(conn, row, found, str(best.item), seq)
        return True
    if plan.until is None or plan.until > now:
        return False
    await _done(conn, row, found, timed_out=True)
    return True


async def _signal_part(
    conn: Conn, row: Row, found: dict[str, Any], index: int, name: str, address: str | None
) -> arrivals.Arrival | None:
    """A signal for a wait for several things; through the wait behind its callback address (`address`) if it has one."""
    own = None if address is None else await _find(conn, row, found["attempt"], address)
    if own is not None and own["kind"] == "signal" and own["name"] == name:
        if own["state"] == "open" and await _try(conn, row, own):
            own = await find(conn, row.id, found["attempt"], own["id"])
        if own is not None and own["state"] in ("open", "done"):
            return await arrivals.taken(conn, index, own) if own["state"] == "done" else None
    signal = await _signal_for(conn, row, {**found, "name": name})
    if signal is None:
        return None
    payload = bytes(signal["payload"])
    return arrivals.Arrival(signal["at"], index, "signal", item=signal["id"], name=name, payload=payload)


async def _find(conn: Conn, row: Row, attempt: int, wait: str) -> dict[str, Any] | None:
    """The wait, taken over from an ancestor if the session is a fork."""
    found = await find(conn, row.id, attempt, wait)
    if found is None and row.forked_from is not None and await inherit(conn, [row.id], attempt, wait):
        found = await find(conn, row.id, attempt, wait)
    return found


async def _use(conn: Conn, row: Row, found: dict[str, Any], signal: str, seq: int) -> None:
    await conn.execute(
        "INSERT INTO signal_uses (signal, attempt, wait, session, line, seq) VALUES (%s, %s, %s, %s, %s, %s)",
        (signal, found["attempt"], found["id"], row.id, row.line, seq),
    )


async def _signal_for(conn: Conn, row: Row, found: dict[str, Any]) -> dict[str, Any] | None:
    """The signal that the wait had before, else one addressed to it, else the oldest of its name; none that another
    wait of the path has used."""
    return await rows.one(
        conn,
        """SELECT s.* FROM rethaw_spans(%s, %s) w
           JOIN signals s ON s.session = w.session AND s.seq > w.after AND s.seq <= w.upto
           WHERE s.name = %s
             AND (s.for_wait IS NULL OR s.for_attempt < %s OR (s.for_attempt = %s AND s.for_wait = %s))
             AND NOT EXISTS (
                 SELECT 1 FROM signal_uses u
                 JOIN rethaw_path(%s, %s) p ON u.session = p.session AND u.line = p.line AND u.seq <= p.upto
                 WHERE u.signal = s.id AND (u.attempt, u.wait) <> (%s, %s))
           ORDER BY (s.id = %s) DESC NULLS LAST, (s.for_wait IS NOT NULL) DESC, s.position LIMIT 1""",
        (
            row.id,
            row.line,
            found["name"],
            found["attempt"],
            found["attempt"],
            found["id"],
            row.id,
            row.line,
            found["attempt"],
            found["id"],
            found["item"] or "",
        ),
    )


async def _given(conn: Conn, row: Row, found: dict[str, Any]) -> None:
    await conn.execute(
        """UPDATE waits SET given_at = clock_timestamp()
           WHERE session = %s AND attempt = %s AND id = %s AND given_at IS NULL""",
        (row.id, found["attempt"], found["id"]),
    )


async def _done(
    conn: Conn,
    row: Row,
    found: dict[str, Any],
    *,
    timed_out: bool = False,
    number: int | None = None,
    item: str | None = None,
    payload: bytes | None = None,
    of: arrivals.Arrival | None = None,
    outcome: dict[str, Any] | None = None,
) -> int:
    data: dict[str, Any] = {"kind": found["kind"], "timed_out": timed_out}
    more = {"name": found["name"], "number": number, "item": item}
    if of is not None:
        more |= {"part": of.index, "of": of.kind, "name": of.name}
        outcome = of.outcome
    data |= {k: v for k, v in more.items() if v is not None}
    event = NewEvent(type=EventType.WAIT_COMPLETED, data={"wait": found["id"], **data})
    (done,) = await rows.append(conn, row.id, event)
    await conn.execute(
        """UPDATE waits SET state = 'done', done_line = %s, done_seq = %s, given_at = NULL, timed_out = %s, number = %s,
               item = coalesce(%s, item), payload = %s, part = %s, outcome = %s
           WHERE session = %s AND attempt = %s AND id = %s""",
        (
            done.line,
            done.seq,
            timed_out,
            number,
            item,
            payload,
            None if of is None else of.index,
            None if outcome is None else json.dumps(outcome),
            row.id,
            found["attempt"],
            found["id"],
        ),
    )
    return done.seq


async def _cancel(conn: Conn, row: Row, found: dict[str, Any], why: str) -> None:
    event = NewEvent(type=EventType.WAIT_CANCELLED, data={"wait": found["id"], "why": why})
    (done,) = await rows.append(conn, row.id, event)
    await conn.execute(
        """UPDATE waits SET state = 'cancelled', done_line = %s, done_seq = %s, given_at = NULL
           WHERE session = %s AND attempt = %s AND id = %s""",
        (done.line, done.seq, row.id, found["attempt"], found["id"]),
    )


def _state(session: str, found: dict[str, Any], addresses: Addresses) -> WaitState:
    done = found["state"] == "done"
    url = None
    if found["kind"] == "signal":
        url = addresses.url(addresses.token(session, found["attempt"], found["id"]))
    return WaitState(
        id=found["id"],
        done=done,
        timed_out=bool(found["timed_out"]),
        number=found["number"] if done else None,
        item=found["item"] if done and not found["timed_out"] else None,
        name=found["name"],
        payload=bytes(found["payload"]) if done and found["payload"] is not None else None,
        url=url,
        deadline=found["deadline"],
        part=found["part"] if done and not found["timed_out"] else None,
        outcome=json.loads(found["outcome"]) if done and found["outcome"] is not None else None,
    )
