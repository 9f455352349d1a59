"""What a session did and waits for, told from its rows and its log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rethaw.control import arrivals, placement, queues, rows
from rethaw.control.lastwords import last_words
from rethaw.control.retries import ended
from rethaw.control.room import lacking
from rethaw.control.rows import POLICY_REASONS, Conn
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.types import Attempt


async def stored(conn: Conn, session: str) -> dict[str, int]:
    """`snapshots` and `restores`: ever; `stored_bytes`: of the snapshots that are still kept."""
    found = await rows.one_named(
        conn,
        """SELECT (SELECT count(*) FROM events WHERE session = %(s)s AND type = 'snapshot.created') AS snapshots,
                  (SELECT count(*) FROM events WHERE session = %(s)s AND type = 'snapshot.restored') AS restores,
                  (SELECT coalesce(sum(stored_bytes), 0) FROM snapshots
                   WHERE session = %(s)s AND NOT erased) AS stored_bytes""",
        {"s": session},
    )
    return {name: int(value) for name, value in found.items()}


async def why(conn: Conn, session: str) -> dict[str, Any]:
    """Waiting for what, since when, what wakes it, the last snapshot, where it would resume; of a failed one what it
    wrote last."""
    row = await rows.load(conn, session)
    waiting: list[dict[str, Any]] = []
    for found in await _open_waits(conn, session, row.attempt):
        over = {} if found["parts"] is None else await arrivals.ended(conn, arrivals.plan_of(found["parts"]))
        waiting += _waits(found, set(over))
    queued: queues.Obstacle | None = None
    for found in await _open_exchanges(conn, session):
        waiting.append(
            {
                "kind": "exchange",
                "name": found["id"],
                "since": found["created_at"].isoformat(),
                "wakes_it": "the model provider's answer",
            }
        )
    if row.state == State.SUSPENDED and not (row.reason in POLICY_REASONS and row.desired == Desired.RUNNING):
        waiting.append(
            {
                "kind": "person",
                "name": None,
                "since": row.state_since.isoformat(),
                "wakes_it": f"rethaw resume {row.id}",
            }
        )
    elif row.state == State.SUSPENDED and row.reason == Reason.NAP and row.nap_until is not None:
        until = row.nap_until.isoformat(timespec="seconds")
        waiting.append(
            {
                "kind": "nap",
                "name": None,
                "since": row.state_since.isoformat(),
                "wakes_it": f"time: {until}, a key (rethaw attach {row.id}), a request to one of its ports, rethaw exec, or a"
                f" message (rethaw send {row.id} ...); it was suspended because it did nothing",
                "deadline": row.nap_until.isoformat(),
            }
        )
    elif row.retry_at is not None and row.retry_at > datetime.now(UTC):
        waiting.append(
            {
                "kind": "retry",
                "name": None,
                "since": row.state_since.isoformat(),
                "wakes_it": f"time: attempt {row.attempt} begins at {row.retry_at.isoformat(timespec='seconds')}"
                f" (rethaw retry {row.id} begins it now)",
                "deadline": row.retry_at.isoformat(),
            }
        )
    elif row.node is None and (queued := await queues.obstacle(conn, row, counted=True)) is not None:
        waiting.append(
            {
                "kind": queued.kind,
                "name": row.queue if queued.kind == "queue" else None,
                "since": row.state_since.isoformat(),
                "wakes_it": queued.ends_with,
            }
        )
    elif row.node is None and row.state in (State.CREATED, State.QUEUED, State.RESUMING, State.RECOVERING):
        waiting.append(
            {
                "kind": "node",
                "name": None,
                "since": row.state_since.isoformat(),
                "wakes_it": f"a node with room ({await lacking(conn, row)})",
            }
        )
    last, resume_at = None, None
    if row.snapshot is not None and (known := await placement.snapshot_row(conn, row.snapshot)) is not None:
        last = {
            "id": known["id"],
            "seq": known["seq"],
            "why": known["why"],
            "node": known["node"],
            "at": known["created_at"].isoformat(),
            "stored_bytes": known["stored_bytes"],
        }
    if not row.state.final:
        resume_at = (
            f"snapshot {last['id']} (event {last['seq']})" if last is not None else "a boot from the context log"
        )
    return {
        "state": row.state.value,
        "desired": row.desired.value,
        "reason": row.reason.value,
        "detail": queued.text if queued is not None else row.detail,
        "since": row.state_since.isoformat(),
        "waiting_for": [] if row.state.final else waiting,
        "last_snapshot": last,
        "would_resume_at": resume_at,
        "last_words": await last_words(conn, row) if row.state == State.FAILED else None,
    }


async def attempts(conn: Conn, session: str) -> list[Attempt]:
    """Each life of the process tree, oldest first, whatever line it was on."""
    row = await rows.load(conn, session)
    found = await rows.many(
        conn,
        """SELECT e.type, e.attempt, e.data, e.at FROM rethaw_ancestry(%s) a
           JOIN events e ON e.session = a.session AND e.seq <= a.upto
           WHERE e.type IN ('attempt.started', 'attempt.exited', 'line.opened')
              OR (e.type = 'session.state' AND e.data->>'state' IN ('completed', 'failed', 'cancelled'))
           ORDER BY e.seq""",
        (session,),
    )
    out: dict[int, Attempt] = {}
    for event in found:
        number = int(event["attempt"])
        known = out.get(number) or Attempt(attempt=number)
        if event["type"] == EventType.ATTEMPT_STARTED:
            known = known.model_copy(update={"started_at": known.started_at or event["at"], "how": None})
        elif event["type"] == EventType.LINE_OPENED:
            former = out.get(number - 1)
            if number not in out and former is not None and former.how is None:
                why = str(event["data"].get("why", "crash")).replace("_", " ")
                out[number - 1] = former.model_copy(update={"ended_at": event["at"], "how": f"given up ({why})"})
            continue
        elif event["type"] == EventType.ATTEMPT_EXITED:
            code = event["data"].get("exit_code")
            how = event["data"].get("detail") or ended(int(code) if code is not None else None)
            known = known.model_copy(update={"ended_at": event["at"], "how": how})
        elif known.how is None:
            how = str(event["data"].get("reason")).replace("_", " ")
            known = known.model_copy(update={"ended_at": event["at"], "how": how})
        out[number] = known
    current = out.get(row.attempt)
    if current is not None and not row.state.final and row.state not in (State.CREATED, State.QUEUED):
        out[row.attempt] = current.model_copy(update={"ended_at": None, "how": None})  # a rewind leads back to it
    return [out[number] for number in sorted(out) if out[number].started_at is not None or out[number].how is not None]


async def _open_waits(conn: Conn, session: str, attempt: int) -> list[dict[str, Any]]:
    return await rows.many(
        conn,
        "SELECT * FROM waits WHERE session = %s AND attempt = %s AND state = 'open' ORDER BY opened_seq",
        (session, attempt),
    )


async def _open_exchanges(conn: Conn, session: str) -> list[dict[str, Any]]:
    return await rows.many(
        conn,
        """SELECT x.id, x.created_at FROM exchanges x JOIN exchange_state t USING (id)
           WHERE x.session = %s AND t.state = 'open' ORDER BY x.seq""",
        (session,),
    )


def _waits(found: dict[str, Any], over: set[str]) -> Iterator[dict[str, Any]]:
    """One wait; of one for several things each of them, without children that are over."""
    if found["parts"] is None:
        yield _wait(found)
        return
    plan = arrivals.plan_of(found["parts"])
    for part, deadline in zip(plan.parts, plan.deadlines, strict=True):
        if part.kind != "child" or part.name not in over:
            yield _wait({**found, "kind": part.kind, "name": part.name, "deadline": deadline or plan.until})


def _wait(found: dict[str, Any]) -> dict[str, Any]:
    deadline: datetime | None = found["deadline"]
    by = f"{deadline.isoformat(timespec='seconds')}" if deadline is not None else None
    session, name = found["session"], found["name"]
    wakes = {
        "inbox": f"a message (rethaw send {session} ...)",
        "signal": f"signal {name!r} (rethaw signal {session} {name})",
        "timer": "time",
        "child": f"the end of its child {name}",
    }[found["kind"]]
    if by is not None:
        wakes = f"time: {by}" if found["kind"] == "timer" else f"{wakes}, or time: {by}"
    return {
        "kind": found["kind"],
        "name": name,
        "since": found["opened_at"].isoformat(),
        "wakes_it": wakes,
        "deadline": deadline.isoformat() if deadline is not None else None,
    }
