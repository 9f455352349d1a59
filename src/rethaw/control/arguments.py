"""Arguments of a start, checked against what was written down with the agent's version (model/signatures.py)."""

from __future__ import annotations

from typing import Any

from rethaw.model import signatures
from rethaw.model.errors import InvalidInput
from rethaw.model.types import AgentSpec
from rethaw.model.versions import TEMPLATE


def check(agent: AgentSpec, args: dict[str, Any]) -> None:
    """Raises InvalidInput naming the argument and what it takes. A version without a signature takes anything; a session
    that is begun to be forked from has its arguments later."""
    if agent.signature is not None and TEMPLATE not in agent.env:
        signatures.check(agent.name, agent.signature, args)


def check_record(agent: AgentSpec) -> None:
    """Raises InvalidInput when the signature of `agent`, or of one that it may spawn, cannot be read."""
    if agent.signature is not None:
        if len(agent.signature.model_dump_json()) > signatures.LIMIT:
            raise InvalidInput(
                f"the signature of agent {agent.name} is longer than {signatures.LIMIT >> 10} KiB",
                remedy="leave it out",
            )
        signatures.stand_in(agent.name, agent.signature)
    for other in agent.agents.values():
        check_record(other)
