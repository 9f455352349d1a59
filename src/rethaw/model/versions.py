"""What the registry of agents says, as it travels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

from rethaw.model.types import AgentSpec, SessionView, StartOptions, TerminalSpec
from rethaw.model.wire import Wire

Files = Literal["keep", "fresh"]
FILES = ("keep", "fresh")
SHOWN = 8  # hex digits of a version's digest for a reader
TEMPLATE = "RETHAW_TEMPLATE"  # in the environment of sessions that are begun to be forked from
_AUTO = "auto."  # equal to control.templates.AUTO


def plain(agent: AgentSpec) -> AgentSpec:
    """`agent` as its author wrote it: without what a template or a start adds."""
    if agent.terminal is not None:  # its size is of a start
        agent = agent.model_copy(update={"terminal": TerminalSpec()})
    template = agent.env.get(TEMPLATE)
    if template is None:
        return agent
    env = {name: value for name, value in agent.env.items() if name != TEMPLATE}
    return agent.model_copy(update={"env": env, "template": "auto" if template.startswith(_AUTO) else agent.template})


def unsigned(agent: AgentSpec) -> AgentSpec:
    """`agent` without what is written down about its arguments, and about those of the agents that it may spawn."""
    others = {name: unsigned(other) for name, other in agent.agents.items()}
    if agent.signature is None and all(others[name] is other for name, other in agent.agents.items()):
        return agent
    return agent.model_copy(update={"signature": None, "agents": others})


def digest(agent: AgentSpec) -> str:
    """What names a version. Fields that stand at their default do not count, so that a field that a later Rethaw adds
    leaves the digests of today as they are; nor do signatures, which the code says already."""
    text = json.dumps(unsigned(plain(agent)).model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AgentVersion(Wire):
    """One version of an agent. `deployed_at`: None for one that was only ever run from a file. `current`: what a start by
    name takes. `sessions`: how many unfinished ones run it now."""

    agent: str
    version: int
    digest: str  # hex, of image, code and everything else in `spec`
    spec: AgentSpec
    starting: StartOptions = StartOptions()  # queue and the like, as its definition says
    created_at: datetime
    deployed_at: datetime | None = None
    current: bool = False
    pinned: bool = False
    sessions: int = 0

    @property
    def label(self) -> str:
        """`3 (4be1c02a)`."""
        return label(self.version, self.digest) or ""

    def function(self) -> Callable[..., Any] | None:
        """Stands in for its function, which takes what that takes; None when nothing is written down of that."""
        from rethaw.model.signatures import stand_in

        return None if self.spec.signature is None else stand_in(self.agent, self.spec.signature)


class Running(Wire):
    """A session and the version of its agent that it runs."""

    session: str
    version: int | None
    state: str


class AgentDetail(Wire):
    """An agent by name: its versions, newest first, and its sessions, newest first."""

    name: str
    pinned: int | None
    versions: tuple[AgentVersion, ...]
    sessions: tuple[Running, ...] = ()


class Upgraded(Wire):
    """What became of an upgrade. `changed` is False when the session ran that version already. `at`: the seq up to which
    the log is the new code's context. `files`: the snapshot whose files it begins with."""

    session: SessionView
    from_version: int
    to_version: int
    changed: bool
    at: int
    files: str | None = None


def label(version: int | None, digest: str | None) -> str | None:
    """`3 (4be1c02a)`; without a number the digest alone."""
    short = f"({digest[:SHOWN]})" if digest else ""
    return f"{version} {short}".strip() if version is not None else short or None
