"""Nodes and their leases, by the database's clock, and what they are asked to do."""

from __future__ import annotations

from typing import Any

from rethaw.control import awake, queues, recovery, rows
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn
from rethaw.model.enums import Desired, Reason, State
from rethaw.model.errors import Fenced
from rethaw.model.types import Assignment, Lease, NodeInfo

_ON_NODE = [state.value for state in State if state.on_node]
# Exchanges are owned by the incarnation of a node. Once that is gone, nobody will say that the provider has answered.
_HELD = """EXISTS (
    SELECT 1 FROM exchanges x JOIN exchange_state e ON e.id = x.id AND e.state = 'open'
    JOIN nodes n ON n.incarnation = e.owner AND n.lease_until > now() WHERE x.session = s.id)"""


async def register(conn: Conn, info: NodeInfo, policy: Policy) -> Lease:
    """A lease for this incarnation; the former one is fenced from now on."""
    await awake.seen_last(conn, info)
    await conn.execute(
        """INSERT INTO nodes (id, incarnation, info, memory_bytes, lease_until)
           VALUES (%s, %s, %s, %s, now() + make_interval(secs => %s))
           ON CONFLICT (id) DO UPDATE SET incarnation = excluded.incarnation, info = excluded.info,
               memory_bytes = excluded.memory_bytes, lease_until = excluded.lease_until,
               registered_at = CASE WHEN nodes.incarnation = excluded.incarnation
                                    THEN nodes.registered_at ELSE now() END""",
        (info.id, info.incarnation, info.model_dump_json(), info.memory_bytes, policy.lease_s),
    )
    return Lease(node=info.id, incarnation=info.incarnation, seconds=policy.lease_s)


async def renew(conn: Conn, node: str, incarnation: str, policy: Policy) -> Lease:
    """Raises Fenced when another incarnation took over."""
    renewed = await rows.one(
        conn,
        """UPDATE nodes SET lease_until = clock_timestamp() + make_interval(secs => %s)
           WHERE id = %s AND incarnation = %s RETURNING id""",
        (policy.lease_s, node, incarnation),
    )
    if renewed is None:
        raise _taken(node, incarnation)
    return Lease(node=node, incarnation=incarnation, seconds=policy.lease_s)


def _taken(node: str, incarnation: str) -> Fenced:
    return Fenced(
        f"incarnation {incarnation} of node {node} is over",
        remedy="another process runs this node, or it was never registered: stop every sandbox",
        node=node,
    )


async def assignments(conn: Conn, node: str, incarnation: str, after: int) -> list[Assignment]:
    """What is to be done still, with a revision > `after`. Raises Fenced."""
    mine = await rows.one(conn, "SELECT 1 AS ok FROM nodes WHERE id = %s AND incarnation = %s", (node, incarnation))
    if mine is None:
        raise _taken(node, incarnation)
    found = await rows.many(
        conn,
        """SELECT a.body FROM assignments a LEFT JOIN sessions s ON s.id = a.session
           WHERE a.node = %s AND a.revision > %s
             AND (a.action = 'kill' OR (s.generation = a.generation AND s.incarnation = %s))
           ORDER BY a.revision""",
        (node, after, incarnation),
    )
    return [Assignment.model_validate_json(r["body"]) for r in found]


async def lost(conn: Conn, node: str | None, *, expired: bool) -> list[str]:
    """Sessions whose life is gone with its node: run by another incarnation than the node's current one, or, if
    `expired` counts, by one whose lease ran out."""
    found = await rows.many(
        conn,
        """SELECT s.id FROM sessions s LEFT JOIN nodes n ON n.id = s.node
           WHERE s.node IS NOT NULL AND s.state = ANY(%s) AND (%s::text IS NULL OR s.node = %s)
             AND (n.id IS NULL OR n.incarnation <> s.incarnation OR (%s AND n.lease_until < clock_timestamp()))
           ORDER BY s.id""",
        (_ON_NODE, node, node, expired),
    )
    return [r["id"] for r in found]


async def recover_lost(conn: Conn, session: str, policy: Policy, *, expired: bool) -> None:
    """Recover one of `lost`, if it still is."""
    row = await rows.load(conn, session, lock=True)
    if row.node is None or not row.state.on_node:
        return
    if session not in await lost(conn, row.node, expired=expired):
        return
    await recovery.crashed(
        conn, row, Reason.NODE_LOST, f"node {row.node} stopped or did not answer", policy, counted=False
    )


async def waiting_for_node(conn: Conn) -> list[str]:
    """Sessions that want a node and have none, while any node is alive: those that had one first, the longest waiting
    before others; then those whose turn it is in their queues."""
    found = await rows.many(
        conn,
        f"""SELECT s.id FROM sessions s JOIN session_specs p ON p.session = s.id WHERE s.node IS NULL AND EXISTS (
               SELECT 1 FROM nodes n WHERE n.lease_until > now())
             AND (s.retry_at IS NULL OR s.retry_at <= clock_timestamp())
             AND ((s.state IN ('created', 'queued', 'resuming', 'recovering') AND p.slot = 'held')
                  OR (s.state = 'suspended' AND s.desired = %s
                      AND (s.reason = %s OR (s.reason = %s AND NOT {_HELD}))))
           ORDER BY s.state_since LIMIT 100""",
        (Desired.RUNNING.value, Reason.NODE_STOPPED.value, Reason.PROVIDER_HOLD.value),
    )
    return [r["id"] for r in found] + await queues.next_up(conn, 100)


async def held(conn: Conn, session: str) -> bool:
    """Whether a live node still waits for a provider on behalf of the session."""
    found = await rows.one(conn, f"SELECT {_HELD} AS held FROM sessions s WHERE s.id = %s", (session,))
    return found is not None and found["held"]


async def nodes(conn: Conn) -> list[dict[str, Any]]:
    """Every node that ever registered, with its load."""
    found = await rows.many(
        conn,
        """SELECT n.*, n.lease_until > now() AS alive,
                  extract(epoch FROM n.lease_until - now()) AS lease_left,
                  (SELECT count(*) FROM sessions s WHERE s.node = n.id AND s.state = ANY(%s)) AS sessions
           FROM nodes n ORDER BY n.registered_at""",
        (_ON_NODE,),
    )
    return [
        {
            **NodeInfo.model_validate_json(r["info"]).model_dump(mode="json"),
            "alive": r["alive"],
            "lease_left_s": round(max(0.0, float(r["lease_left"])), 1),
            "sessions": r["sessions"],
            "registered_at": r["registered_at"].isoformat(),
        }
        for r in found
    ]
