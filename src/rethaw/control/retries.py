"""Retries: a new attempt after one whose program failed by itself, or whose sandbox died again and again.

The new attempt begins at the end of the log, so everything that the failed one saw, said and sent is its context and
stays. While it waits for its time the session is queued; nothing of it is remembered but its row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rethaw.control import agents, lineage, placement, room, rows, spawned, specs, wakeups
from rethaw.control.endings import finish
from rethaw.control.outbox import publish
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict
from rethaw.model.ids import new_generation
from rethaw.model.types import NewEvent, RetriedOn, RetrySpec

NO_RETRY = "rethaw.no_retry"  # name of the event by which an agent says so; equal to rethaw.guest.protocol.NO_RETRY
_JITTER = 0.25
# Ends that publish everything their attempt did: a new one begins behind it.
_WHOLE = (Reason.EXITED, Reason.MAX_DURATION, Reason.BUDGET_EXCEEDED, Reason.CANCELLED)


def delay_s(spec: RetrySpec, failures: int) -> float:
    """Seconds until the attempt that follows the `failures`-th failure."""
    delay = spec.delay_s
    for _ in range(failures - 1):
        delay = min(delay * spec.factor, spec.max_delay_s)
        if delay >= spec.max_delay_s:
            break
    delay = min(delay, spec.max_delay_s)
    return delay * random.uniform(1 - _JITTER, 1 + _JITTER) if spec.jitter else delay


async def failed(conn: Conn, row: Row, exit_code: int | None, detail: str | None, events: Sequence[NewEvent]) -> Row:
    """The program of the locked row has ended and failed: the next attempt, or the end of the session."""
    spec = row.agent.retries
    await rows.append(conn, row.id, *events)
    why_not = None if spec is None else await _why_not(conn, row, spec, ended(exit_code), "exit", exit_code)
    if spec is None or why_not is not None:
        said = "; ".join(text for text in (why_not, detail) if text) or None
        return await finish(
            conn, row, State.FAILED, reason=Reason.EXITED, detail=said, exit_code=exit_code, reported=True
        )
    await publish(conn, await rows.load(conn, row.id), None)
    return await _next_attempt(conn, row, spec, ended(exit_code))


async def gave_up(conn: Conn, row: Row, reason: Reason, detail: str, events: Sequence[NewEvent]) -> Row:
    """Recovery has given up on the locked row, whose sandbox died again and again: the next attempt, or the end of the
    session. What came after its newest snapshot was seen by nobody."""
    spec = row.agent.retries
    kind = "out_of_memory" if reason is Reason.OUT_OF_MEMORY else "crash_loop"
    why_not = None if spec is None else await _why_not(conn, row, spec, detail, kind)
    if spec is None or why_not is not None:
        said = why_not if why_not is not None and row.failures else detail
        return await finish(
            conn, row, State.FAILED, reason=reason, detail=said, events=events, reported=True, publish_rest=False
        )
    await rows.append(conn, row.id, *events)
    return await _next_attempt(conn, row, spec, reason.value.replace("_", " "), lost=reason)


async def _next_attempt(conn: Conn, row: Row, spec: RetrySpec, how: str, lost: Reason | None = None) -> Row:
    count = row.failures + 1
    delay = delay_s(spec, count)
    at = await _in(conn, delay)
    data = {"attempt": _next(row), "of": spec.max + 1, "after": how, "delay_s": round(delay, 3)}
    text = f"attempt {_number(row, count, spec)} begins at {shown(at)}; attempt {row.attempt} ended with {how}"
    return await _begin(conn, row, text, data, at, failures=count, lost=lost)


async def by_hand(conn: Conn, session: str, policy: Policy, memory_bytes: int | None = None) -> Row:
    """A person wants the next attempt now: of a session that failed, or of one that waits for its time. `memory_bytes`:
    what it may use from then on."""
    row = await rows.load(conn, session, lock=True)
    waits = row.state == State.QUEUED and row.attempt > 1
    if memory_bytes is not None and (waits or row.state in (State.FAILED, State.CANCELLED)):
        row = await _with_memory(conn, row, memory_bytes, policy, begun=not waits)
    if waits:
        await rows.update(conn, row.id, retry_at=None)
        return await placement.dispatch(conn, await rows.load(conn, row.id), policy)
    if row.state not in (State.FAILED, State.CANCELLED):
        raise Conflict(
            f"session {row.id} is {row.state.value}: only one that failed or was cancelled is tried again",
            remedy="`rethaw rewind` takes any session back to an older point",
            state=row.state.value,
        )
    return await anew(conn, row, "a person asked for it", policy)


async def _with_memory(conn: Conn, row: Row, memory_bytes: int, policy: Policy, *, begun: bool) -> Row:
    """The locked row's next attempt runs the same agent with other memory, which is another version of it."""
    known = await agents.signature(conn, row.agent.name, row.version)
    agent = row.agent.model_copy(update={"memory_bytes": memory_bytes, "signature": known})
    room.check_memory(agent)
    await room.check(conn, agent, policy)
    return await specs.switch(conn, row, agent, await agents.number(conn, agent), begun=begun)


async def anew(conn: Conn, row: Row, after: str, policy: Policy) -> Row:
    """A new attempt of a session that has ended, at once, with its retries ahead of it."""
    data = {"attempt": _next(row), "after": after}
    row = await _begin(conn, row, f"attempt {data['attempt']} begins: {after}", data, None, failures=0)
    if row.agent.max_duration_s is not None:
        await rows.update(conn, row.id, give_up_at=await _in(conn, row.agent.max_duration_s))
    return await placement.dispatch(conn, await rows.load(conn, row.id), policy)


async def _begin(
    conn: Conn,
    row: Row,
    detail: str,
    data: dict[str, Any],
    at: datetime | None,
    *,
    failures: int,
    lost: Reason | None = None,
) -> Row:
    """Queue a new attempt of the locked row. Its former life, if any, is fenced from here on. `lost`: recovery has just
    given up on that, for this reason."""
    if at is not None:
        data["at"] = at.isoformat()
    files = await _files(conn, row)
    whole = row.reason in _WHOLE if row.state.final else lost is None
    if not whole:  # it ended in the middle of a crash: what came after its newest snapshot was seen by nobody
        row = await lineage.boot_anew(conn, row, (lost or Reason.RETRY).value)
    (event,) = await rows.append(conn, row.id, NewEvent(type=EventType.RETRY_SCHEDULED, data=data))
    if whole:
        await spawned.abandon(conn, row)
        row = await lineage.open_line(
            conn, row, event.line, event.seq, why=Reason.RETRY.value, snapshot=None, new_attempt=True
        )
    else:  # a crash before the first snapshot comes back to here
        await rows.update(conn, row.id, attempt_line=event.line, attempt_seq=event.seq)
    await placement.clear(conn, row.id)
    row = await rows.load(conn, row.id)
    row = await rows.move(
        conn,
        row,
        State.QUEUED,
        reason=Reason.RETRY,
        detail=detail,
        desired=(Desired.RUNNING if row.state.final else row.desired).value,
        generation=new_generation(),
        failures=failures,
        files_from=files,
        retry_at=at,
        restored=None,
        snapshot=None,
        life_progress=0,
        node=None,
        incarnation=None,
        wake=False,
        exit_code=None,
        cancel_by=None,
        crash_asked=False,
        loop_level=0,
        loop_deaths=0,
        loop_total=0,
        loop_high=0,
        loop_line=None,
        loop_seq=None,
    )
    wakeups.note(wakeups.TIMER_CHANNEL, wakeups.ANY)
    return row


async def _files(conn: Conn, row: Row) -> str | None:
    """The snapshot whose files the next attempt begins with: the newest one of this attempt, else what it began with."""
    if row.agent.retries is None or row.agent.retries.files != "keep":
        return None
    newest = await placement.usable(conn, row, limit=1)
    return newest[0].id if newest else row.files_from


async def _why_not(
    conn: Conn, row: Row, spec: RetrySpec, how: str, kind: RetriedOn, exit_code: int | None = None
) -> str | None:
    """Why there is no further attempt; None when there is one. `how`: in words, how this one ended."""
    count = row.failures + 1
    if kind not in spec.on:
        return f"{how} ({kind} is not among what its retries are for)"
    if exit_code in spec.not_on:
        return f"{ended(exit_code)} is not tried again"
    said = await rows.one(
        conn,
        """SELECT 1 AS ok FROM events e
           JOIN rethaw_path(%s, %s) p ON e.session = p.session AND e.line = p.line AND e.seq <= p.upto
           WHERE e.session = ANY(%s) AND e.attempt = %s AND e.type = 'emitted' AND e.data->>'name' = %s LIMIT 1""",
        (row.id, row.line, await lineage.sessions(conn, row), row.attempt, NO_RETRY),
    )
    if said is not None:
        return "its agent said that trying again is of no use"
    if count > spec.max:
        return f"{count} attempts failed, last: {how}" if count > 1 else f"it failed: {how}"
    return None


def _next(row: Row) -> int:
    return max(row.attempt, row.high_attempt) + 1


def _number(row: Row, count: int, spec: RetrySpec) -> str:
    """`2 of 4`; with the attempt's own number where crashes or rewinds made others."""
    following = _next(row)
    which = f"{count + 1} of {spec.max + 1}"
    return which if following == count + 1 else f"{following} (try {which})"


async def _in(conn: Conn, seconds: float) -> datetime:
    found = await rows.one(conn, "SELECT clock_timestamp() + make_interval(secs => %s) AS at", (seconds,))
    assert found is not None
    at: datetime = found["at"]
    return at


def shown(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def ended(exit_code: int | None) -> str:
    """How a program ended, from its exit status as shells tell it."""
    if exit_code is not None and exit_code > 128 and exit_code - 128 < 65:
        return f"signal {exit_code - 128}"
    return f"exit code {exit_code}"
