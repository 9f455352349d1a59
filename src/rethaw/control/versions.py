"""Versions of agents as the API asks for them (control/agents.py and control/upgrade.py have what happens inside)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from rethaw.control import agents, rows, sessions, upgrade
from rethaw.control.policy import Policy
from rethaw.control.wakeups import Transactions
from rethaw.model import faults
from rethaw.model.errors import WaitTimeout
from rethaw.model.ids import new_generation
from rethaw.model.types import AgentSpec, SnapshotInfo, StartOptions
from rethaw.model.versions import AgentDetail, AgentVersion, Files, Upgraded


class Versions:
    """By name. `snapshot`: takes one of a session."""

    def __init__(
        self,
        transactions: Transactions,
        policy: Callable[[], Policy],
        snapshot: Callable[[str], Awaitable[SnapshotInfo]],
    ) -> None:
        self._run = transactions.run
        self._policy = policy
        self._snapshot = snapshot

    async def deploy(self, agent: AgentSpec, starting: StartOptions | None = None) -> tuple[AgentVersion, bool]:
        """Register a version and let starts by name take it (with `starting`, unless they say otherwise); whether it was not
        deployed before."""
        sessions.check_agent(agent, self._policy())
        return await self._run(lambda conn: agents.deploy(conn, agent, starting or StartOptions()))

    async def every(self) -> list[AgentVersion]:
        """The current version of each agent."""
        return await self._run(agents.every)

    async def show(self, name: str) -> AgentDetail:
        return await self._run(lambda conn: agents.show(conn, name))

    async def get(self, name: str, version: int | None = None) -> AgentVersion:
        """`version`, or what a start by name takes."""
        return await self._run(lambda conn: agents.pick(conn, name, version))

    async def pin(self, name: str, version: int | None) -> AgentVersion:
        """Let starts by name take `version`; None: what was deployed last."""
        return await self._run(lambda conn: agents.pin(conn, name, version))

    async def upgrade(
        self,
        session: str,
        agent: AgentSpec | None = None,
        version: int | None = None,
        *,
        at: int | None = None,
        files: Files = "keep",
    ) -> Upgraded:
        """Let the session go on with `agent`, or with a version of its own (None: the current one). `at`: from this event
        on; what came after it is left. Of one that runs a snapshot is taken first if its files are to be kept."""
        now = await self._run(lambda conn: rows.load(conn, session))
        wanted = agent or (await self.get(now.agent.name, version)).spec
        row = await self._run(lambda conn: upgrade.ask(conn, session, wanted, at, self._policy()))
        same = row.version is not None and (await self._run(lambda conn: agents.number(conn, wanted))) == row.version
        if files == "keep" and at is None and row.state in upgrade.LIVE and not same:
            try:
                await self._snapshot(session)
            except WaitTimeout as error:
                raise WaitTimeout(error.message, remedy="`--files fresh` upgrades it without its files") from error
        faults.point("control.upgrade.before")
        want = upgrade.Wanted(wanted, at, files == "keep", row.state.final, new_generation())
        done = await self._run(lambda conn: upgrade.upgrade(conn, session, want, self._policy()))
        faults.point("control.upgrade.after")
        return Upgraded(
            session=rows.view(done.row), from_version=done.before, to_version=done.after, changed=done.changed,
            at=done.at, files=done.row.files_from if done.changed else None,
        )  # fmt: skip
