"""Memory: what an agent may ask for at least, and at most, by the nodes that are known."""

from __future__ import annotations

from rethaw.control import rows
from rethaw.control.policy import Policy
from rethaw.control.rows import Conn, Row
from rethaw.model.errors import InvalidInput
from rethaw.model.types import MIB, AgentSpec, NodeInfo

MIN_MEMORY = 32 * MIB  # guestd, an interpreter and a little room


def check_memory(agent: AgentSpec) -> None:
    """Raises InvalidInput for less memory than an agent can begin with."""
    if agent.memory_bytes < MIN_MEMORY:
        raise InvalidInput(
            f"memory of {agent.memory_bytes / MIB:g} MiB is too small for agent {agent.name}",
            remedy=f"give it at least {MIN_MEMORY // MIB} MiB",
        )


def most(memory_bytes: int, policy: Policy) -> int:
    """The largest sandbox that an empty node of so much memory takes."""
    return min(memory_bytes, int(memory_bytes * policy.overcommit))


async def check(conn: Conn, agent: AgentSpec, policy: Policy) -> None:
    """Raises InvalidInput when no node that was ever registered could hold `agent`, however empty: it would be queued for
    ever. A node that is away may come back; while there is none at all, one of any size may come."""
    known = await rows.many(conn, "SELECT info, memory_bytes FROM nodes")
    fitting = [
        most(node["memory_bytes"], policy)
        for node in known
        if agent.engine is None or agent.engine in NodeInfo.model_validate_json(node["info"]).engines
    ]
    if fitting and max(fitting) < agent.memory_bytes:
        of_engine = f" with engine {agent.engine}" if agent.engine is not None else ""
        raise InvalidInput(
            f"agent {agent.name} asks for {agent.memory_bytes // MIB} MiB of memory, which no node{of_engine} has: "
            f"the largest takes {max(fitting) // MIB} MiB",
            remedy="give it less (memory= of @rethaw.agent, --memory), or start a larger node",
            memory_bytes=agent.memory_bytes,
        )


async def lacking(conn: Conn, row: Row) -> str:
    """Why no node takes the session now."""
    live = await rows.many(conn, "SELECT id, memory_bytes FROM nodes WHERE lease_until > now()")
    if not live:
        return "no node is alive"
    if all(node["memory_bytes"] < row.memory_bytes for node in live):
        largest = max(node["memory_bytes"] for node in live) // MIB
        wanted = f"no node has the {row.memory_bytes // MIB} MiB of memory it asks for"
        return f"{wanted}, the largest has {largest}: cancel it, and give it less"
    return "no node has room"
