"""Sessions that begin with a snapshot from another installation."""

from __future__ import annotations

import json
from typing import Any

from rethaw.control import agents, rows, sessions, specs
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.log.writer import create_session_in
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.types import AgentSpec, NewEvent, SnapshotInfo


async def take_in(
    conn: Conn,
    session: str,
    agent: AgentSpec,
    args: dict[str, Any],
    info: SnapshotInfo,
    node: str,
    origin: str,
    policy: Policy,
) -> Row:
    """A session suspended at `info`, whose files are on `node`; a person resumes it. `origin`: what it was a snapshot
    of. Its log begins here: its attempt goes on, what the model saw before is in guest memory."""
    sessions.check_agent(agent, policy)
    await create_session_in(conn, session)
    spec, text = specs.text_of(agent), sessions.canonical(args)
    await conn.execute(
        "INSERT INTO session_specs (session, agent, args, version) VALUES (%s, %s, %s, %s)",
        (session, spec, text, await agents.number(conn, agent)),
    )
    await rows.update(
        conn, session, attempt=info.attempt, agent_name=agent.name, memory_bytes=agent.memory_bytes,
        desired=Desired.SUSPENDED.value,
    )  # fmt: skip
    born = NewEvent(type=EventType.SESSION_CREATED, data={"agent": agent.name, "imported_from": origin})
    taken = {"snapshot": info.id, "parent": None, "seq": 1, "stored_bytes": info.stored_bytes, "why": info.why}
    asleep = rows.state_event(State.SUSPENDED, Reason.REQUESTED, None)
    first = (await rows.append(conn, session, born, NewEvent(type=EventType.SNAPSHOT_CREATED, data=taken), asleep))[0]
    here = info.model_copy(
        update={"session": session, "line": first.line, "seq": first.seq, "parent": None, "generation": ""}
    )
    await conn.execute(
        """INSERT INTO snapshots (id, session, node, parent, line, attempt, seq, info, why, stored_bytes)
           VALUES (%s, %s, %s, NULL, %s, %s, %s, %s, %s, %s)""",
        (
            here.id,
            session,
            node,
            here.line,
            here.attempt,
            here.seq,
            here.model_dump_json(),
            here.why,
            here.stored_bytes,
        ),
    )
    await rows.update(
        conn, session, state=State.SUSPENDED.value, reason=Reason.REQUESTED.value, snapshot=here.id,
        attempt_line=first.line, attempt_seq=first.seq,
    )  # fmt: skip
    return await rows.load(conn, session)


async def described(conn: Conn, info: SnapshotInfo) -> dict[str, Any]:
    """What an exported snapshot says of its session: {agent, args}."""
    row = await rows.load(conn, info.session)
    agent, _ = await specs.of_attempt(conn, info.session, info.attempt)
    return {"agent": agent.model_dump(mode="json"), "args": json.loads(row.args)}
